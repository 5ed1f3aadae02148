"""The metrics: pure functions of features (no images, no files, no network).

The distance of Gaussians is in `moments`, what counts neighbours in `neighbours`; both are offered
here as well, so that this module has every metric.
"""

import contextlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, stdtrit

from evaluations.moments import Gaussian, RunningMoments, frechet_distance, gaussian_of
from evaluations.neighbours import density_coverage, neighbour_radii, precision_recall

__all__ = [
    "Gaussian",
    "RunningMoments",
    "Value",
    "density_coverage",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "interval_of_replicates",
    "jackknife_interval",
    "jackknife_replicates",
    "kernel_distance",
    "neighbour_radii",
    "precision_recall",
]

INCEPTION_SPLIT = 5000  # images a block of the published Inception score
_AT_ONCE = 4  # replicates: 300 MB each with Inception features
_KERNEL_ROWS = 1024  # of pairs at a time, which bounds the memory of a kernel's sum


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
    of `samples` [N, D], drawn without replacement, under the cubic kernel (xy / D + 1)^3.

    A set of no more rows than that has only one such subset: the value is then that of all rows
    of both sets. The deviation is None there and wherever a set has less than twice `subset_size`
    rows: subsets that share most of their rows differ by less than independent ones would.
    `ValueError` if either side has fewer than 2 rows.
    """
    fewest = min(len(reference), len(samples))
    if fewest < 2:
        raise ValueError("the kernel distance needs at least 2 images on either side")
    if fewest <= subset_size:
        return Value(_unbiased_mmd2(reference, samples))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = reference[rng.choice(len(reference), subset_size, replace=False)]
        y = samples[rng.choice(len(samples), subset_size, replace=False)]
        values.append(_unbiased_mmd2(x, y))
    means_something = fewest >= 2 * subset_size and subsets > 1
    return Value(float(np.mean(values)), float(np.std(values)) if means_something else None)


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy of rows [n, D] and [m, D]; a row never meets itself."""

    def within(a: np.ndarray) -> float:
        own = (np.einsum("nd,nd->n", a, a, dtype=np.float64) / a.shape[1] + 1.0) ** 3
        return (_kernel_sum(a, a) - own.sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2.0 * _kernel_sum(x, y) / (len(x) * len(y)))


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    """The cubic kernel summed over all pairs of rows, a block of them at a time."""
    total = 0.0
    for start in range(0, len(a), _KERNEL_ROWS):
        products = (a[start : start + _KERNEL_ROWS] @ b.T).astype(np.float64)
        total += ((products / a.shape[1] + 1.0) ** 3).sum()
    return total


def jackknife_interval(
    estimate: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: int,
    logarithmic: bool = False,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a metric from leaving out groups of its rows (Tukey 1958).

    `estimate` takes row indices int64 and returns the metric of these rows. With t the metric of
    all `count` rows and t_j that without group j of g, the variance is (g - 1) / g times the sum
    of (t_j - mean)^2 and the interval t plus and minus Student's quantile of g - 1 degrees times
    its root. It is about the figure that one gets on average from `count` rows. `logarithmic`:
    all that is done to the logarithm, for positive metrics whose spread grows with their value.

    Rows are never drawn twice, as the bootstrap does: distances between distributions grow with
    repeated rows, which makes its intervals too wide.
    """
    replicates = jackknife_replicates(estimate, count, groups=groups, seed=seed)
    return interval_of_replicates(replicates, logarithmic=logarithmic, level=level)


def jackknife_replicates(
    estimate: Callable[[np.ndarray], float], count: int, *, groups: int, seed: int = 0
) -> np.ndarray:
    """The metric of all rows, then that without each of the groups: float64 [1 + g].

    The groups are the same for the same `count`, `groups` and `seed`: replicates of two sets with
    common indices belong together one by one, and their difference has an interval of its own.
    """
    groups = min(groups, count)
    order = np.random.default_rng(seed).permutation(count)
    bounds = np.linspace(0, count, groups + 1).astype(int)
    whole = estimate(np.arange(count))  # first: what the others share is computed with it

    def without(bound: tuple[int, int]) -> float:
        return estimate(np.sort(np.delete(order, slice(*bound))))

    with _one_blas_thread(), ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        return np.array([whole, *pool.map(without, itertools.pairwise(bounds))])


def _one_blas_thread() -> contextlib.AbstractContextManager:
    """BLAS computes in the thread that calls it.

    Its own threads wait for each other after every small step of a decomposition, by spinning:
    where other programs have the cores, that takes up to 40 times as long as one thread.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def interval_of_replicates(
    replicates: np.ndarray, *, logarithmic: bool = False, level: float = 0.95
) -> tuple[float, float]:
    """The interval that `jackknife_interval` tells of, from the replicates, float [1 + g]."""
    scale, back = (np.log, np.exp) if logarithmic else (np.asarray, float)
    whole, without = scale(replicates[0]), scale(replicates[1:])
    groups = len(without)
    deviation = np.sqrt((groups - 1) * np.var(without))
    half_width = float(stdtrit(groups - 1, (1.0 + level) / 2.0) * deviation)
    return float(back(whole - half_width)), float(back(whole + half_width))
