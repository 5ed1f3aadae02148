"""A checkpoint in another form: see `guided_diffusion/commands/convert.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.convert import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
