"""Bits per dimension of images: see `guided_diffusion/commands/image_nll.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.image_nll import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
