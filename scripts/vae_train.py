"""Train a VAE on images: see `guided_diffusion/commands/vae_train.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.vae_train import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
