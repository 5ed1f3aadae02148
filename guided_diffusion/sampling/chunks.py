"""The folder of finished work: chunks of consecutive global indices, each there whole or not."""

import contextlib
import json
import os
import time
import uuid

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import create_exclusively, exists, is_blob, join, list_names, read_json, remove
from esddpm_io.npz import NpzReader, NpzWriter
from guided_diffusion.sampling.claims import Observer

SETTINGS_FILE = "settings.json"
# A folder of more files than this is slow to list, so small batches share a chunk.
_MOST_CHUNKS = 4096
# Settings that a process has moved away for a look at the chunks are back in no time.
_TRIES, _MOVING_S = 20, 0.1


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

        Other settings are replaced while nothing has been sampled with them and nobody is at it.
        Raises UserError, saying what differs, if the folder holds samples of other settings.
        """
        record = {"settings": settings, "info": info, "chunk_size": chunk_size}
        for _ in range(_TRIES):
            there = cls._open_or_make(folder, record)
            differences = _differences(there.settings, settings)
            if not differences:
                return there
            if not there._give_way():
                break
        raise UserError(
            f"{folder} holds samples of other settings, or is being worked on with them "
            f"({'; '.join(differences)}): choose another folder (--save_dir; in the driver "
            "--save_dir_suffix or --output_dir) or remove this one"
        )

    @classmethod
    def _open_or_make(cls, folder: str | os.PathLike, record: dict):
        # Several processes may be here at once: one makes the file, all go by what it wrote.
        path = join(folder, SETTINGS_FILE)
        for _ in range(_TRIES):
            there = read_json(path)
            if there is not None:
                return cls(folder, there)
            if list_names(join(folder, "chunks")):
                time.sleep(_MOVING_S)  # see `_give_way`: their settings will be back
            else:
                create_exclusively(path, json.dumps(record, indent=2) + "\n")
        raise UserError(
            f"{folder} has chunks but no {SETTINGS_FILE} that says what they are: choose another "
            "folder, or remove this one"
        )

    def _give_way(self) -> bool:
        """Remove these settings if no sample was made with them; whether they are gone.

        They are moved away first and the chunks looked at after that. `write` has its file among
        the chunks before it looks at the settings: so either we see that file, and move them back,
        or the writer sees that they are gone. Samples of two settings never meet.
        """
        if self._is_used():
            return False
        path = join(self.folder, SETTINGS_FILE)
        if is_blob(path):  # nothing can be moved in one step there
            remove(path)
            return True
        aside = join(self.folder, f".tmp-{uuid.uuid4().hex[:8]}-{SETTINGS_FILE}")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.rename(path, aside)
            moved = read_json(aside)
            if moved["settings"] != self.settings or self._is_used():
                create_exclusively(path, json.dumps(moved, indent=2) + "\n")
            os.remove(aside)
        return True

    def _is_used(self) -> bool:
        """Whether there are samples of these settings, or a live process that makes some."""
        if list_names(join(self.folder, "chunks")):
            return True
        if any(name.startswith("samples") for name in list_names(self.folder)):
            return True
        return any(worker["alive"] for worker in Observer(self.folder).workers())

    @classmethod
    def load(cls, folder: str | os.PathLike):
        """Open a folder that is there, whatever its settings; UserError if it is none."""
        record = read_json(join(folder, SETTINGS_FILE))
        if record is None:
            raise UserError(f"{folder} is not a folder of samples: it has no {SETTINGS_FILE}")
        if not _is_record(record):
            raise UserError(f"{join(folder, SETTINGS_FILE)} is damaged: it lacks what a run notes")
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
            self._check_settings()

    def _check_settings(self) -> None:
        """UserError if another process has given the folder other settings; see `_give_way`."""
        for _ in range(_TRIES):
            record = read_json(join(self.folder, SETTINGS_FILE))
            if record is not None:
                break
            time.sleep(_MOVING_S)
        same = record and (record["settings"], record["chunk_size"])
        if same != (self.settings, self.chunk_size):
            raise UserError(
                f"{self.folder} was given other settings by another process meanwhile: start this "
                "one again in another folder"
            )

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


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(key), dict) for key in ("settings", "info"))
        and isinstance(record.get("chunk_size"), int)
        and isinstance(record["settings"].get("num_samples"), int)
        and record["chunk_size"] > 0
    )


def _differences(there: dict, now: dict) -> list[str]:
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return [f"{key} is {there.get(key)} there, {now.get(key)} now" for key in keys]
