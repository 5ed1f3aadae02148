"""An npz of images into a folder: see `guided_diffusion/commands/npz_to_imagefolder.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.npz_to_imagefolder import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
