"""The folder of finished work: chunks of consecutive global indices, each there whole or not.

A chunk lies in `chunks/IDENTITY/START-STOP.npz`, IDENTITY being the hash of all that its samples
depend on: samples of two settings can never meet. Nothing else decides what is done: not which
process made a chunk, not how large chunks were when it was made.
"""

import json
import os
import time
from collections.abc import Callable

import numpy as np

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError
from esddpm_io.files import exists, is_blob, join, list_names, read_json, remove
from esddpm_io.npz import DamagedFile, NpzReader, NpzWriter
from esddpm_io.parts import Range, cover, find_parts, gaps, part_path
from guided_diffusion.settings.record import Run

SETTINGS_FILE = "settings.json"
IMAGES_FILE = "generator_images.json"  # what is known of the start images' files

# A folder of more files than this is slow to list, so small batches share a chunk.
_MOST_CHUNKS = 4096
# Temporary files that are so much older than now belong to processes that are gone.
_LEFT_OVER_S = 3600.0


class ChunkFolder:
    """Samples 0 … run.num_samples-1 of one run, in `folder`."""

    def __init__(self, folder: str | os.PathLike, run: Run):
        self.folder = str(folder)
        self.run = run
        self.num_samples = run.num_samples
        self.chunks = join(self.folder, "chunks", run.identity)

    @classmethod
    def open(cls, folder: str | os.PathLike, run: Run) -> "ChunkFolder":
        """Open the folder for this run, whose record becomes its `settings.json`.

        One that differs in nothing but paths stays: they may be those of another machine. Raises
        UserError, saying what differs, if it holds samples of other settings.
        """
        path = join(folder, SETTINGS_FILE)
        content = read_json(path)
        if content is not None:
            there = cls(folder, Run.from_json(content, where=path))
            if there.run.identity == run.identity and there.num_samples == run.num_samples:
                return cls(folder, run)
            if (differences := run.differences(there.run)) and there._has_samples():
                raise UserError(
                    f"{folder} holds samples of other settings ({'; '.join(differences)}): choose "
                    "another folder (--save_dir, --output_dir, --save_dir_suffix or OPENAI_LOGDIR, "
                    "whichever the command has), or remove this one"
                )
        elif any(name.startswith("samples_all") for name in list_names(folder)):
            raise UserError(
                f"{folder} has samples, but no {SETTINGS_FILE} that says what they are: choose "
                "another folder, or remove this one"
            )
        write_json(path, run.to_json())
        return cls(folder, run)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ChunkFolder":
        """Open a folder that is there, whatever its settings; UserError if it is none."""
        path = join(folder, SETTINGS_FILE)
        content = read_json(path)
        if content is None:
            raise UserError(f"{folder} is not a folder of samples: it has no {SETTINGS_FILE}")
        return cls(folder, Run.from_json(content, where=path))

    def _has_samples(self) -> bool:
        names = list_names(self.folder)
        return bool(list_names(self.chunks)) or any(n.startswith("samples") for n in names)

    def finished(self) -> list[Range]:
        """The ranges of all finished chunks that hold wanted samples, by their start.

        The last may go on beyond those, in a folder that had more samples before.
        """
        return [chunk for chunk in find_parts(self.chunks) if chunk[0] < self.num_samples]

    def missing(self, size: int) -> list[Range]:
        """The ranges of `size` indices (from 0 on; the last may be shorter) not yet finished."""
        cells = {
            cell
            for start, stop in self._gaps()
            for cell in range(start // size, (stop - 1) // size + 1)
        }
        return [(cell * size, min((cell + 1) * size, self.num_samples)) for cell in sorted(cells)]

    def _gaps(self) -> list[Range]:
        """What no finished chunk covers."""
        return list(gaps(self.finished(), 0, self.num_samples))

    def count_done(self) -> int:
        """How many samples are finished."""
        return self.num_samples - sum(stop - start for start, stop in self._gaps())

    def is_complete(self) -> bool:
        """Whether none is missing."""
        return not self._gaps()

    def is_done(self, wanted: Range) -> bool:
        """Whether a range is there as a chunk of its own."""
        return exists(self._path(wanted))

    def write(
        self, where: Range, images: np.ndarray, labels: np.ndarray | None, **about: object
    ) -> None:
        """Store a finished chunk: uint8 [n, H, W, 3], int64 [n] or None, and how it was made."""
        arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        layout: dict[str, tuple[tuple[int, ...], np.dtype | type]]
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        with NpzWriter(self._path(where), layout) as writer:
            for name, array in arrays.items():
                writer.append(name, array)

    def cover(self, start: int, stop: int) -> list[tuple[Range, Range]]:
        """Chunks that hold indices start … stop-1, and of each the indices to take from it.

        All of them must be finished.
        """
        return cover(self.finished(), start, stop)

    def reader(self, chunk: Range) -> NpzReader:
        """Open a finished chunk (`arr_0`, and `arr_1` where there are labels)."""
        return NpzReader(self._path(chunk))

    def about(self) -> list[dict]:
        """How each finished chunk was made: what `write` was told."""
        records = []
        for chunk in self.finished():
            with self.reader(chunk) as reader:
                if "about" in reader.names:
                    records.append(json.loads(reader.array("about").tobytes()))
        return records

    def remove_damaged(
        self, log: Callable[[str], None], within: Range | None = None, *, all_bytes: bool = False
    ) -> int:
        """Remove chunks that are cut, or with `all_bytes` of which any byte changed; how many.

        They are missing then, and are sampled again. Only those `within` a range are looked at.
        """
        removed = 0
        start, stop = within or (0, self.num_samples)
        for chunk in self.finished():
            if chunk[0] >= stop or chunk[1] <= start:
                continue
            path = self._path(chunk)
            try:
                with NpzReader(path) as reader:
                    reader.shape("arr_0")
                    if all_bytes:
                        reader.verify()
            except DamagedFile as error:
                log(f"{error}: its samples are made again")
                remove(path)
                removed += 1
        return removed

    def clean(self) -> None:
        """Remove what processes that are gone have left: their temporary files."""
        if is_blob(self.chunks):
            return
        for name in list_names(self.chunks):
            path = join(self.chunks, name)
            if name.startswith(".tmp-") and time.time() - os.stat(path).st_mtime > _LEFT_OVER_S:
                remove(path)

    def _path(self, where: Range) -> str:
        return part_path(self.chunks, where)


def default_chunk_size(num_samples: int, batch_size: int) -> int:
    """One batch, or as many as keep the number of files low."""
    batches = -(-num_samples // batch_size)
    return batch_size * max(1, -(-batches // _MOST_CHUNKS))
