"""The real images that are nearest to samples, in the features that the metrics were taken in."""

import dataclasses
import functools

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import exists, sha256
from esddpm_io.images import open_images
from guided_diffusion.reporting.points import Group, Point, Setting

_NEIGHBOURS = 4  # of each sample


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Samples of a setting, uint8 [n, H, W, 3], and what is nearest, from near to far.

    real uint8 [n, k, h, w, 3], distances float [n, k], both of the same rows.
    """

    setting: Setting
    indices: list[int]
    samples: np.ndarray
    real: np.ndarray
    distances: np.ndarray


def nearest_real(group: Group, samples: int) -> Nearest | str:
    """Neighbours of so many samples of the best setting, or a sentence on why there are none."""
    best = group.best_setting
    if not samples:
        return "They were not looked for."
    if best is None:
        return "There are no samples of a network among these runs."
    point = best.points[0]
    picked = np.linspace(0, len(point.images) - 1, min(len(point.images), samples)).astype(int)
    pixels = point.images.pick(picked)
    try:
        reference, rows, distances = _search(point, pixels)
    except UserError as error:
        return f"They cannot be looked for: {error}."
    images = open_images(reference, flag="reference")
    real = np.stack([images.pick(own) for own in rows])
    return Nearest(best, picked.tolist(), pixels, real, distances)


def _search(point: Point, samples: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Path of the reference, rows of it and distances; UserError if a file is not what it was."""
    inputs = point.record.get("inputs") or {}
    for name in ("reference", "graph"):
        if name not in inputs:
            raise UserError(f"metrics.json does not say what the {name} was")
        if not exists(inputs[name]["path"]):
            raise UserError(f"the {name} {inputs[name]['path']} is not there any more")
        if sha256_of(inputs[name]["path"]) != inputs[name]["sha256"]:
            raise UserError(f"the {name} {inputs[name]['path']} is not what it was")
    from evaluations.evaluation import nearest_in_reference

    reference = inputs["reference"]["path"]
    scored = point.record["evaluation"].get("settings") or {}
    how = {name: scored[name] for name in ("backend", "precision") if name in scored}
    if scored.get("cache_dir") and exists(scored["cache_dir"]):
        how["cache_dir"] = scored["cache_dir"]
    try:
        rows, distances = nearest_in_reference(
            reference, samples, _NEIGHBOURS, inception_path=inputs["graph"]["path"], **how
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return reference, rows, distances


@functools.cache
def sha256_of(path: str) -> str:
    """SHA-256 of a file or folder, which is read once for all groups of a report."""
    return sha256(path)
