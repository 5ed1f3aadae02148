"""The metrics: pure functions of features (no images, no files, no network).

The distance of Gaussians is in `moments`, what counts neighbours in `neighbours`; both are offered
here as well, so that this module has every metric.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from evaluations.moments import Gaussian, RunningMoments, frechet_distance, gaussian_of
from evaluations.neighbours import density_coverage, neighbour_radii, precision_recall

__all__ = [
    "Gaussian",
    "RunningMoments",
    "Value",
    "bootstrap_interval",
    "density_coverage",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "kernel_distance",
    "neighbour_radii",
    "precision_recall",
]

INCEPTION_SPLIT = 5000  # images a block of the published Inception score


@dataclass(frozen=True)
class Value:
    """A metric's value and, for those taken over splits or subsets, their standard deviation."""

    value: float
    deviation: float | None = None


def inception_score(
    pool: np.ndarray, softmax_weights: np.ndarray, split: int = INCEPTION_SPLIT
) -> Value:
    """Inception score (Salimans et al. 2016), mean and deviation over blocks of `split` images.

    exp(mean over images of KL(p(y|x) || p(y))) for each block, where p(y|x) is the softmax of
    pool features [N, P] times `softmax_weights` [P, classes] (no bias) and p(y) its block's mean.
    """
    scores = []
    for start in range(0, len(pool), split):
        log_p = log_softmax((pool[start : start + split] @ softmax_weights).astype(float), axis=1)
        p = np.exp(log_p)
        marginal = p.mean(axis=0)
        # A class that no image has adds nothing: p log p -> 0.
        log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(np.exp(np.sum(p * (log_p - log_marginal), axis=1).mean()))
    return Value(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    reference: np.ndarray,
    samples: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Value:
    """Kernel distance KID (Bińkowski et al. 2018), mean and deviation over random subsets.

    Each is the unbiased squared maximum mean discrepancy of `subset_size` rows of `reference` and
    of `samples` [N, D], drawn without replacement, under the cubic kernel (xy / D + 1)^3. Fewer
    rows than that: subsets of the smaller set's size. `ValueError` if that is under 2.
    """
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise ValueError("the kernel distance needs at least 2 images on either side")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = reference[rng.choice(len(reference), size, replace=False)]
        y = samples[rng.choice(len(samples), size, replace=False)]
        values.append(_unbiased_mmd2(x, y))
    return Value(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy of rows [n, D] each; a row never meets itself."""
    n = len(x)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a @ b.T).astype(np.float64) / a.shape[1] + 1.0) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2.0 * kernel(x, y).mean()


def bootstrap_interval(
    estimate: Callable[[np.ndarray], float],
    count: int,
    *,
    repeats: int,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a metric by drawing its `count` points anew (Efron 1979).

    `estimate` takes row indices int64 [count] and returns the metric of these rows. The interval
    is t - (upper, lower quantile of d - mean d), with t the metric of all rows and d those of
    rows drawn with replacement. Distances between distributions grow when rows come twice, hence
    the mean: the interval is about t, the figure one gets from `count` rows.
    """
    rng = np.random.default_rng(seed)
    whole = estimate(np.arange(count))
    drawn = np.array([estimate(rng.integers(0, count, count)) for _ in range(repeats)])
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(drawn - drawn.mean(), [tail, 1.0 - tail])
    return float(whole - high), float(whole - low)
