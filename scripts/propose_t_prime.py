"""Propose T' from data; see `guided_diffusion.commands.propose`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.propose import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
