"""The same samples at every T': images at a few indices, one row a setting."""

import dataclasses

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import exists
from esddpm_io.images import open_images
from guided_diffusion.reporting.nearest import sha256_of
from guided_diffusion.reporting.points import Group, Point, Series, Setting

_IMAGES = 12  # of a row: what is seen at a glance, and keeps the page small


@dataclasses.dataclass(frozen=True)
class Row:
    """Images uint8 [n, H, W, 3] of one setting, None for start images that no run has scored."""

    name: str
    setting: Setting | None
    images: np.ndarray

    @property
    def tick(self) -> str:
        """T' alone, as it stands beside a slider."""
        t_prime = self.setting.t_prime if self.setting else 0
        return "noise" if t_prime is None else str(t_prime)


@dataclasses.dataclass(frozen=True)
class Strip:
    """Rows that start from the same images, by T'; `indices` are of all of them.

    seed: of all rows, which then start from the same noise too; None where none is common.
    """

    label: str
    seed: int | None
    indices: list[int]
    rows: list[Row]


def strips_of(group: Group) -> list[Strip]:
    """A strip for each series of a group, at indices spread evenly over those that all have."""
    found = [_strip(group, series) for series in group.series]
    return found or [_strip(group, Series("", group.generators))]


def _strip(group: Group, series: Series) -> Strip:
    common = set.intersection(*({p.about["seed"] for p in one.points} for one in series.settings))
    seed = min(common - {None}, default=None)
    points = [
        next((point for point in one.points if point.about["seed"] == seed), one.points[0])
        for one in series.settings
    ]
    count = min(len(point.images) for point in points)
    picked = np.linspace(0, count - 1, min(count, _IMAGES)).astype(int)
    rows = [
        Row(one.name, one, point.images.pick(picked))
        for one, point in zip(series.settings, points, strict=True)
    ]
    # What they start from goes first, whether it was scored or not.
    start = points[0].about.get("start_images")
    scored = [one for one in group.generators if one.about.get("start_images") == start]
    if scored and scored[0] not in series.settings and count <= len(scored[0].points[0].images):
        # A generator that is a function makes others of another seed.
        found = scored[0].points
        same = next((point for point in found if point.about["seed"] == seed), found[0])
        rows.insert(0, Row(scored[0].name, scored[0], same.images.pick(picked)))
    elif not scored and start:
        images = _start_images(points[0], picked)
        rows[:0] = [] if images is None else [Row("generator", None, images)]
    return Strip(series.label, seed, picked.tolist(), rows)


def _start_images(point: Point, indices: np.ndarray) -> np.ndarray | None:
    """The images that a run started from, if they are there and what they were."""
    then = (point.record.get("inputs") or {}).get("start_images")
    if not then or not exists(then["path"]) or sha256_of(then["path"]) != then["sha256"]:
        return None
    try:
        return open_images(then["path"], flag="start images").pick(indices)
    except UserError:
        return None
