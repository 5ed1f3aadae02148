"""Export a feature network for the evaluator; see `evaluations.export_features`."""

from esddpm_io.errors import errors_in_one_line

with errors_in_one_line():
    from evaluations.export_features import create_argparser, main

    if __name__ == "__main__":
        main()

__all__ = ["create_argparser", "main"]
