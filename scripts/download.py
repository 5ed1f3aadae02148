"""Fetch the published files of a data set: see `guided_diffusion/commands/download.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.download import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
