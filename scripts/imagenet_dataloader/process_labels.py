"""The classes of ImageNet's validation images: see `commands/process_labels.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.process_labels import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
