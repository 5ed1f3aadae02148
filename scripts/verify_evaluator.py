"""Check the evaluator against known figures: see `commands/verify_evaluator.py`."""

from esddpm_io.errors import run_main
from guided_diffusion.commands.verify_evaluator import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    run_main(main)
