"""One sampling process: carry generator images to T' and back with classifier guidance."""

from esddpm_io.errors import run_main
from guided_diffusion.sampling import worker


def main(argv: list[str] | None = None) -> None:
    worker.main(argv, guided=True)


if __name__ == "__main__":
    run_main(main)
