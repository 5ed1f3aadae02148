"""Check the evaluator against figures that can be known, with the published files that there are.

    python scripts/verify_evaluator.py --dir FOLDER

FOLDER holds VIRTUAL_imagenet64_labeled.npz and, if you have it, admnet_imagenet64.npz. A reference
against itself must have distances of 0, precision and recall of 1. Exit code 1 if a figure is not
what it should be.
"""

import argparse
import sys
from pathlib import Path

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.help import CommandLine

REFERENCE = "VIRTUAL_imagenet64_labeled.npz"
# The released samples of Dhariwal and Nichol 2021 and their FID (2.07 is that of another run)
SAMPLES = {"admnet_imagenet64.npz": {"fid": (2.61, 0.05)}}
# Distances of a set from itself, and shares of its points that are in their own balls
SELF = {"fid": (0.0, 1e-6), "sfid": (0.0, 1e-6), "precision": (1.0, 1e-9), "recall": (1.0, 1e-9)}


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--dir", default=".", help="where the published files are")
    parser.add_argument("--reference", default=REFERENCE, help="another reference batch in it")
    parser.add_argument("--inception_path", help="frozen graph; default: as for evaluator.py")
    parser.add_argument(
        "--backend", default="auto", help="engine of the evaluator: auto, tensorflow or torch"
    )
    return parser


def check(reference: Path, samples: Path, expected: dict, **options) -> bool:
    """Print expected against found figures; whether all are within their tolerance."""
    from evaluations.evaluation import run
    from evaluations.evaluator import warn

    result = run(reference, samples, tell=warn, metrics=tuple(expected), **options).results[0]
    good = True
    for name, (value, tolerance) in expected.items():
        fits = abs(result[name] - value) <= tolerance
        good &= fits
        verdict = "ok" if fits else "WRONG"
        print(f"{samples.name} {name}: expected {value}, found {result[name]:.6g}: {verdict}")
    return good


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    folder = Path(args.dir)
    reference = folder / args.reference
    if not reference.exists():
        raise UserError(f"--dir: there is no {reference}")
    options = {"inception_path": args.inception_path, "backend": args.backend}
    checks = [(reference, SELF)]
    for name, expected in SAMPLES.items():
        if (folder / name).exists() and args.reference == REFERENCE:
            checks.append((folder / name, expected))
        else:
            print(f"{name}: not there or not for this reference, skipped")
    verdicts = [check(reference, samples, expected, **options) for samples, expected in checks]
    if not all(verdicts):
        sys.exit(1)
