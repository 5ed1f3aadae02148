"""Export a feature network for the evaluator; see `evaluations.export_features`."""

from esddpm_io.errors import run_main, terminate_cleanly
from evaluations.export_features import create_argparser, main

__all__ = ["create_argparser", "main"]

if __name__ == "__main__":
    terminate_cleanly()
    run_main(main)
