"""Every metric of one pair of feature sets, by its name, with its confidence interval."""

import functools
from collections.abc import Callable

import numpy as np

from evaluations import metrics
from evaluations.features import Features
from evaluations.metrics import Value
from evaluations.settings import Settings

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # the papers' choices


class Scorer:
    """Metrics of `samples` against `reference`; what several metrics share is computed once."""

    def __init__(
        self,
        reference: Features,
        samples: Features,
        softmax_weights: np.ndarray,
        settings: Settings,
    ):
        self._reference, self._samples = reference, samples
        self._weights, self._settings = softmax_weights, settings

    def value(self, name: str) -> Value:
        """The metric `name` of all images."""
        if name == "inception_score":
            return metrics.inception_score(self._samples.pool, self._weights)
        if name == "fid":
            return Value(self._frechet("pool_gaussian", self._samples.pool_gaussian))
        if name == "sfid":
            return Value(self._frechet("spatial_gaussian", self._samples.spatial_gaussian))
        if name == "kid":
            return metrics.kernel_distance(
                self._reference.pool,
                self._samples.pool,
                self._settings.kid_subsets,
                self._settings.kid_subset_size,
                self._settings.seed,
            )
        return Value(float(self._points(name).mean()))

    def interval(self, name: str) -> tuple[float, float] | None:
        """Its 95 % interval from the bootstrap, or None where that does not apply.

        Samples are drawn anew, except for recall and coverage, which are shares of the reference
        points; the reference's statistics and all neighbours' radii stay as they are. Not for the
        kernel distance: it is only unbiased if no image meets itself, and it has its deviation
        over subsets.
        """
        if name == "kid":
            return None
        estimate, count = self._estimator(name)
        return metrics.bootstrap_interval(
            estimate, count, repeats=self._settings.bootstrap, seed=self._settings.seed
        )

    def _estimator(self, name: str) -> tuple[Callable[[np.ndarray], float], int]:
        """The metric as a function of the rows drawn, and the number of rows there are."""
        pool, spatial = self._samples.pool, self._samples.spatial
        if name == "inception_score":
            return lambda rows: metrics.inception_score(pool[rows], self._weights).value, len(pool)
        if name == "fid":
            return lambda rows: self._frechet("pool_gaussian", pool[rows]), len(pool)
        if name == "sfid":
            return lambda rows: self._frechet("spatial_gaussian", spatial[rows]), len(spatial)
        points = self._points(name)
        return lambda rows: float(points[rows].mean()), len(points)

    def _frechet(self, which: str, samples: metrics.Gaussian | np.ndarray) -> float:
        if isinstance(samples, np.ndarray):
            samples = metrics.gaussian_of(samples)
        return metrics.frechet_distance(getattr(self._reference, which), samples)

    def _points(self, name: str) -> np.ndarray:
        """The share of each point in a metric that is a mean over points."""
        if name in ("precision", "recall"):
            return self._precision_recall[name == "recall"]
        return self._density_coverage[name == "coverage"]

    @functools.cached_property
    def _precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        return metrics.precision_recall(
            self._reference.pool,
            self._samples.pool,
            PRECISION_NEIGHBOURS,
            self._settings.neighbour_arithmetic,
        )

    @functools.cached_property
    def _density_coverage(self) -> tuple[np.ndarray, np.ndarray]:
        return metrics.density_coverage(
            self._reference.pool, self._samples.pool, DENSITY_NEIGHBOURS
        )
