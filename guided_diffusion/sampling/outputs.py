"""What is made of finished chunks: one .npz of all, one of a rank's block, PNGs, a grid."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

import numpy as np

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError
from esddpm_io.files import join, list_names, read_json, remove
from esddpm_io.images import (
    ImageSource,
    enlarge,
    image_grid,
    open_images,
    png_name,
    save_png,
    with_caption,
)
from esddpm_io.npz import NpzReader, NpzWriter
from esddpm_io.progress import Progress
from guided_diffusion.sampling.chunks import ChunkFolder

PNG_FOLDER = "images"
_RANK_FILE = re.compile(r"samples_.*_rank_(\d+)\.npz")
_ROWS_AT_ONCE = 64
_GRID_COLUMNS, _GRID_ROWS = 8, 4
_GRID_PIXELS = 1000  # of its width, about: small images are enlarged to be seen


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows start … stop-1 of an .npz that `open` opens."""

    open: Callable[[], NpzReader]
    start: int
    stop: int

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The rows of one array, a few at a time."""
        with self.open() as reader:
            for row in range(self.start, self.stop, _ROWS_AT_ONCE):
                yield reader.rows(name, row, min(row + _ROWS_AT_ONCE, self.stop))


def parts_of(folder: ChunkFolder, start: int, stop: int) -> list[Part]:
    """The parts of finished chunks that make up samples start … stop-1."""
    return [
        Part(functools.partial(folder.reader, chunk), first - chunk[0], last - chunk[0])
        for chunk, (first, last) in folder.cover(start, stop)
    ]


def parts_of_files(paths: list[str]) -> list[Part]:
    """Whole .npz files in the order given; UserError if they are not images of one kind."""
    parts, kinds = [], []
    for path in paths:
        images = open_images(path, flag="--dir")
        labels = "with" if images.has_labels else "without"
        kinds.append(f"{images.shape[2]}x{images.shape[1]} {labels} labels")
        if kinds[-1] != kinds[0]:
            raise UserError(
                f"--dir: {path} has images of {kinds[-1]}, {paths[0]} of {kinds[0]}: they are not "
                "of one run"
            )
        parts.append(Part(functools.partial(NpzReader, path), 0, len(images)))
    return parts


def join_parts(parts: list[Part], path: str) -> None:
    """Stream parts into one .npz (`arr_0`, and `arr_1` if they are labelled), atomically."""
    rows = sum(part.stop - part.start for part in parts)
    with parts[0].open() as reader:
        layout: dict[str, tuple[tuple[int, ...], np.dtype | type]] = {
            name: ((rows, *reader.shape(name)[1:]), reader.dtype(name))
            for name in ("arr_0", "arr_1")
            if name in reader.names
        }
    with Progress(rows, "images", "gathering") as progress, NpzWriter(path, layout) as writer:
        for part in parts:
            for name in layout:
                for block in part.blocks(name):
                    writer.append(name, block.astype(layout[name][1], copy=False))
            progress.update(part.stop - part.start)


def export_npz(folder: ChunkFolder, start: int, stop: int, rank: int) -> str:
    """Write a rank's block as `samples_{N}x{H}x{W}x{C}_rank_{r}.npz`; return the path."""
    if start == stop:
        raise UserError(f"rank {rank} has no samples: --world_size is larger than their number")
    path = rank_file(folder, start, stop, rank)
    join_parts(parts_of(folder, start, stop), path)
    return path


def export_all(folder: ChunkFolder) -> str:
    """Write all samples as `samples_{N}x{H}x{W}x{C}.npz`; return the path."""
    path = join(folder.folder, f"{_samples_name(folder, folder.num_samples)}.npz")
    join_parts(parts_of(folder, 0, folder.num_samples), path)
    return path


def rank_file(folder: ChunkFolder, start: int, stop: int, rank: int) -> str:
    """Where `export_npz` writes a rank's block."""
    return join(folder.folder, f"{_samples_name(folder, stop - start)}_rank_{rank}.npz")


def _samples_name(folder: ChunkFolder, count: int) -> str:
    height, width = folder.run.image_shape
    return f"samples_{count}x{height}x{width}x3"


def claim_png_folder(folder: ChunkFolder) -> str:
    """The folder for PNGs of this run's samples; UserError if it has any others."""
    target = join(folder.folder, PNG_FOLDER)
    marker = f"{target}.json"
    owner = {"samples_of": folder.run.identity}
    if read_json(marker) != owner:
        if list_names(target):
            raise UserError(
                f"--save_png_files: {target} has files that are not of this run: move them away"
            )
        write_json(marker, owner)
    return target


def export_pngs(folder: ChunkFolder, start: int, stop: int) -> str:
    """Write samples as `images/{index}_label_{label}.png` where missing; return the folder.

    The folder is claimed. Those beyond the run's number of samples, of a longer one before, go.
    """
    target = join(folder.folder, PNG_FOLDER)
    there = exported_pngs(folder)
    for index, name in there.items():
        if index >= folder.num_samples:
            remove(join(target, name))
    for chunk, (first, last) in folder.cover(start, stop):
        missing = [index for index in range(first, last) if index not in there]
        if not missing:
            continue
        with folder.reader(chunk) as reader:
            images = reader.array("arr_0")
            labels = reader.array("arr_1") if "arr_1" in reader.names else None
        for index in missing:
            row = index - chunk[0]
            name = png_name(index, None if labels is None else labels[row])
            save_png(join(target, name), images[row])
    return target


def exported_pngs(folder: ChunkFolder) -> dict[int, str]:
    """The samples that are there as PNGs, and the files' names."""
    names = list_names(join(folder.folder, PNG_FOLDER))
    return {int(index): name for name in names if (index := re.split("[_.]", name)[0]).isdecimal()}


def save_grid(samples: str, starts: ImageSource | None, path: str, caption: str = "") -> None:
    """Write a grid of samples picked at even distances, under the images they started from.

    samples: an .npz; starts: the generator's images with the same indices, or None. Pixels of
    small images are repeated. caption: a line below the grid.
    """
    results = open_images(samples, flag="samples")
    times = max(1, round(_GRID_PIXELS / (_GRID_COLUMNS * results.shape[2])))
    count = min(len(results), _GRID_COLUMNS * _GRID_ROWS)
    picked = np.linspace(0, len(results) - 1, count).astype(int)
    sources = [results] if starts is None else [starts, results]
    cells = []
    for row in range(0, count, _GRID_COLUMNS):
        indices = picked[row : row + _GRID_COLUMNS]
        for source in sources:
            images = [enlarge(source.read(index, index + 1)[0], times) for index in indices]
            blank = np.full_like(images[0], 255)
            cells += images + [blank] * (_GRID_COLUMNS - len(images))
    grid = image_grid(cells, _GRID_COLUMNS)
    save_png(path, with_caption(grid, caption) if caption else grid)


def rank_files(folder: str, number: int) -> dict[int, str]:
    """The `samples_…_rank_{r}.npz` files of a folder by rank.

    UserError, naming them, if a rank has two, or is not one of 0 … number-1.
    """
    by_rank: dict[int, str] = {}
    for name in sorted(list_names(folder)):
        match = _RANK_FILE.fullmatch(name)
        if not match:
            continue
        rank = int(match[1])
        if rank in by_rank:
            raise UserError(f"--dir {folder}: {by_rank[rank]} and {name} are both of rank {rank}")
        by_rank[rank] = name
    if strange := [by_rank[rank] for rank in sorted(by_rank) if rank >= number]:
        raise UserError(
            f"--dir {folder}: {', '.join(strange)}: with --num_file {number} the ranks are "
            f"0 … {number - 1}; remove what is of another run, or give their number"
        )
    return {rank: join(folder, name) for rank, name in by_rank.items()}
