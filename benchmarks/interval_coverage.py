"""How often the evaluator's 95 % interval of FID and sFID holds the true value, in a simulation.

    OMP_NUM_THREADS=1 python benchmarks/interval_coverage.py [--trials 200] [--images 100 300 1000]

Features stand for those of images: rectified mixtures of independent numbers, of falling variance
for the pool's (64 of them) and correlated between neighbouring places for the spatial ones (63, 7
channels). Light tails: normal numbers; heavy tails: Student's t of 4 degrees, with a scale that all
numbers of an image share. The truth is the mean distance of 400 sets of as many images.
"""

import argparse

import numpy as np

from evaluations.metrics import (
    frechet_distance,
    gaussian_of,
    interval_of_replicates,
    jackknife_replicates,
)

GROUPS, TRUE_SETS, REFERENCE_IMAGES = 40, 400, 3000


def mixing(kind: str) -> np.ndarray:
    """What turns independent numbers into features [D, D]."""
    rng = np.random.default_rng(5)
    if kind == "FID":
        falling = np.exp(-3 * np.arange(64) / 64)[:, None]
        return rng.standard_normal((64, 64)) * falling / 8
    y, x = np.mgrid[:3, :3].reshape(2, -1)
    near = np.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / 8)
    channels = rng.standard_normal((7, 7)) / np.sqrt(7)
    covariance = np.kron(near, channels @ channels.T + 0.1 * np.eye(7))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))).T / 2


def features(seed: int, count: int, mix: np.ndarray, heavy: bool) -> np.ndarray:
    """Features float64 [count, D] of one set."""
    rng = np.random.default_rng(seed)
    shape = count, len(mix)
    numbers = rng.standard_t(4, shape) / np.sqrt(2) if heavy else rng.standard_normal(shape)
    if heavy:
        numbers *= np.sqrt(rng.gamma(2, 0.5, (count, 1)))
    return np.maximum(numbers @ mix + 0.3, 0)


def coverage(kind: str, heavy: bool, count: int, trials: int) -> tuple[float, float]:
    """Share of intervals that hold the truth, and their mean width over the truth."""
    mix = mixing(kind)
    reference = gaussian_of(features(1, REFERENCE_IMAGES, mix, heavy=False) + 0.05)

    def distance(rows: np.ndarray) -> float:
        return frechet_distance(reference, gaussian_of(rows))

    sets = range(10_000, 10_000 + TRUE_SETS)
    truth = np.mean([distance(features(seed, count, mix, heavy)) for seed in sets])
    held, widths = 0, []
    for seed in range(2, 2 + trials):
        rows = features(seed, count, mix, heavy)
        replicates = jackknife_replicates(
            lambda own, x=rows: distance(x[own]), count, groups=GROUPS
        )
        low, high = interval_of_replicates(replicates, logarithmic=True)
        held += low <= truth <= high
        widths.append((high - low) / truth)
    return held / trials, float(np.mean(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 1000])
    args = parser.parse_args()
    print("| metric | tails | images | coverage | width / value |")
    print("| --- | --- | ---: | ---: | ---: |")
    for kind in ("FID", "sFID"):
        for heavy in (False, True):
            for count in args.images:
                share, width = coverage(kind, heavy, count, args.trials)
                tails = "heavy" if heavy else "light"
                print(f"| {kind} | {tails} | {count} | {share:.1%} | {width:.2f} |", flush=True)


if __name__ == "__main__":
    main()
