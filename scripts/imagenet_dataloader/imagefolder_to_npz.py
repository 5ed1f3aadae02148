"""A folder of images into an npz: see `guided_diffusion/commands/imagefolder_to_npz.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.imagefolder_to_npz import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
