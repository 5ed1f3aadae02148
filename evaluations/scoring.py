"""Every metric of one pair of feature sets: the table of metrics, and what they share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esddpm_io.errors import UserError
from evaluations import metrics
from evaluations.features import Features
from evaluations.metrics import Memorization, Value

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # the papers' choices
Estimate = Callable[[np.ndarray], float]  # the metric of the sample rows int64 [n] that it is given


class Scorer:
    """Metrics of `samples` against `reference`; what several metrics share is computed once."""

    def __init__(
        self,
        reference: Features,
        samples: Features,
        softmax_weights: np.ndarray | None,
        labels: tuple[np.ndarray, np.ndarray] | None = None,
        *,
        neighbour_arithmetic: str,
        kid_subsets: int,
        kid_subset_size: int,
        seed: int,
    ):
        self.reference, self.samples, self.weights = reference, samples, softmax_weights
        self._labels = labels
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
        if metric.resampled is None or metric.no_interval(self) is not None:
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

    def frechet_extrapolated(self) -> Value:
        reference = self.reference.pool_gaussian
        return metrics.frechet_distance_extrapolated(reference, self.samples.pool, self._seed)

    def frechet_per_class(self) -> Value:
        reference, samples = self._labels
        pools = self.reference.pool, self.samples.pool
        return metrics.frechet_distance_per_class(pools[0], reference, pools[1], samples)

    @functools.cached_property
    def memorization(self) -> Memorization:
        return metrics.memorization(self.reference.pool, self.samples.pool)

    @functools.cached_property
    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        pools = self.reference.pool, self.samples.pool
        return metrics.precision_recall(*pools, PRECISION_NEIGHBOURS, self._arithmetic)

    @functools.cached_property
    def density_coverage(self) -> tuple[np.ndarray, np.ndarray]:
        pools = self.reference.pool, self.samples.pool
        return metrics.density_coverage(*pools, DENSITY_NEIGHBOURS)


def _too_few_for(which: str, fewest: int) -> Callable[[Scorer], str | None]:
    """An interval takes `fewest` samples, two a feature too: of fewer it is up to twice as wide."""

    def no_interval(scorer: Scorer) -> str | None:
        gaussian = getattr(scorer.samples, f"{which}_gaussian")
        needed = max(fewest, 2 * gaussian.dimensions)
        return f"it takes {needed} samples" if gaussian.count < needed else None

    return no_interval


def _too_near_a_bound(scorer: Scorer) -> str | None:
    inside = scorer.precision_recall[0]
    fewer = min(inside.sum(), (~inside).sum())
    return "it takes 10 samples inside and 10 outside" if fewer < 10 else None


def _mean(points: np.ndarray) -> Value:
    return Value(float(points.mean()))


def _mean_of_rows(points: np.ndarray) -> Estimate:
    return lambda rows: float(points[rows].mean())


@dataclass(frozen=True)
class Metric:
    """One metric: adding one is adding an entry to `METRICS`.

    published: its name with the 2015 Inception network. other, key: its name and JSON key with
    another graph. fewest: images on either side for which it is defined. value: of a `Scorer`.
    needs: beside the Gaussian of pool features, `images` of the reference, `labels` of both sides,
    `spatial` features, or the `classifier` of the network. gaussian: the Gaussian that it
    compares, if it does. resampled: the metric as a function of sample rows, from which its
    interval comes; None for those whose error leaving out samples does not tell: recall and
    coverage are shares of the reference's points, the Inception score is too skewed (intervals
    cover 84 % where it is near 1), and KID has its deviation over subsets. no_interval: why there
    is none for these samples, or None; of 500 with the worst tails sFID's covers less than 93 %
    (`benchmarks/interval_coverage.py`), of shares next to 0 or 1 the jackknife sees no spread.
    """

    published: str
    other: str
    key: str
    fewest: int
    value: Callable[[Scorer], Value]
    resampled: Callable[[Scorer], Estimate] | None = None
    no_interval: Callable[[Scorer], str | None] = lambda scorer: None
    needs: tuple[str, ...] = ()
    gaussian: str | None = None


METRICS = {
    "inception_score": Metric(
        "Inception Score",
        "Classifier score",
        "classifier_score",
        fewest=1,
        value=lambda s: metrics.inception_score(s.samples.pool, s.weights),
        needs=("classifier",),
    ),
    "fid": Metric(
        "FID",
        "Frechet distance",
        "frechet_distance",
        fewest=2,
        value=lambda s: s.frechet("pool"),
        resampled=lambda s: s.frechet_of_rows("pool"),
        no_interval=_too_few_for("pool", 3),
        gaussian="pool_gaussian",
    ),
    "sfid": Metric(
        "sFID",
        "Spatial Frechet distance",
        "spatial_frechet_distance",
        fewest=2,
        value=lambda s: s.frechet("spatial"),
        resampled=lambda s: s.frechet_of_rows("spatial"),
        no_interval=_too_few_for("spatial", 1000),
        needs=("spatial",),
        gaussian="spatial_gaussian",
    ),
    "precision": Metric(
        "Precision",
        "Precision",
        "precision",
        fewest=PRECISION_NEIGHBOURS + 1,
        value=lambda s: _mean(s.precision_recall[0]),
        resampled=lambda s: _mean_of_rows(s.precision_recall[0]),
        no_interval=_too_near_a_bound,
        needs=("images",),
    ),
    "recall": Metric(
        "Recall",
        "Recall",
        "recall",
        fewest=PRECISION_NEIGHBOURS + 1,
        value=lambda s: _mean(s.precision_recall[1]),
        needs=("images",),
    ),
    "kid": Metric(
        "KID",
        "Kernel distance",
        "kernel_distance",
        fewest=2,
        value=Scorer.kernel_distance,
        needs=("images",),
    ),
    "density": Metric(
        "Density",
        "Density",
        "density",
        fewest=DENSITY_NEIGHBOURS + 1,
        value=lambda s: _mean(s.density_coverage[0]),
        resampled=lambda s: _mean_of_rows(s.density_coverage[0]),
        needs=("images",),
    ),
    "coverage": Metric(
        "Coverage",
        "Coverage",
        "coverage",
        fewest=DENSITY_NEIGHBOURS + 1,
        value=lambda s: _mean(s.density_coverage[1]),
        needs=("images",),
    ),
    "fid_infinity": Metric(
        "FID infinity",
        "Frechet distance infinity",
        "frechet_distance_infinity",
        fewest=4,
        value=Scorer.frechet_extrapolated,
    ),
    "fid_per_class": Metric(
        "FID per class",
        "Frechet distance per class",
        "frechet_distance_per_class",
        fewest=metrics.CLASS_FEWEST,
        value=Scorer.frechet_per_class,
        needs=("images", "labels"),
    ),
    "rbf_mmd": Metric(
        "RBF MMD of Inception features",
        "RBF MMD",
        "rbf_mmd",
        fewest=2,
        value=lambda s: metrics.gaussian_kernel_distance(s.reference.pool, s.samples.pool),
        needs=("images",),
    ),
    "memorization": Metric(
        "Memorization",
        "Memorization",
        "memorization",
        fewest=2,
        value=lambda s: s.memorization.share,
        needs=("images",),
    ),
}
PUBLISHED_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")


def chosen_metrics(asked: tuple[str, ...], lacking: dict[str, str]) -> tuple[str, ...]:
    """The names of the metrics to compute: those asked for, with `all` and `published` spelt out.

    lacking: those of the `needs` that network and files do not meet, and why. `all` and `published`
    leave out what needs them; `UserError` for such a metric that was asked for by its name.
    """
    possible = [name for name, metric in METRICS.items() if not lacking.keys() & set(metric.needs)]
    groups = {"all": possible, "published": [n for n in PUBLISHED_METRICS if n in possible]}
    for name in asked:
        if name not in (*groups, *possible):
            why = next(lacking[need] for need in METRICS[name].needs if need in lacking)
            raise UserError(f"--metrics {name}: {why}: choose from {', '.join(possible)}")
    return tuple(dict.fromkeys(one for name in asked for one in groups.get(name, [name])))
