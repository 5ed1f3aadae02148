"""Fetch the published files of a data set: see `guided_diffusion/commands/download.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.download import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
