"""One sampling process: carry generator images to T' and back with classifier guidance."""

from esddpm_io.errors import run_main


def main(argv: list[str] | None = None) -> None:
    from guided_diffusion.commands import sample

    sample.main(argv, guided=True)


if __name__ == "__main__":
    run_main(main)
