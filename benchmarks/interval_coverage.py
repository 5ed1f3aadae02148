"""How often the evaluator's 95 % interval of FID and sFID holds the true value, in a simulation.

    OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py [--trials 1000] [--images 300 500 …]
        [--fid_features 64] [--cases "FID, light" …]

Features stand for those of images: rectified mixtures of independent numbers, of falling variance
for the pool's (64 of them by default) and correlated between neighbouring places for the spatial
ones (63, 7 channels). Light tails: normal numbers; heavy tails: Student's t of 8 degrees, with a
scale that all numbers of an image share; endless tails: t of 4 degrees, whose fourth moment is
infinite, so that no covariance of them has a finite error. Real features: the 128 of the VAE's
emoji32 images, drawn from its 3,786 with replacement, against all drawings. The truth is the mean
distance of 2,000 sets of as many images.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evaluations.features import choose_engine, extract, load_graph
from evaluations.inputs import open_set
from evaluations.metrics import (
    Gaussian,
    frechet_distance,
    gaussian_of,
    interval_of_replicates,
    jackknife_replicates,
)

GROUPS, TRUE_SETS, REFERENCE_IMAGES = 40, 2000, 3000
TAILS = {"light": None, "heavy": 8, "endless": 4}  # degrees of Student's t
PRECOMPUTED = Path(__file__).parents[1] / "evaluations" / "precomputed"
Draw = Callable[[int, int], np.ndarray]  # seed, images -> features [images, D] of one set


def mixing(kind: str, width: int) -> np.ndarray:
    """What turns independent numbers into features [D, D]."""
    rng = np.random.default_rng(5)
    if kind == "FID":
        falling = np.exp(-3 * np.arange(width) / width)[:, None]
        return rng.standard_normal((width, width)) * falling / np.sqrt(width)
    y, x = np.mgrid[:3, :3].reshape(2, -1)
    near = np.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / 8)
    channels = rng.standard_normal((7, 7)) / np.sqrt(7)
    covariance = np.kron(near, channels @ channels.T + 0.1 * np.eye(7))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))).T / 2


def features(seed: int, count: int, mix: np.ndarray, degrees: int | None) -> np.ndarray:
    """Features float64 [count, D] of one set."""
    rng = np.random.default_rng(seed)
    shape = count, len(mix)
    if degrees is None:
        numbers = rng.standard_normal(shape)
    else:
        numbers = rng.standard_t(degrees, shape) * np.sqrt(1 - 2 / degrees)
        numbers *= np.sqrt(rng.gamma(2, 0.5, (count, 1)))
    return np.maximum(numbers @ mix + 0.3, 0)


def simulated(kind: str, degrees: int | None, width: int) -> tuple[Gaussian, Draw]:
    mix = mixing(kind, width)
    reference = gaussian_of(features(1, REFERENCE_IMAGES, mix, None) + 0.05)
    return reference, lambda seed, count: features(seed, count, mix, degrees)


def real() -> tuple[Gaussian, Draw]:
    engine = choose_engine(load_graph(str(PRECOMPUTED / "emoji32_features.pb")), "torch")
    drawings = open_set(PRECOMPUTED / "VIRTUAL_emoji32_labeled.npz", flag="").pool_gaussian
    source = open_set(PRECOMPUTED / "vae_emoji32.npz", flag="").source
    rows = extract(engine, source, name="emoji32").pool

    def draw(seed: int, count: int) -> np.ndarray:
        return rows[np.random.default_rng(seed).integers(0, len(rows), count)]

    assert drawings is not None
    return drawings, draw


def coverage(reference: Gaussian, draw: Draw, count: int, trials: int) -> tuple[float, float]:
    """Share of intervals that hold the truth, and their mean width over the truth."""

    def distance(rows: np.ndarray) -> float:
        return frechet_distance(reference, gaussian_of(rows))

    sets = range(10_000, 10_000 + TRUE_SETS)
    truth = np.mean([distance(draw(seed, count)) for seed in sets])
    held, widths = 0, []
    for seed in range(2, 2 + trials):
        rows = draw(seed, count)
        replicates = jackknife_replicates(
            lambda own, x=rows: distance(x[own]), count, groups=GROUPS
        )
        low, high = interval_of_replicates(replicates, logarithmic=True)
        held += low <= truth <= high
        widths.append((high - low) / truth)
    return float(held / trials), float(np.mean(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--images", type=int, nargs="+", default=[300, 500, 1000, 2000])
    parser.add_argument("--fid_features", type=int, default=64)
    parser.add_argument("--cases", nargs="+", default=[""], help="how names of cases begin")
    args = parser.parse_args()
    cases = {
        f"{kind}, {tails} tails": simulated(kind, degrees, args.fid_features)
        for tails, degrees in TAILS.items()
        for kind in ("FID", "sFID")
    }
    cases["Frechet distance of emoji32 features"] = real()
    print("| figure | images | coverage | width / value |")
    print("| --- | ---: | ---: | ---: |")
    for name, case in cases.items():
        if not name.startswith(tuple(args.cases)):
            continue
        for count in args.images:
            share, width = coverage(*case, count, args.trials)
            print(f"| {name} | {count} | {share:.1%} | {width:.2f} |", flush=True)


if __name__ == "__main__":
    main()
