"""The evaluation as a library call: `from evaluations import evaluate`."""

import dataclasses
import os
from dataclasses import dataclass, field

import numpy as np

from esddpm_io.errors import UserError
from evaluations.features import Engine, Features, choose_engine, extract, load_graph
from evaluations.inputs import FeatureCache, Images, ImageSet, open_set
from evaluations.metrics import Value
from evaluations.neighbours import ARITHMETICS
from evaluations.scoring import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, Scorer

PUBLISHED_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")
ALL_METRICS = (*PUBLISHED_METRICS, "kid", "density", "coverage")
_NEED_REFERENCE_POOL = {"precision", "recall", "kid", "density", "coverage"}
# Fewest images on either side for which a metric is defined
_FEWEST = {
    "inception_score": 1,
    "fid": 2,
    "sfid": 2,
    "precision": PRECISION_NEIGHBOURS + 1,
    "recall": PRECISION_NEIGHBOURS + 1,
    "kid": 2,
    "density": DENSITY_NEIGHBOURS + 1,
    "coverage": DENSITY_NEIGHBOURS + 1,
}


@dataclass(frozen=True)
class Settings:
    """Everything but the images that decides the figures.

    metrics: of `ALL_METRICS`. neighbour_arithmetic: `float16`, the published rounding of distances
    for precision and recall, or `float32`. bootstrap: repeats for 95 % confidence intervals, 0 for
    none. allow_mixed_precision: let features of another precision meet the reference's statistics.
    """

    inception_path: str | None = None
    backend: str = "auto"
    device: str = "auto"
    precision: str = "float32"
    metrics: tuple[str, ...] = PUBLISHED_METRICS
    neighbour_arithmetic: str = "float16"
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    bootstrap: int = 0
    seed: int = 0
    batch_size: int = 64
    cache_dir: str | None = None
    allow_mixed_precision: bool = False

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in ALL_METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"--metrics {', '.join(unknown) or '(none)'}: choose from {', '.join(ALL_METRICS)}"
            )
        if self.neighbour_arithmetic not in ARITHMETICS:
            raise UserError(
                f"--neighbour_arithmetic {self.neighbour_arithmetic}: choose from "
                f"{', '.join(ARITHMETICS)}"
            )
        for name, least in [("batch_size", 1), ("bootstrap", 0), ("seed", 0), ("kid_subsets", 1)]:
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}")
        if self.kid_subset_size < 2:
            raise UserError(f"--kid_subset_size {self.kid_subset_size}: it must be at least 2")


@dataclass(frozen=True)
class Result:
    """The metrics of one sample batch, `intervals` where bootstrap was asked for."""

    sample: str
    images: int
    metrics: dict[str, Value]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric].value


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: one result for each sample batch, and how they came about."""

    reference: str
    results: tuple[Result, ...]
    settings: Settings
    graph: str
    graph_sha256: str
    is_inception: bool
    backend: str


def evaluate(reference: Images, *samples: Images, **settings) -> Evaluation:
    """Metrics of one or more sample batches against one reference.

    `reference` and `samples` are paths of .npz, .npy or image folders, or uint8 [N, H, W, 3]
    arrays; the keywords are the fields of `Settings`. All inputs are checked before the first
    image goes through the graph, and the features of the reference are computed once.
    `UserError` (a `ValueError`) for anything the caller can put right.
    """
    chosen = Settings(**settings)
    if not samples:
        raise UserError("SAMPLE: give at least one sample batch")
    reference_set = open_set(reference, flag="REF")
    sample_sets = [open_set(sample, flag="SAMPLE") for sample in samples]
    for image_set in (reference_set, *sample_sets):
        _check_count(image_set, chosen.metrics)
        _check_precision(image_set, chosen)
    graph = load_graph(chosen.inception_path)
    engine = choose_engine(graph, chosen.backend, chosen.precision, chosen.device)
    extractor = _Extractor(engine, graph.digest, chosen)
    statistics_do = not _NEED_REFERENCE_POOL.intersection(chosen.metrics)
    reference_features = extractor(reference_set, statistics_do=statistics_do)
    results = []
    for image_set in sample_sets:
        features = extractor(image_set, keep_spatial=chosen.bootstrap > 0)
        results.append(
            _result(image_set, reference_features, features, graph.softmax_weights, chosen)
        )
    return Evaluation(
        reference=reference_set.name,
        results=tuple(results),
        settings=chosen,
        graph=graph.path,
        graph_sha256=graph.digest,
        is_inception=graph.is_inception,
        backend=engine.name,
    )


def _result(
    image_set: ImageSet, reference: Features, samples: Features, weights: np.ndarray, chosen
) -> Result:
    count = len(image_set.source)
    notes = []
    for name, gaussian in (("fid", samples.pool_gaussian), ("sfid", samples.spatial_gaussian)):
        if name in chosen.metrics and gaussian.count and gaussian.count <= gaussian.dimensions:
            notes.append(
                f"{image_set.name}: {count} images for {gaussian.dimensions}-dimensional features: "
                f"the covariance is singular and {name} comes out too high"
            )
    scorer = Scorer(reference, samples, weights, chosen)
    try:
        values = {name: scorer.value(name) for name in chosen.metrics}
        intervals = {name: scorer.interval(name) for name in chosen.metrics if chosen.bootstrap}
    except ValueError as error:
        raise UserError(f"{image_set.name}: {error}") from error
    intervals = {name: interval for name, interval in intervals.items() if interval is not None}
    return Result(image_set.name, count, values, intervals, tuple(notes))


def _check_count(image_set: ImageSet, chosen: tuple[str, ...]) -> None:
    count = len(image_set.source)
    short = [name for name in chosen if count < _FEWEST[name]]
    if short:
        raise UserError(
            f"{image_set.name} has {count} images, {', '.join(short)} need at least "
            f"{max(_FEWEST[name] for name in short)}: add images or choose other --metrics"
        )


def _check_precision(image_set: ImageSet, chosen: Settings) -> None:
    differs = image_set.has_statistics and image_set.precision != chosen.precision
    if differs and not chosen.allow_mixed_precision:
        raise UserError(
            f"--precision {chosen.precision}: the statistics in {image_set.name} were made in "
            f"{image_set.precision}, which moves the Fréchet distance by a percent or more; make a "
            "reference in the same precision, or add --allow_mixed_precision"
        )


class _Extractor:
    """Features of image sets, from the cache where there is one; given statistics stand."""

    def __init__(self, engine: Engine, graph_digest: str, settings: Settings):
        self._engine, self._settings = engine, settings
        self._cache = None
        if settings.cache_dir is not None:
            how = f"{graph_digest} {engine.name} {settings.precision}"
            self._cache = FeatureCache(settings.cache_dir, how)

    def __call__(
        self, image_set: ImageSet, keep_spatial: bool = False, statistics_do: bool = False
    ) -> Features:
        """`statistics_do`: where both Gaussians are given, leave out the images."""
        if statistics_do and image_set.pool_gaussian and image_set.spatial_gaussian:
            none = np.empty((0, image_set.pool_gaussian.dimensions), np.float32)
            return Features(none, image_set.pool_gaussian, image_set.spatial_gaussian)
        features = self._images(image_set, keep_spatial)
        given = {
            name: gaussian
            for name in ("pool_gaussian", "spatial_gaussian")
            if (gaussian := getattr(image_set, name)) is not None
        }
        for name, gaussian in given.items():
            if gaussian.dimensions != getattr(features, name).dimensions:
                raise UserError(
                    f"{image_set.name} has statistics of {gaussian.dimensions}-dimensional "
                    f"features, the graph gives {getattr(features, name).dimensions}: they were "
                    "made with another graph or image size"
                )
        return dataclasses.replace(features, **given)

    def _images(self, image_set: ImageSet, keep_spatial: bool) -> Features:
        if self._cache is None:
            return self._extract(image_set, keep_spatial)
        path = self._cache.path(image_set.source, keep_spatial)
        features = self._cache.load(path)
        if features is None:
            features = self._extract(image_set, keep_spatial)
            self._cache.save(path, features)
        return features

    def _extract(self, image_set: ImageSet, keep_spatial: bool) -> Features:
        return extract(
            self._engine,
            image_set.source,
            name=os.path.basename(image_set.name),
            batch_size=self._settings.batch_size,
            keep_spatial=keep_spatial,
        )
