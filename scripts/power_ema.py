"""Averages of any width, after training: see `guided_diffusion/commands/power_ema.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.power_ema import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
