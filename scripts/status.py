"""Where a folder of samples or a sweep's stands: see `guided_diffusion/commands/status.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.status import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
