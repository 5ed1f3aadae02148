"""Sample a VAE: see `guided_diffusion/commands/vae_sample.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.vae_sample import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
