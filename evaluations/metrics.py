"""The metrics: pure functions of features (no images, no files, no network).

The distance of Gaussians is in `moments`, what counts neighbours in `neighbours`; both are offered
here as well, so that this module has every metric.
"""

import contextlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy

from esddpm_io.errors import listed
from esddpm_io.processes import available_cores
from evaluations.moments import Gaussian, RunningMoments, frechet_distance, gaussian_of
from evaluations.neighbours import density_coverage, nearest, neighbour_radii, precision_recall

__all__ = [
    "Gaussian",
    "Memorization",
    "RunningMoments",
    "Value",
    "density_coverage",
    "frechet_distance",
    "frechet_distance_extrapolated",
    "frechet_distance_per_class",
    "gaussian_kernel_distance",
    "gaussian_of",
    "inception_score",
    "interval_of_replicates",
    "jackknife_interval",
    "jackknife_replicates",
    "kernel_distance",
    "memorization",
    "neighbour_radii",
    "precision_recall",
]

INCEPTION_SPLIT = 5000  # images a block of the published Inception score
_AT_ONCE = 4  # replicates: 300 MB each with Inception features
_KERNEL_ROWS = 1024  # of either side at a time: a kernel's sum takes some 40 MB
# Of Chong and Forsyth: 15 sets of samples, from 5,000 up (fewer where there are not twice as many)
EXTRAPOLATION_SIZES, EXTRAPOLATION_SMALLEST = 15, 5000
CLASS_FEWEST = 2  # images of a class on either side, for a covariance
RBF_SIGMA, RBF_SCALE = 10.0, 1000.0  # of Jayasumana et al.
MEMORIZED_QUANTILE = 0.01  # of held-out images as many pass for copies
_DUPLICATE = 0.01  # of the typical distance: rounding alone makes as much of equal images
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # rows [n, D], [m, D] -> float64 [n, m]


@dataclass(frozen=True)
class Value:
    """A metric's value and, for those taken over splits or subsets, their standard deviation.

    notes: what a reader of the value must know, as warnings.
    """

    value: float
    deviation: float | None = None
    notes: tuple[str, ...] = ()


def inception_score(
    pool: np.ndarray, softmax_weights: np.ndarray, split: int = INCEPTION_SPLIT
) -> Value:
    """Inception score (Salimans et al. 2016), mean and deviation over blocks of `split` images.

    exp(mean over images of KL(p(y|x) || p(y))) for each block, where p(y|x) is the softmax of
    pool features [N, P] times `softmax_weights` [P, classes] (no bias) and p(y) its block's mean.
    """
    scores = []
    for start in range(0, len(pool), split):
        log_p = scipy.special.log_softmax(
            (pool[start : start + split] @ softmax_weights).astype(float), axis=1
        )
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
        return (_kernel_sum(a, a, _cubic) - own.sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2.0 * _kernel_sum(x, y, _cubic) / (len(x) * len(y)))


def gaussian_kernel_distance(reference: np.ndarray, samples: np.ndarray) -> Value:
    """Squared maximum mean discrepancy of all rows [N, D] under exp(-|x - y|^2 / (2 sigma^2)).

    With CMMD's sigma of 10 and factor of 1000 (Jayasumana et al. 2024), and like it the biased
    estimate, where rows meet themselves. It is CMMD only of CLIP's embeddings, of length 1.
    """
    centre = reference.mean(axis=0)  # moves no distance, and spares digits to |x|^2 - 2xy + |y|^2

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _gaussian_kernel(a - centre, b - centre)

    within = sum(_kernel_sum(a, a, kernel) / len(a) ** 2 for a in (reference, samples))
    across = _kernel_sum(reference, samples, kernel) / (len(reference) * len(samples))
    return Value(RBF_SCALE * float(within - 2.0 * across))


def _kernel_sum(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> float:
    """A kernel summed over all pairs of rows, a block of them at a time."""
    blocks = [
        [rows[start : start + _KERNEL_ROWS] for start in range(0, len(rows), _KERNEL_ROWS)]
        for rows in (a, b)
    ]
    return sum(kernel(*pair).sum() for pair in itertools.product(*blocks))


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a @ b.T).astype(np.float64) / a.shape[1] + 1.0) ** 3


def _gaussian_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = (np.einsum("nd,nd->n", rows, rows, dtype=np.float64) for rows in (a, b))
    squared = np.add.outer(*norms) - 2.0 * (a @ b.T)
    return np.exp(np.maximum(squared, 0.0) / (-2.0 * RBF_SIGMA**2))


def frechet_distance_extrapolated(reference: Gaussian, samples: np.ndarray, seed: int = 0) -> Value:
    """The Fréchet distance of infinitely many samples, FID infinity (Chong and Forsyth 2020).

    A line through the distances of `EXTRAPOLATION_SIZES` random sets of n rows of `samples`
    [N, D] against 1/n, and its value at 0. The n are spaced evenly from `EXTRAPOLATION_SMALLEST`
    (N / 2 if that is less) to N. The line is straight where n is several times D.
    """
    count = len(samples)
    smallest = min(EXTRAPOLATION_SMALLEST, count // 2)
    sizes = np.unique(np.linspace(smallest, count, EXTRAPOLATION_SIZES).astype(int))
    rng = np.random.default_rng(seed)
    drawn = (samples[rng.permutation(count)[:size]] for size in sizes)
    distances = [frechet_distance(reference, gaussian_of(rows)) for rows in drawn]
    _, limit = np.polyfit(1.0 / sizes, distances, 1)
    notes = ()
    if smallest <= samples.shape[1]:
        notes = (
            f"the distance of infinitely many is extrapolated from {smallest} and more images, too "
            f"few for {samples.shape[1]}-dimensional features",
        )
    return Value(float(limit), notes=notes)


def common_classes(
    reference_labels: np.ndarray, sample_labels: np.ndarray
) -> tuple[list[int], list[int]]:
    """The classes with `CLASS_FEWEST` images or more on either side, and the others, in order.

    Labels are int64 [N] and [M]. `ValueError` if no class has enough.
    """
    counts = [
        dict(zip(*np.unique(labels, return_counts=True), strict=True))
        for labels in (reference_labels, sample_labels)
    ]
    enough, few = [], []
    for label in sorted(counts[0].keys() | counts[1].keys()):
        fewest = min(own.get(label, 0) for own in counts)
        (few if fewest < CLASS_FEWEST else enough).append(int(label))
    if not enough:
        raise ValueError(f"no class has {CLASS_FEWEST} images among reference and samples")
    return enough, few


def frechet_distance_per_class(
    reference: np.ndarray,
    reference_labels: np.ndarray,
    samples: np.ndarray,
    sample_labels: np.ndarray,
) -> Value:
    """The Fréchet distance of each class, its mean and deviation over the classes.

    Features [N, D] and labels int64 [N] of either side. Classes of fewer than `CLASS_FEWEST`
    images on a side are left out and named in the notes, and so are classes whose covariances are
    singular counted. `ValueError` if no class has enough.
    """
    classes, few = common_classes(reference_labels, sample_labels)
    sides = (reference, reference_labels), (samples, sample_labels)
    found, singular = [], 0
    for label in classes:
        gaussians = [gaussian_of(features[own == label]) for features, own in sides]
        singular += any(one.too_few() for one in gaussians)
        found.append(frechet_distance(*gaussians))
    notes = []
    if few:
        names = listed([str(label) for label in few])
        notes.append(f"classes with fewer than {CLASS_FEWEST} images, left out: {names}")
    if singular:
        notes.append(
            f"{singular} of {len(found)} classes have no more images than features: their "
            "distances come out too high"
        )
    return Value(float(np.mean(found)), float(np.std(found)), tuple(notes))


@dataclass(frozen=True)
class Memorization:
    """How near samples are to the reference: its row next to each, int64 [N], and the distances.

    distances float32 [N]. limit: what a distance must be below to pass for a copy. typical: the
    median distance of the reference's rows to their nearest other.
    """

    nearest: np.ndarray
    distances: np.ndarray
    limit: float
    typical: float

    @property
    def share(self) -> Value:
        notes = ()
        if self.limit <= _DUPLICATE * self.typical:
            notes = (
                "so many of the reference's images are there twice that the limit of memorization "
                f"is {self.limit:.2g}: no copy can be told; leave duplicates out of the reference",
            )
        return Value(float(np.mean(self.distances < self.limit)), notes=notes)

    def most_suspicious(self, count: int) -> list[tuple[int, int, float]]:
        """Sample, row of the reference and distance of the nearest pairs, from near to far."""
        rows = np.argsort(self.distances, kind="stable")[:count]
        return [(int(i), int(self.nearest[i]), float(self.distances[i])) for i in rows]


def memorization(reference: np.ndarray, samples: np.ndarray) -> Memorization:
    """Samples [N, D] that are nearer to a row of `reference` than its rows are to each other.

    The limit is the `MEMORIZED_QUANTILE` of the distances of the reference's rows to their nearest
    other row: of new images from the same distribution about that share lies within it, and a
    higher share means copies. With fewer than 2 rows of the reference `ValueError`.
    """
    own = np.sqrt(neighbour_radii(reference, 1, "float32"))
    rows, distances = nearest(reference, samples, 1)
    limit, typical = map(float, np.quantile(own, [MEMORIZED_QUANTILE, 0.5]))
    return Memorization(rows[:, 0], distances[:, 0], limit, typical)


def jackknife_interval(
    estimate: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: int,
    logarithmic: bool = False,
) -> tuple[float, float]:
    """95 % confidence interval of a metric from leaving out groups of its rows (Tukey 1958).

    `estimate` takes row indices int64 and returns the metric of these rows. With t the metric of
    all `count` rows and t_j that without group j of g, the variance is (g - 1) / g times the sum
    of (t_j - mean)^2 and the interval t plus and minus Student's quantile of g - 1 degrees times
    its root. It is about the figure that one gets on average from `count` rows. `logarithmic`:
    all that is done to the logarithm, for positive metrics whose spread grows with their value.

    Rows are never drawn twice, as the bootstrap does: distances between distributions grow with
    repeated rows, which makes its intervals too wide.
    """
    replicates = jackknife_replicates(estimate, count, groups=groups)
    return interval_of_replicates(replicates, logarithmic=logarithmic)


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

    with _one_blas_thread(), ThreadPoolExecutor(min(_AT_ONCE, available_cores())) as pool:
        return np.array([whole, *pool.map(without, itertools.pairwise(bounds))])


def _one_blas_thread() -> contextlib.AbstractContextManager:
    """BLAS computes in the thread that calls it.

    Its own threads wait for each other after every small step of a decomposition, by spinning:
    where other programs have the cores, that takes up to 40 times as long as one thread.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def interval_of_replicates(
    replicates: np.ndarray, *, logarithmic: bool = False
) -> tuple[float, float]:
    """The interval that `jackknife_interval` tells of, from the replicates, float [1 + g]."""
    scale, back = (np.log, np.exp) if logarithmic else (np.asarray, float)
    whole, without = scale(replicates[0]), scale(replicates[1:])
    groups = len(without)
    deviation = np.sqrt((groups - 1) * np.var(without))
    half_width = float(scipy.special.stdtrit(groups - 1, 0.975) * deviation)
    return float(back(whole - half_width)), float(back(whole + half_width))
