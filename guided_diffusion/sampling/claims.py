"""Which process is at which chunk, and whether it is still alive.

A claim only keeps two processes from doing the same work. Nothing depends on it: if two do work
on one chunk after all, both write the same samples, and either file is right.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from esddpm_io.atomic import write_json
from esddpm_io.files import create_exclusively, join, list_names, read_json, remove

# Set by the launcher for its workers: the process without which they have nobody to work for.
LAUNCHER_VARIABLE = "ESDDPM_LAUNCHER_PID"
BEAT_S = 1.0
# A heart that has not beaten for so long has stopped: many beats, for a shared folder lags.
DEAD_AFTER_S = 60.0
# One that beats but has not come a step further for so long hangs, on a broken device say.
STUCK_AFTER_S = 1800.0


class Heart:
    """This process's record in `workers/`: who it is, what it does, and a beat every second.

    Use as a context manager; `set` changes what the record says from the next beat on, `tell`
    at once.
    """

    def __init__(self, folder: str, **about: object):
        self.worker_id = f"{about['rank']:04}-{uuid.uuid4().hex[:8]}"
        self._path = join(folder, "workers", f"{self.worker_id}.json")
        self._record = {
            "worker": self.worker_id,
            "host": platform.node(),
            "machine": machine_id(),
            "pid": os.getpid(),
            "state": "starting",
            **about,
        }
        self._beats = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: OSError | None = None

    def set(self, **changes: object) -> None:
        """Change entries of the record; a disk error of an earlier beat is raised here."""
        if self._error is not None:
            raise self._error
        self._record = {**self._record, **changes}

    def tell(self, **changes: object) -> None:
        """Change entries of the record so that others see it before this returns."""
        self.set(**changes)
        self._beat()

    def __enter__(self) -> "Heart":
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._record = {**self._record, "state": "done" if kind is None else "stopped"}
        # The folder may be full or gone, which is why we stop: that error is already on its way.
        with contextlib.suppress(OSError):
            self._beat()

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._beat()
            except OSError as error:
                self._error = error
                return

    def _beat(self) -> None:
        with self._lock:
            self._beats += 1
            write_json(self._path, {**self._record, "beat": self._beats})


class Observer:
    """Watches the workers of a folder, and tells slow ones from dead and stuck ones."""

    def __init__(self, folder: str):
        self._folder = join(folder, "workers")
        self._seen: dict[tuple[str, str], tuple[object, float]] = {}

    def workers(self) -> list[dict]:
        """The records of all workers, in order of rank, with `alive` added."""
        names = sorted(n for n in list_names(self._folder) if not n.startswith("."))
        records = [self.worker(name.removesuffix(".json")) for name in names]
        return [record for record in records if record is not None]

    def worker(self, worker_id: str) -> dict | None:
        """The record of one worker with `alive` added, or None if there is no such worker."""
        record = read_json(join(self._folder, f"{worker_id}.json"))
        if record is not None:
            record["alive"] = self._is_alive(record)
        return record

    def _is_alive(self, record: dict) -> bool:
        if record["state"] in ("done", "stopped"):
            return False
        if record["machine"] == machine_id() and not process_runs(record["pid"]):
            return False
        silent = self._unchanged_for(record, "beat")
        idle = self._unchanged_for(record, "state", "chunk", "step")
        stuck = idle >= STUCK_AFTER_S and record["state"] != "waiting"
        return silent < DEAD_AFTER_S and not stuck

    def _unchanged_for(self, record: dict, *names: str) -> float:
        """Seconds since we first saw these entries as they are.

        Clocks of machines differ, so time is counted on ours.
        """
        key = (record["worker"], names[0])
        now = time.monotonic()
        values = [record.get(name) for name in names]
        before, since = self._seen.get(key, (None, now))
        if before != values:
            since = now
        self._seen[key] = (values, since)
        return now - since


class Claims:
    """Claims of the chunks of a folder, one file each, holding the name of the worker."""

    def __init__(self, folder: str, worker_id: str):
        self._folder = join(folder, "claims")
        self._worker_id = worker_id
        self._observer = Observer(folder)

    def take(self, chunk: int) -> bool:
        """Claim a chunk; False if a live worker has it. A dead worker's claim is taken over."""
        path = join(self._folder, f"{chunk:07}.json")
        if create_exclusively(path, f'"{self._worker_id}"'):
            return True
        owner = read_json(path)
        if owner is not None:
            record = self._observer.worker(owner)
            if record is not None and record["alive"]:
                return False
            remove(path)
        return create_exclusively(path, f'"{self._worker_id}"')

    def release(self, chunk: int) -> None:
        remove(join(self._folder, f"{chunk:07}.json"))


def machine_id() -> str:
    """What tells this machine (and container) from others, beyond a host name used twice."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return f"{platform.node()}-{uuid.getnode()}"


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is there and more than a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        # Fields of stat after the command's closing bracket begin with the state.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
