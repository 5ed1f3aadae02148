"""A checkpoint in another form: see `guided_diffusion/commands/convert.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.convert import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
