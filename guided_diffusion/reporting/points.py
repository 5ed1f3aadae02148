"""Finished runs as points, and which of them may be compared with each other."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from esddpm_io.errors import UserError
from esddpm_io.files import absolute, exists, join, list_names, read_json, short_names
from esddpm_io.images import ImageSource, open_images
from guided_diffusion.sampling.gathering import METRICS_FILE, SAMPLES_FILE
from guided_diffusion.sampling.point import point_of_run
from guided_diffusion.settings.record import Run

SWEEP_FILE = "sweep.json"
# The first of these that was measured is the one to choose by.
_DISTANCES = ("fid", "frechet_distance", "kid", "kernel_distance")
_LOWER_IS_BETTER = (*_DISTANCES, "sfid", "spatial_frechet_distance")
# What makes a curve against T' when it differs, and how it is said.
_OF_A_SERIES: dict[str, Callable[[Any], str]] = {
    "sampler": str,
    "steps": lambda steps: f"{steps} step{'s' if steps != 1 else ''}",
    "eta": lambda eta: f"eta {eta:g}",
    "guidance_scale": lambda scale: f"guidance {scale:g}",
    "clip_denoised": lambda clipped: "clipped" if clipped else "not clipped",
    "variance": lambda variance: f"{variance} variance",
    "checkpoint": str,
    "start_images": str,
}
_PATHS = ("checkpoint", "start_images")


def point_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a metrics.json's samples are: T', steps, sampler, seed and so on.

    t_prime: 0 for the generator's own images, None from noise. Files from before it was noted there
    tell it by their record: KeyError, TypeError, UserError if that is none.
    """
    if record.get("point"):
        return dict(record["point"])
    run = Run.from_json(record["run"], where=METRICS_FILE)
    return point_of_run(run, record["sampling"]["seconds_per_image"])


@dataclasses.dataclass(frozen=True)
class Point:
    """One finished run. about: see `point_of`; record: its metrics.json; result: its metrics.

    above: how far its distance lies above the best of its sweep, with the interval of that or None;
    None where no sweep says so.
    """

    folder: str
    name: str
    about: dict[str, Any]
    record: dict[str, Any]
    result: dict[str, Any]
    images: ImageSource
    above: tuple[float, tuple[float, float] | None] | None = None

    @property
    def measured_with(self) -> tuple[object, ...]:
        """What has to be equal for metrics to be compared: names, features, reference, count."""
        evaluation = self.record["evaluation"]
        reference = (self.record.get("inputs") or {}).get("reference") or {}
        settings = evaluation.get("settings") or {}
        return (
            tuple(self.result["labels"].items()),
            evaluation.get("graph_sha256"),
            reference.get("sha256", evaluation.get("reference")),
            self.result["images"],
            settings.get("precision"),
            settings.get("neighbour_arithmetic"),
        )


@dataclasses.dataclass(frozen=True)
class Setting:
    """Points that differ in their seed alone."""

    points: tuple[Point, ...]

    @property
    def about(self) -> dict[str, Any]:
        """Of the first seed, whose values stand for all but the seed."""
        return self.points[0].about

    @property
    def t_prime(self) -> int | None:
        """0 for the generator's own images, None from noise."""
        return self.about["t_prime"]

    @property
    def name(self) -> str:
        """Where it starts, in words."""
        if self.t_prime is None:
            return "from noise"
        return f"T' {self.t_prime}" if self.t_prime else "generator"

    def value(self, key: str) -> float:
        """Mean over seeds of a metric."""
        return math.fsum(self._values(key)) / len(self.points)

    def range(self, key: str) -> tuple[float, float]:
        """Lowest and highest of a metric over seeds."""
        return min(self._values(key)), max(self._values(key))

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of the first seed, where there is one."""
        interval = (self.points[0].result.get("intervals") or {}).get(key)
        return (float(interval[0]), float(interval[1])) if interval else None

    @property
    def above(self) -> tuple[float, tuple[float, float] | None] | None:
        """Mean over seeds of `Point.above`, its interval where there is one seed."""
        found = [point.above for point in self.points if point.above]
        if len(found) < len(self.points):
            return None
        mean = math.fsum(difference for difference, _ in found) / len(found)
        return mean, found[0][1] if len(found) == 1 else None

    def _values(self, key: str) -> list[float]:
        return [float(point.result["metrics"][key]) for point in self.points]

    @property
    def seconds_per_image(self) -> float | None:
        """Mean over seeds of the seconds of a device, None where one does not say."""
        seconds = [point.about.get("seconds_per_image") for point in self.points]
        known = [second for second in seconds if second is not None]
        return math.fsum(known) / len(known) if len(known) == len(seconds) else None


@dataclasses.dataclass(frozen=True)
class Series:
    """Settings of one sampler and number of steps, by T'; `label` says what tells them apart."""

    label: str
    settings: tuple[Setting, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings whose metrics may be compared."""

    settings: tuple[Setting, ...]

    @functools.cached_property
    def metrics(self) -> dict[str, str]:
        """Names of the metrics by their keys, the one that settings are chosen by first."""
        labels = self.settings[0].points[0].result["labels"]
        first = next((key for key in _DISTANCES if key in labels), next(iter(labels)))
        return {first: labels[first], **labels}

    def values(self, key: str) -> list[float]:
        """A metric of all settings."""
        return [setting.value(key) for setting in self.settings]

    @property
    def chosen_by(self) -> str:
        """The key of that metric: a distance if one was measured."""
        return next(iter(self.metrics))

    def best(self, key: str) -> float:
        """The best value of a metric."""
        finite = [value for value in self.values(key) if math.isfinite(value)] or [math.nan]
        return min(finite) if key in _LOWER_IS_BETTER else max(finite)

    @property
    def best_setting(self) -> Setting | None:
        """The one with the best metric among those that a network sampled."""
        sampled = [one for one in self.settings if one.t_prime != 0]
        return self.best_of(sampled, self.chosen_by) if sampled else None

    @staticmethod
    def best_of(settings: Sequence[Setting], key: str) -> Setting:
        """The one of these settings with the best value of a metric that all of them have."""
        sign = 1.0 if key in _LOWER_IS_BETTER else -1.0
        return min(settings, key=lambda one: sign * one.value(key))

    def best_by_evaluations(self, settings: Iterable[Setting], key: str) -> dict[int, Setting]:
        """The best of these settings for each number of network evaluations, from few to many."""
        by_number = _gathered(settings, lambda one: one.about["network_evaluations"])
        best = [self.best_of(own, key) for own in by_number]
        best.sort(key=lambda one: one.about["network_evaluations"])
        return {one.about["network_evaluations"]: one for one in best}

    @property
    def generators(self) -> tuple[Setting, ...]:
        """T' = 0: the generators' own images."""
        return tuple(setting for setting in self.settings if setting.t_prime == 0)

    @functools.cached_property
    def series(self) -> tuple[Series, ...]:
        """The settings that a network sampled, one series for each way of sampling."""
        return self.series_by(tuple(_OF_A_SERIES))

    def series_by(self, names: tuple[str, ...]) -> tuple[Series, ...]:
        """The sampled settings, one series for each combination of values under `names`."""
        sampled = [setting for setting in self.settings if setting.t_prime != 0]
        found = _gathered(sampled, lambda one: tuple(one.about.get(name) for name in names))
        found.sort(key=_order_of_series)
        abouts = [settings[0].about for settings in found]
        return tuple(
            Series(self._told_apart(about, abouts, names), tuple(settings))
            for about, settings in zip(abouts, found, strict=True)
        )

    def words(self, name: str, value: Any) -> str:
        """A value that `Setting.about` has under a name; of paths what tells them apart."""
        if name not in _PATHS:
            return _OF_A_SERIES[name](value)
        found = (one.about.get(name) for one in self.settings)
        paths = list(dict.fromkeys(path for path in found if path))
        return dict(zip(paths, short_names(paths), strict=True))[value]

    def _told_apart(
        self, about: dict[str, Any], others: list[dict[str, Any]], names: Sequence[str]
    ) -> str:
        """What of a series is not the same in all; where all is, its sampler and steps."""
        noise = about["t_prime"] is None
        alike = [other for other in others if (other["t_prime"] is None) == noise]
        differing = [name for name in names if len({str(other.get(name)) for other in alike}) > 1]
        shown = differing or [name for name in ("sampler", "steps") if name in names]
        words = [self.words(name, about[name]) for name in shown if about.get(name) is not None]
        return ", ".join(["from noise", *words] if noise else words)

    @property
    def is_ambiguous(self) -> bool:
        """Whether settings are alike in all that is told of them."""
        return len({_told(one.points[0]) for one in self.settings}) < len(self.settings)

    @functools.cached_property
    def seeds(self) -> int:
        """The most seeds that a setting has."""
        return max(len(setting.points) for setting in self.settings)

    def spread(self, setting: Setting, key: str) -> tuple[float, float] | None:
        """What error bars show, of one kind in a group: see `spread_is`."""
        if self.seeds > 1:
            return setting.range(key) if len(setting.points) > 1 else None
        return setting.interval(key)

    @property
    def spread_is(self) -> str | None:
        """What error bars are: the range over seeds, intervals where there is one seed."""
        if self.seeds > 1:
            return f"range over {self.seeds} seeds"
        found = any(setting.interval(key) for setting in self.settings for key in self.metrics)
        return "95 % interval" if found else None


def read_groups(folders: list[str]) -> list[Group]:
    """The runs of these folders, those that may be compared together, in the order of T'.

    A folder of a sweep, or of several runs, stands for all of them. UserError for what is no
    finished run, and for images of different sizes.
    """
    found: dict[str, Any] = {}
    for folder in map(absolute, folders):
        differences = _differences(folder)
        for run in _runs_in(folder):
            found[run] = differences.get(PurePath(run).name) or found.get(run)
    names = short_names(list(found))
    points = [_read(run, name, found[run]) for run, name in zip(found, names, strict=True)]
    first = points[0]
    for point in points:
        if point.images.shape[1:] != first.images.shape[1:]:
            sizes = [f"{one.images.shape[2]}x{one.images.shape[1]}" for one in (point, first)]
            raise UserError(
                f"{point.folder} has images of {sizes[0]}, {first.folder} of {sizes[1]}: make a "
                "report of each"
            )
    return [
        Group(tuple(sorted(_settings(own), key=_order)))
        for own in _gathered(points, lambda point: point.measured_with)
    ]


def _runs_in(folder: str) -> list[str]:
    """The folder itself if it is a run, else the runs in it, in the order of their names."""
    if exists(join(folder, METRICS_FILE)):
        return [folder]
    inside = [join(folder, name.rstrip("/")) for name in sorted(list_names(folder))]
    runs = [path for path in inside if exists(join(path, METRICS_FILE))]
    if not runs:
        raise UserError(
            f"{folder} has no {METRICS_FILE}, nor has a folder in it: give folders of runs that "
            "were evaluated"
        )
    return runs


def _differences(folder: str) -> dict[str, Any]:
    """What a sweep wrote of each of its folders: the difference to its best point."""
    sweep = read_json(join(folder, SWEEP_FILE))
    return (sweep.get("differences") or {}) if isinstance(sweep, dict) else {}


def _read(folder: str, name: str, difference: dict[str, Any] | None) -> Point:
    path = join(folder, METRICS_FILE)
    record = read_json(path)
    try:
        if not isinstance(record, dict):
            raise TypeError("it is no object")
        about = point_of(record)
        [result] = record["evaluation"]["results"]
        numbers = [*result["metrics"].values(), result["images"]]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("metrics must be numbers")
        if not result["metrics"] or result["metrics"].keys() != result["labels"].keys():
            raise TypeError("metrics and their labels differ")
        for needed in ("t_prime", "seed", "network_evaluations"):
            about[needed]
        record["evaluation"]["reference"]
        above = None
        if difference:
            interval = difference["interval"]
            above = float(difference["difference"]), (tuple(interval) if interval else None)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is damaged or of another version: it does not say how the samples were made "
            f"and scored ({error})"
        ) from error
    samples = join(folder, SAMPLES_FILE)
    if not exists(samples):
        raise UserError(f"{folder} has no {SAMPLES_FILE}, which the page shows samples of")
    return Point(folder, name, about, record, result, open_images(samples, flag="DIR"), above)


def _settings(points: list[Point]) -> list[Setting]:
    """Points that differ in their seed alone, together."""
    together = []
    for own in _gathered(points, lambda point: (_told(point), str(point.about.get("timesteps")))):
        own.sort(key=lambda point: point.about["seed"] or 0)
        # The same run twice, or one repeated, is no other seed.
        seeds = [point.about["seed"] for point in own]
        alone = len(set(seeds)) < len(seeds)
        together += [Setting((one,)) for one in own] if alone else [Setting(tuple(own))]
    return together


def _told(point: Point) -> tuple[str, ...]:
    """What is told of a point beside its seed."""
    names = ("start_images",) if point.about["t_prime"] == 0 else tuple(_OF_A_SERIES)
    return tuple(str(point.about.get(name)) for name in ("t_prime", *names))


def _order(setting: Setting) -> tuple[float, float]:
    evaluations = setting.about["network_evaluations"] or 0
    return math.inf if setting.t_prime is None else setting.t_prime, evaluations


def _order_of_series(settings: list[Setting]) -> tuple[bool, str, int]:
    about = settings[0].about
    return about["t_prime"] is None, str(about.get("sampler")), about.get("steps") or 0


def _gathered(things: Iterable[Any], key: Callable[[Any], object]) -> list[list[Any]]:
    """Things of the same key together, in the order of their first."""
    found: dict[object, list[Any]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return list(found.values())
