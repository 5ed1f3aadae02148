"""Turn any generator into an npz of images: see `commands/generator_samples.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.generator_samples import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
