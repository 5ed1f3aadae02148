"""Averages of any width, after training: see `guided_diffusion/commands/power_ema.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.power_ema import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
