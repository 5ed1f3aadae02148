"""Propose T' from data; see `guided_diffusion.commands.propose`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.propose import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
