"""ImageNet's validation images with their classes: see `commands/imagenet_dataset.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.imagenet_dataset import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
