"""The evaluation as a library call: `from evaluations import evaluate`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from esddpm_io.errors import UserError, listed, speaking_of_arguments
from esddpm_io.files import check_output_folder, short_names
from esddpm_io.launch import ALONE, Launch
from esddpm_io.parts import GrowingImages
from esddpm_io.progress import quiet
from evaluations.devices import device_of_rank, extract_among_ranks, extract_on_devices, stamp_of
from evaluations.features import (
    GRAPH_NAME,
    PUBLISHED,
    Engine,
    Features,
    Network,
    check_engine,
    check_finite,
    choose_engine,
    extract,
    features_of_batch,
    graph_identity,
    load_graph,
    published_graph,
)
from evaluations.graph_file import Graph
from evaluations.inputs import FeatureCache, Images, ImageSet, open_set
from evaluations.metrics import Value, common_classes, interval_of_replicates
from evaluations.moments import Gaussian
from evaluations.neighbours import nearest
from evaluations.network_file import NetworkFile
from evaluations.resizing import PUBLISHED_RESIZE
from evaluations.scoring import METRICS, Scorer, chosen_metrics
from evaluations.settings import Settings

_LOOKED_AT = 64  # images whose values tell 0-1 from 0-255: one bright pixel is enough
_TRIED = 2  # images of each set that are run first
_SUSPICIOUS = 16  # samples nearest to the reference that a result names


@dataclass(frozen=True)
class Result:
    """The metrics of one sample batch; `intervals` and `replicates` where bootstrap was asked for.

    replicates: what the intervals come from, float64 [1 + groups] (see
    `metrics.jackknife_replicates`): those of two batches give the interval of their difference.
    suspicious: with the metric memorization, index of the sample, index of its nearest reference
    image and their distance, for the nearest of these pairs.
    """

    sample: str
    images: int
    metrics: dict[str, Value]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    suspicious: tuple[tuple[int, int, float], ...] = ()

    def __getitem__(self, metric: str) -> float:
        return self.metrics[metric].value


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: one result for each sample batch, and how they came about.

    network: the name of a network that is no frozen graph, as its TOML has it.
    """

    reference: str
    results: tuple[Result, ...]
    settings: Settings
    graph: str
    graph_sha256: str
    identity: str
    backend: str
    network: str | None = None


def evaluate(reference: Images, *samples: Images, **settings) -> Evaluation:
    """Metrics of one or more sample batches against one reference.

    `reference` and `samples` are paths of .npz, .npy or image folders, or uint8 [N, H, W, 3]
    arrays; the keywords are the fields of `Settings`. All inputs are checked, and two images of
    each are tried, before the features of the reference are computed, which is done once. Nothing
    is printed: doubts about the figures are the results' `warnings`. `UserError` (a `ValueError`)
    for anything the caller can put right.
    """
    with quiet(), speaking_of_arguments(REF="reference", SAMPLE="samples"):
        chosen = dataclasses.asdict(Settings.of(settings))
        return run(reference, *samples, tell=lambda warning: None, **chosen)


def run(
    reference: Images,
    *samples: Images,
    tell: Callable[[str], None],
    launch: Launch = ALONE,
    **settings,
) -> Evaluation:
    """`evaluate` with progress on stderr and errors that speak of flags; `tell` gets warnings.

    launch: our place among processes that extract features together, of which we are the first;
    the others call `assist`.
    """
    chosen = Settings.of(settings)
    reference_set, sample_sets, extractor = _prepared(reference, samples, chosen, launch)
    chosen, graph = extractor.settings, extractor.graph
    told = _Warnings(tell)
    about_reference = told(_doubts_about_images(reference_set, reference_set))
    early = [
        [*about_reference, *told(_doubts_about_images(one, reference_set))] for one in sample_sets
    ]
    reference_features = extractor(reference_set, **_asked_of_reference(chosen))
    singular = told(_doubts_about_covariances(reference_set.name, reference_features, chosen))
    results = []
    for image_set, notes in zip(sample_sets, early, strict=True):
        features = extractor(image_set, **_asked_of_samples(chosen))
        notes += singular + told(_doubts_about_covariances(image_set.name, features, chosen))
        scorer = _scorer(graph, chosen, (reference_set, reference_features), (image_set, features))
        results.append(_result(image_set, scorer, chosen, notes, told))
    return Evaluation(
        reference=reference_set.name,
        results=tuple(results),
        settings=chosen,
        graph=graph.path,
        graph_sha256=graph.digest,
        identity=graph_identity(graph),
        backend=extractor.engine.name,
        network=graph.description.name if isinstance(graph, NetworkFile) else None,
    )


def assist(reference: Images, *samples: Images, launch: Launch, **settings) -> None:
    """What a process that is not the first of a launch does for the `run` of that one."""
    chosen = Settings.of(settings)
    reference_set, sample_sets, extractor = _prepared(reference, samples, chosen, launch)
    chosen = extractor.settings
    extractor.assist(reference_set, **_asked_of_reference(chosen))
    for image_set in sample_sets:
        extractor.assist(image_set, **_asked_of_samples(chosen))


def _asked_of_reference(chosen: Settings) -> dict[str, bool]:
    return {"statistics_do": not any("images" in METRICS[name].needs for name in chosen.metrics)}


def _asked_of_samples(chosen: Settings) -> dict[str, bool]:
    return {"keep_spatial": chosen.bootstrap > 0}


def _prepared(
    reference: Images, samples: tuple[Images, ...], chosen: Settings, launch: Launch
) -> tuple[ImageSet, list[ImageSet], "_Extractor"]:
    """All sets, checked, and what gets their features: two images of each have been tried.

    The extractor's settings have the metrics spelt out.
    """
    if not samples:
        raise UserError("SAMPLE: give at least one sample batch")
    check_launch(chosen, launch)
    reference_set = open_set(reference, flag="REF")
    sample_sets = [open_set(sample, flag="SAMPLE", expect=chosen.expect) for sample in samples]
    graph, chosen, image_sets = _checked(chosen, reference_set, *sample_sets)
    _check_not_swapped(reference_set, sample_sets)  # with all statistics, those left aside too
    reference_set, *sample_sets = image_sets
    if launch.rank == 0:  # the others would open every image for what they read soon enough
        for image_set in image_sets:
            image_set.source.check()
    for device in chosen.device_list:
        check_engine("torch", chosen.precision, device)
    backend = "torch" if chosen.devices else chosen.backend
    device = (chosen.device_list or [device_of_rank(chosen.device, backend, launch)])[0]
    engine = choose_engine(graph, backend, chosen.precision, device, chosen.resize)
    names = [image_set.name for image_set in image_sets]
    extractor = _Extractor(engine, graph, chosen, names, launch)
    for image_set in (reference_set, *sample_sets):
        extractor.check(image_set)
    return reference_set, sample_sets, extractor


def check_launch(chosen: Settings, launch: Launch) -> None:
    """`UserError` for what several processes of a launcher cannot do."""
    if launch.world_size == 1:
        return
    among = f"{launch.world_size} processes of {launch.launcher}"
    if chosen.expect is not None:
        raise UserError(f"--expect cannot go with {among}")
    if chosen.devices is not None:
        raise UserError(f"--devices starts processes of its own: leave it out among {among}")
    if chosen.cache_dir is None:
        raise UserError(f"--cache_dir: {among} need one folder that all see, where features meet")
    if chosen.inception_path is None and published_graph() is None:
        raise UserError(
            f"--inception_path: {GRAPH_NAME} is not in the cache, and {among} cannot all download "
            "it: run scripts/download.py first"
        )


def reference_gaussian(reference: Images, graph: Network, engine: Engine) -> Gaussian:
    """The Gaussian of the reference's pool features: as given in it, or of all its images.

    `check_inputs` tells what a reader of figures has to know of it.
    """
    image_set = _with_own_statistics(open_set(reference, flag="REF"), graph)
    if image_set.pool_gaussian is not None:
        return image_set.pool_gaussian
    (name,) = short_names([image_set.name])
    return extract(engine, image_set.source, name=name, keep_pool=False).pool_gaussian


def check_inputs(reference: str, num_samples: int | None = None, **settings) -> tuple[str, ...]:
    """`UserError` for what `evaluate` would refuse before there are samples: `num_samples` of them.

    Returns what it would warn of the reference's statistics.
    Reads headers and the graph, and loads no engine: for callers that have hours of work to do
    before they evaluate.
    """
    chosen = Settings.of(settings)
    _, chosen, [checked] = _checked(chosen, open_set(reference, flag="--ref_batch"))
    check_engine(chosen.backend, chosen.precision, chosen.device)
    if num_samples is not None:
        _check_count("the sample batch", num_samples, chosen.metrics)
    return checked.notes


def nearest_in_reference(
    reference: Images, samples: Images, k: int, **settings
) -> tuple[np.ndarray, np.ndarray]:
    """The k images of a reference next to each sample in pool features, from near to far.

    Inputs and keywords as of `evaluate`. Returns int64 indices and float32 distances, [N, k] both.
    """
    chosen = Settings.of(settings)
    graph = load_graph(chosen.inception_path)
    sets = [
        _with_own_statistics(open_set(images, flag=flag), graph)
        for images, flag in ((reference, "REF"), (samples, "SAMPLE"))
    ]
    engine = choose_engine(graph, chosen.backend, chosen.precision, chosen.device, chosen.resize)
    extractor = _Extractor(engine, graph, chosen, [image_set.name for image_set in sets])
    return nearest(*(extractor(image_set).pool for image_set in sets), k)


def _checked(chosen: Settings, *image_sets: ImageSet) -> tuple[Network, Settings, list[ImageSet]]:
    """The graph, once the sets and it are known to go together, and the metrics that they allow.

    The sets have those of their statistics that are the graph's.
    """
    if chosen.cache_dir is not None:
        check_output_folder(chosen.cache_dir, flag="--cache_dir")
    graph = load_graph(chosen.inception_path)
    graph.check(chosen.backend, chosen.precision, chosen.resize)
    metrics = chosen_metrics(chosen.metrics, _lacking(graph, image_sets))
    own = [_with_own_statistics(image_set, graph) for image_set in image_sets]
    for image_set in own:
        _check_count(image_set.name, len(image_set.source), metrics)
        _check_making(image_set, chosen)
        _check_dimensions(image_set, image_set.pool_gaussian, graph.dimensions)
    return graph, dataclasses.replace(chosen, metrics=metrics), own


def _lacking(graph: Network, image_sets: Sequence[ImageSet]) -> dict[str, str]:
    """What metrics may need that the graph or the sets do not have, and why."""
    outputs = {"spatial": "spatial features", "classifier": "classifier"}
    lacking = {
        need: f"{graph.path} has no {words}"
        for need, words in outputs.items()
        if need not in graph.outputs
    }
    if not all(image_set.source.has_labels for image_set in image_sets):
        lacking["labels"] = "reference or samples have no labels (arr_1)"
    reference, *samples = image_sets
    for one in samples:
        # The labels of sets that grow come with the last images.
        if "labels" not in lacking and not isinstance(one.source, GrowingImages):
            try:
                common_classes(*(s.source.labels(0, len(s.source)) for s in (reference, one)))
            except ValueError as error:
                lacking["labels"] = f"{one.name}: {error}"
        names = reference.source.class_names, one.source.class_names
        if None not in names and (differing := sorted(set(names[0]) ^ set(names[1]))):
            lacking["labels"] = (
                f"{reference.name} and {one.name} have other classes, only one of them has "
                f"{listed(differing)}"
            )
    return lacking


def _with_own_statistics(image_set: ImageSet, graph: Network) -> ImageSet:
    """The set with the statistics that came with it only if they are of `graph`.

    Those of files that do not say are taken for a frozen graph's, as published ones are; that is
    noted unless it is the published graph.
    """
    if not image_set.has_statistics or image_set.network == graph.digest:
        return image_set
    which = f"{image_set.name}: its statistics (mu, sigma)"
    if image_set.network is None and isinstance(graph, Graph):
        note = f"{which} do not say which network they are of: they pass for those of {graph.path}"
        published = graph_identity(graph) == PUBLISHED
        return image_set if published else dataclasses.replace(image_set, notes=(note,))
    note = (
        f"{which} were not made with {graph.path}: those of its {len(image_set.source)} images "
        "are taken"
    )
    return dataclasses.replace(image_set, pool_gaussian=None, spatial_gaussian=None, notes=(note,))


class _Warnings:
    """Tells warnings as soon as they are known, for features may take hours; each of them once."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._told: set[str] = set()

    def __call__(self, notes: list[str]) -> list[str]:
        for note in notes:
            if note not in self._told:
                self._tell(note)
        self._told.update(notes)
        return notes


def _doubts_about_images(image_set: ImageSet, reference: ImageSet) -> list[str]:
    notes = list(image_set.notes)
    count = min(len(image_set.source), _LOOKED_AT)
    if image_set.source.read(0, count).max() <= 1:
        notes.append(
            f"{image_set.name}: no value of the first {count} images is above 1: the range must "
            "be 0-255, not 0-1"
        )
    sizes = [f"{one.source.shape[2]}x{one.source.shape[1]}" for one in (image_set, reference)]
    if sizes[0] != sizes[1]:
        notes.append(
            f"{image_set.name}: images of {sizes[0]} against a reference of {sizes[1]}: what "
            "resizing does to them counts as a difference"
        )
    return notes


def _doubts_about_covariances(name: str, features: Features, chosen: Settings) -> list[str]:
    return [
        f"{name}: {singular}: the covariance is singular and {metric} comes out too high"
        for metric in chosen.metrics
        if (which := METRICS[metric].gaussian) and (singular := getattr(features, which).too_few())
    ]


def _scorer(graph: Network, chosen: Settings, *sides: tuple[ImageSet, Features]) -> Scorer:
    """Of the two sides, reference and samples, with what the chosen metrics need beside."""
    needs = {need for name in chosen.metrics for need in METRICS[name].needs}
    labels = None
    if "labels" in needs:
        sources = (image_set.source for image_set, _ in sides)
        labels = tuple(source.labels(0, len(source)) for source in sources)
    return Scorer(
        *(features for _, features in sides),
        graph.softmax_weights if "classifier" in needs else None,
        labels,
        neighbour_arithmetic=chosen.neighbour_arithmetic,
        kid_subsets=chosen.kid_subsets,
        kid_subset_size=chosen.kid_subset_size,
        seed=chosen.seed,
    )


def _result(
    image_set: ImageSet, scorer: Scorer, chosen: Settings, notes: list[str], told: _Warnings
) -> Result:
    count, groups = len(image_set.source), chosen.bootstrap
    try:
        values = {name: scorer.value(name) for name in chosen.metrics}
        found = {name: scorer.replicates(name, groups) for name in chosen.metrics if groups}
    except ValueError as error:
        raise UserError(f"{image_set.name}: {error}") from error
    replicates = {name: values for name, values in found.items() if values is not None}
    intervals = {
        name: interval_of_replicates(values, logarithmic=METRICS[name].gaussian is not None)
        for name, values in replicates.items()
    }
    of_values = [note for value in values.values() for note in value.notes]
    left_out = [
        f"no interval of {name}: {why}"
        for name in chosen.metrics
        if groups and METRICS[name].resampled and (why := METRICS[name].no_interval(scorer))
    ]
    notes = notes + told([f"{image_set.name}: {note}" for note in of_values]) + told(left_out)
    suspicious = ()
    if "memorization" in values:
        suspicious = tuple(scorer.memorization.most_suspicious(_SUSPICIOUS))
    return Result(image_set.name, count, values, intervals, replicates, tuple(notes), suspicious)


def _check_count(name: str, count: int, chosen: tuple[str, ...]) -> None:
    short = [metric for metric in chosen if count < METRICS[metric].fewest]
    if short:
        fewest = max(METRICS[metric].fewest for metric in short)
        raise UserError(
            f"{name} has {count} images, {', '.join(short)} need at least {fewest}: add images or "
            "choose other --metrics"
        )


def _check_dimensions(image_set: ImageSet, given: Gaussian | None, dimensions: int) -> None:
    if given is not None and given.dimensions != dimensions:
        raise UserError(
            f"{image_set.name} has statistics of {given.dimensions}-dimensional features, the "
            f"graph gives {dimensions}: they were made with another graph or image size"
        )


def _check_not_swapped(reference: ImageSet, samples: list[ImageSet]) -> None:
    for sample in samples:
        if sample.has_statistics and not reference.has_statistics:
            raise UserError(
                f"SAMPLE: {sample.name} holds statistics (mu, sigma), as a reference batch does, "
                f"and the reference {reference.name} has none: are the two swapped? If not, make a "
                "reference with make_reference.py"
            )


def _check_making(image_set: ImageSet, chosen: Settings) -> None:
    """That given statistics were made in this precision, of images that were resized like this."""
    if image_set.has_statistics and image_set.resize != chosen.resize:
        raise UserError(
            f"--resize {chosen.resize}: the statistics in {image_set.name} were made with the "
            f"{image_set.resize} resize: make a reference with make_reference.py --resize "
            f"{chosen.resize}, or give the images alone"
        )
    differs = image_set.has_statistics and image_set.precision != chosen.precision
    if differs and not chosen.allow_mixed_precision:
        raise UserError(
            f"--precision {chosen.precision}: the statistics in {image_set.name} were made in "
            f"{image_set.precision}, which moves the Fréchet distance by a percent or more; make a "
            "reference in the same precision, or add --allow_mixed_precision"
        )


class _Extractor:
    """Features of image sets, from the cache where there is one; given statistics stand.

    names: of all sets, which the progress tells apart.
    """

    def __init__(
        self,
        engine: Engine,
        graph: Network,
        settings: Settings,
        names: list[str],
        launch: Launch = ALONE,
    ):
        self.engine, self.graph, self.settings, self._launch = engine, graph, settings, launch
        self._short = dict(zip(names, short_names(names), strict=True))
        self._stamps: dict[str, str | None] = {}
        self._cache = None
        if settings.cache_dir is not None:
            how = f"{graph.digest} {engine.name} {settings.precision}"
            if settings.resize != PUBLISHED_RESIZE:
                how += f" {settings.resize}"
            self._cache = FeatureCache(settings.cache_dir, how)

    def __call__(
        self, image_set: ImageSet, keep_spatial: bool = False, statistics_do: bool = False
    ) -> Features:
        """`statistics_do`: where both Gaussians are given, leave out the images."""
        if statistics_do and image_set.has_both_gaussians:
            none = np.empty((0, image_set.pool_gaussian.dimensions), np.float32)
            return Features(none, image_set.pool_gaussian, image_set.spatial_gaussian)
        features = self._images(image_set, keep_spatial)
        return dataclasses.replace(
            features,
            pool_gaussian=image_set.pool_gaussian or features.pool_gaussian,
            spatial_gaussian=image_set.spatial_gaussian or features.spatial_gaussian,
        )

    def check(self, image_set: ImageSet) -> None:
        """`UserError` for what the network makes of the first images of a set.

        Of those that grow it is known as soon as they are there.
        """
        source = image_set.source
        if isinstance(source, GrowingImages):
            return
        if self.settings.devices:
            self._stamps[image_set.name] = stamp_of(source)
        pool, spatial = features_of_batch(self.engine, source.read(0, min(_TRIED, len(source))))
        if pool.shape[1] != self.graph.dimensions:
            raise UserError(
                f"--inception_path: {self.graph.path} gives {pool.shape[1]} features of an image, "
                f"its classifier takes {self.graph.dimensions}"
            )
        check_finite(pool, spatial, 0, image_set.name)
        _check_dimensions(image_set, image_set.spatial_gaussian, spatial.shape[1])

    def assist(
        self, image_set: ImageSet, keep_spatial: bool = False, statistics_do: bool = False
    ) -> None:
        """Our share of what the first process of the launch gets by calling this."""
        if statistics_do and image_set.has_both_gaussians:
            return
        path = self._path(image_set, keep_spatial)
        if not path.exists():
            self._extract(image_set, keep_spatial, path)

    def _path(self, image_set: ImageSet, keep_spatial: bool) -> Path:
        return self._cache.path(image_set.source, keep_spatial, self._short[image_set.name])

    def _images(self, image_set: ImageSet, keep_spatial: bool) -> Features:
        # The cache goes by all pixels, which those that grow have not yet.
        if self._cache is None or isinstance(image_set.source, GrowingImages):
            return self._extract(image_set, keep_spatial)
        path = self._path(image_set, keep_spatial)
        features = self._cache.load(path, len(image_set.source), self.graph.dimensions)
        if features is None:
            path.unlink(missing_ok=True)  # others would take what cannot be read for done
            features = self._extract(image_set, keep_spatial, path)
            self._cache.save(path, features)
            for share in path.parent.glob(f"{path.stem}-*{path.suffix}"):
                share.unlink(missing_ok=True)
        return features

    def _extract(
        self, image_set: ImageSet, keep_spatial: bool, store: Path | None = None
    ) -> Features:
        settings = self.settings
        options = {
            "name": self._short[image_set.name],
            "batch_size": settings.batch_size,
            "keep_spatial": keep_spatial,
        }
        stored = {"dimensions": self.graph.dimensions, "store": store}
        source = image_set.source
        if not settings.devices and store is None:
            return extract(self.engine, source, **options)
        if not settings.devices:
            return extract_among_ranks(self.engine, source, self._launch, **stored, **options)
        return extract_on_devices(
            image_set,
            settings.device_list,
            {
                "path": self.graph.path,
                "backend": "torch",
                "precision": settings.precision,
                "resize": settings.resize,
            },
            stamp=self._stamps[image_set.name],
            **stored,
            **options,
        )
