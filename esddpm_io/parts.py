"""Images in parts: a folder of files START-STOP.npz, by global index, that may still be growing."""

import functools
import os
import re
import time
from collections.abc import Iterable, Iterator

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import is_blob, join, list_names
from esddpm_io.images import ImageSource, check_image_array
from esddpm_io.npz import NpzReader

Range = tuple[int, int]  # start and stop of global indices

_NAME = re.compile(r"(\d{7,})-(\d{7,})\.npz")
_POLL_S = 0.5


def part_path(folder: str, part: Range) -> str:
    """The file of a part."""
    return join(folder, f"{part[0]:07}-{part[1]:07}.npz")


def find_parts(folder: str) -> list[Range]:
    """The parts in a folder, by their start; none if there is no folder."""
    matches = map(_NAME.fullmatch, list_names(folder))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def gaps(parts: Iterable[Range], start: int, stop: int) -> Iterator[Range]:
    """What sorted parts leave uncovered of the indices start … stop-1."""
    for first, last in parts:
        if start < min(first, stop):
            yield start, min(first, stop)
        start = max(start, last)
    if start < stop:
        yield start, stop


def cover(parts: Iterable[Range], start: int, stop: int) -> list[tuple[Range, Range]]:
    """Those of sorted parts that hold indices start … stop-1, and of each the indices to take.

    They may overlap; together they must hold all.
    """
    chosen: list[tuple[Range, Range]] = []
    for part in parts:
        first, last = max(part[0], start), min(part[1], stop)
        if first <= start < last:
            chosen.append((part, (start, last)))
            start = last
    assert start >= stop, f"indices from {start} are missing"
    return chosen


class GrowingImages(ImageSource):
    """Images 0 … count-1 in a folder of parts (`arr_0`, perhaps `arr_1`) that others write.

    What is not there yet is waited for, however long it takes, the first part in the constructor.
    UserError for what is no folder, and for one that has files, but neither parts nor beginnings.
    """

    def __init__(self, folder: str, count: int, *, flag: str):
        self._folder, self._flag = folder, flag
        _check_growing(folder, flag)
        # One part is read a few batches at a time, or a batch has several parts.
        self._arrays = functools.lru_cache(1)(self._read_part)
        self._first: tuple[tuple[int, ...], bool] | None = None  # size of images, and labels or not
        part, _ = self._wait_for(0, 1)[0]
        images, labels = self._arrays(part)
        self._first = images.shape[1:], labels is not None
        self.shape, self.has_labels = (count, *images.shape[1:]), labels is not None

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([images for images, _ in self._pieces(start, stop)])

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        if not self.has_labels:
            return None
        return np.concatenate([labels for _, labels in self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for part, (first, last) in self._wait_for(start, stop):
            own = slice(first - part[0], last - part[0])
            images, labels = self._arrays(part)
            yield images[own], None if labels is None else labels[own]

    def _wait_for(self, start: int, stop: int) -> list[tuple[Range, Range]]:
        while any(gaps(parts := find_parts(self._folder), start, stop)):
            time.sleep(_POLL_S)
        return cover(parts, start, stop)

    def _read_part(self, part: Range) -> tuple[np.ndarray, np.ndarray | None]:
        with NpzReader(part_path(self._folder, part), flag=self._flag) as reader:
            labels = reader.array("arr_1") if "arr_1" in reader.names else None
            images = reader.array("arr_0")
        where = f"{self._flag}: arr_0 of {part_path(self._folder, part)}"
        check_image_array(images.shape, images.dtype, where)
        size, has_labels = self._first or (images.shape[1:], labels is not None)
        wanted = (part[1] - part[0], *size)
        if images.shape != wanted:
            raise UserError(f"{where} has the shape {list(images.shape)}, not {list(wanted)}")
        if has_labels != (labels is not None) or (has_labels and labels.shape != wanted[:1]):
            raise UserError(f"{where}: its labels (arr_1) are not those of all its images")
        return images, labels


def _check_growing(folder: str, flag: str) -> None:
    if not (is_blob(folder) or os.path.isdir(folder)):
        raise UserError(f"{flag}: there is no folder {folder}")
    names = list_names(folder)
    if names and not any(_NAME.fullmatch(name) or name.startswith(".tmp-") for name in names):
        raise UserError(f"{flag}: the folder {folder} has no chunks START-STOP.npz")
