"""Every metric of one pair of feature sets: the table of metrics, and what they share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluations import metrics
from evaluations.features import Features
from evaluations.metrics import Value

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # the papers' choices
Estimate = Callable[[np.ndarray], float]  # the metric of the sample rows int64 [n] that it is given


class Scorer:
    """Metrics of `samples` against `reference`; what several metrics share is computed once."""

    def __init__(
        self,
        reference: Features,
        samples: Features,
        softmax_weights: np.ndarray,
        *,
        neighbour_arithmetic: str,
        kid_subsets: int,
        kid_subset_size: int,
        seed: int,
    ):
        self.reference, self.samples, self.weights = reference, samples, softmax_weights
        self._arithmetic = neighbour_arithmetic
        self._kid_subsets, self._kid_subset_size = kid_subsets, kid_subset_size
        self._seed = seed

    def value(self, name: str) -> Value:
        """The metric `name` of all images."""
        return METRICS[name].value(self)

    def replicates(self, name: str, groups: int) -> np.ndarray | None:
        """The metric of all samples and without each group (see `metrics.jackknife_replicates`).

        None where they tell no error. The reference, its statistics and its radii stay as they are.
        """
        metric, count = METRICS[name], len(self.samples.pool)
        if metric.resampled is None or count < 3:
            return None
        if metric.gaussian is not None and not self.value(name).value > 0:  # a set against itself
            return None
        estimate = metric.resampled(self)
        return metrics.jackknife_replicates(estimate, count, groups=groups, seed=self._seed)

    def frechet(self, which: str) -> Value:
        gaussians = (getattr(one, f"{which}_gaussian") for one in (self.reference, self.samples))
        return Value(metrics.frechet_distance(*gaussians))

    def frechet_of_rows(self, which: str) -> Estimate:
        reference = getattr(self.reference, f"{which}_gaussian")
        features = getattr(self.samples, which)
        return lambda rows: metrics.frechet_distance(reference, metrics.gaussian_of(features[rows]))

    def kernel_distance(self) -> Value:
        pools = self.reference.pool, self.samples.pool
        return metrics.kernel_distance(*pools, self._kid_subsets, self._kid_subset_size, self._seed)

    @functools.cached_property
    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        pools = self.reference.pool, self.samples.pool
        return metrics.precision_recall(*pools, PRECISION_NEIGHBOURS, self._arithmetic)

    @functools.cached_property
    def density_coverage(self) -> tuple[np.ndarray, np.ndarray]:
        pools = self.reference.pool, self.samples.pool
        return metrics.density_coverage(*pools, DENSITY_NEIGHBOURS)


def _mean(points: np.ndarray) -> Value:
    return Value(float(points.mean()))


def _mean_of_rows(points: np.ndarray) -> Estimate:
    return lambda rows: float(points[rows].mean())


@dataclass(frozen=True)
class Metric:
    """One metric: adding one is adding an entry to `METRICS`.

    published: its name with the 2015 Inception network. other, key: its name and JSON key with
    another graph. fewest: images on either side for which it is defined. value: of a `Scorer`.
    needs_images: whether the reference's images are needed, not only its statistics. gaussian: the
    Gaussian that it compares, if it does. resampled: the metric as a function of sample rows, from
    which its interval comes; None for those whose error leaving out samples does not tell: recall
    and coverage are shares of the reference's points, the Inception score is too skewed (intervals
    cover 84 % where it is near 1), and KID has its deviation over subsets.
    """

    published: str
    other: str
    key: str
    fewest: int
    value: Callable[[Scorer], Value]
    resampled: Callable[[Scorer], Estimate] | None = None
    needs_images: bool = False
    gaussian: str | None = None


METRICS = {
    "inception_score": Metric(
        "Inception Score",
        "Classifier score",
        "classifier_score",
        fewest=1,
        value=lambda s: metrics.inception_score(s.samples.pool, s.weights),
    ),
    "fid": Metric(
        "FID",
        "Frechet distance",
        "frechet_distance",
        fewest=2,
        value=lambda s: s.frechet("pool"),
        resampled=lambda s: s.frechet_of_rows("pool"),
        gaussian="pool_gaussian",
    ),
    "sfid": Metric(
        "sFID",
        "Spatial Frechet distance",
        "spatial_frechet_distance",
        fewest=2,
        value=lambda s: s.frechet("spatial"),
        resampled=lambda s: s.frechet_of_rows("spatial"),
        gaussian="spatial_gaussian",
    ),
    "precision": Metric(
        "Precision",
        "Precision",
        "precision",
        fewest=PRECISION_NEIGHBOURS + 1,
        value=lambda s: _mean(s.precision_recall[0]),
        resampled=lambda s: _mean_of_rows(s.precision_recall[0]),
        needs_images=True,
    ),
    "recall": Metric(
        "Recall",
        "Recall",
        "recall",
        fewest=PRECISION_NEIGHBOURS + 1,
        value=lambda s: _mean(s.precision_recall[1]),
        needs_images=True,
    ),
    "kid": Metric(
        "KID",
        "Kernel distance",
        "kernel_distance",
        fewest=2,
        value=Scorer.kernel_distance,
        needs_images=True,
    ),
    "density": Metric(
        "Density",
        "Density",
        "density",
        fewest=DENSITY_NEIGHBOURS + 1,
        value=lambda s: _mean(s.density_coverage[0]),
        resampled=lambda s: _mean_of_rows(s.density_coverage[0]),
        needs_images=True,
    ),
    "coverage": Metric(
        "Coverage",
        "Coverage",
        "coverage",
        fewest=DENSITY_NEIGHBOURS + 1,
        value=lambda s: _mean(s.density_coverage[1]),
        needs_images=True,
    ),
}
PUBLISHED_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")
ALL_METRICS = tuple(METRICS)
