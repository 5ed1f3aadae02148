"""The folder of finished work: chunks of consecutive global indices, each there whole or not."""

import json
import os

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import create_exclusively, exists, join, list_names, read_json
from esddpm_io.npz import NpzReader, NpzWriter

SETTINGS_FILE = "settings.json"
# A folder of more files than this is slow to list, so small batches share a chunk.
_MOST_CHUNKS = 4096


class ChunkFolder:
    """Samples 0 … num_samples-1 in chunks `chunks/START-STOP.npz` of one folder.

    `settings.json` holds what the samples depend on (`settings`), what is good to know (`info`)
    and the chunk size; all processes that work on the folder go by it.
    """

    def __init__(self, folder: str | os.PathLike, record: dict):
        self.folder = str(folder)
        self.settings: dict = record["settings"]
        self.info: dict = record["info"]
        self.num_samples: int = record["settings"]["num_samples"]
        self.chunk_size: int = record["chunk_size"]

    @classmethod
    def open(cls, folder: str | os.PathLike, settings: dict, info: dict, chunk_size: int):
        """Open the folder for these settings, making it if it is new.

        Raises UserError, saying what differs, if it holds samples of other settings.
        """
        record = {"settings": settings, "info": info, "chunk_size": chunk_size}
        path = join(folder, SETTINGS_FILE)
        if not exists(path):
            # Several processes may be here at once: one makes the file, all go by what it wrote.
            create_exclusively(path, json.dumps(record, indent=2) + "\n")
        there = cls.load(folder)
        differences = _differences(there.settings, settings)
        if differences:
            raise UserError(
                f"{folder} holds samples of other settings ({'; '.join(differences)}): choose "
                "another folder (--save_dir; in the driver --save_dir_suffix or --output_dir) "
                "or remove this one"
            )
        return there

    @classmethod
    def load(cls, folder: str | os.PathLike):
        """Open a folder that is there, whatever its settings; UserError if it is none."""
        record = read_json(join(folder, SETTINGS_FILE))
        if record is None:
            raise UserError(f"{folder} is not a folder of samples: it has no {SETTINGS_FILE}")
        return cls(folder, record)

    def __len__(self) -> int:
        return -(-self.num_samples // self.chunk_size)

    def bounds(self, chunk: int) -> tuple[int, int]:
        """First index of the chunk, and the one after its last."""
        start = chunk * self.chunk_size
        return start, min(start + self.chunk_size, self.num_samples)

    def chunks_of(self, start: int, stop: int) -> range:
        """The chunks that hold indices start … stop-1."""
        return range(start // self.chunk_size, -(-stop // self.chunk_size))

    def missing(self) -> list[int]:
        """Chunks that are not finished, in rising order."""
        there = set(list_names(join(self.folder, "chunks")))
        return [chunk for chunk in range(len(self)) if self._name(chunk) not in there]

    def count_done(self) -> int:
        """How many samples are finished."""
        missing = (self.bounds(chunk) for chunk in self.missing())
        return self.num_samples - sum(stop - start for start, stop in missing)

    def is_done(self, chunk: int) -> bool:
        return exists(self._path(chunk))

    def write(self, chunk: int, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Store a finished chunk: uint8 [n, H, W, 3] and int64 [n] or None."""
        arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        with NpzWriter(self._path(chunk), layout) as writer:
            for name, array in arrays.items():
                writer.append(name, array)

    def reader(self, chunk: int) -> NpzReader:
        """Open a finished chunk (`arr_0`, and `arr_1` where there are labels)."""
        return NpzReader(self._path(chunk))

    def _name(self, chunk: int) -> str:
        start, stop = self.bounds(chunk)
        return f"{start:07}-{stop:07}.npz"

    def _path(self, chunk: int) -> str:
        return join(self.folder, "chunks", self._name(chunk))


def default_chunk_size(num_samples: int, batch_size: int) -> int:
    """One batch, or as many as keep the number of files low."""
    batches = -(-num_samples // batch_size)
    return batch_size * max(1, -(-batches // _MOST_CHUNKS))


def _differences(there: dict, now: dict) -> list[str]:
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return [f"{key} is {there.get(key)} there, {now.get(key)} now" for key in keys]
