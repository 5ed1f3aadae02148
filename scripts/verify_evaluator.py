"""Check the evaluator against known figures: see `commands/verify_evaluator.py`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from guided_diffusion.commands.verify_evaluator import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
