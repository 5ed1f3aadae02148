"""Train a classifier of noisy images: see `guided_diffusion/commands/classifier_train.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.classifier_train import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
