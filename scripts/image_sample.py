"""Sample images from noise: see `guided_diffusion/commands/image_sample.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.image_sample import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
