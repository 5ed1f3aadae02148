"""Who works on a folder, and is it alive: a small file of each process, written every second.

Only people, and the launcher for its own processes, go by it. No work depends on it: samples are
deterministic and chunks whole or not there, so a process that is silent merely leaves chunks that
others sample in the end.
"""

import contextlib
import os
import platform
import sys
import threading
import time
import uuid
from pathlib import Path

from esddpm_io.atomic import write_json
from esddpm_io.files import join, list_names, read_json, remove

FOLDER = "workers"
BEAT_S = 1.0
# A process that has not written for so long has stopped: many beats, for a shared folder lags.
DEAD_AFTER_S = 60.0


class Heartbeat:
    """This process's record in `workers/`: who it is and what it does.

    Use as a context manager; `set` changes what the record says from the next beat on, `tell`
    at once. A process that ends as it should takes its record away.
    """

    def __init__(self, folder: str, **about: object):
        self.worker_id = f"{about['rank']:04}-{uuid.uuid4().hex[:8]}"
        self._path = join(folder, FOLDER, f"{self.worker_id}.json")
        self._record: dict[str, object] = {
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

    def __enter__(self) -> "Heartbeat":
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # The folder may be full or gone, which is why we stop: that error is already on its way.
        with contextlib.suppress(OSError):
            if kind is None:
                remove(self._path)
            else:
                self._record = {**self._record, "state": "stopped"}
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
    """Watches the workers of a folder, and tells slow ones from dead ones."""

    def __init__(self, folder: str):
        self._folder = join(folder, FOLDER)
        self._seen: dict[str, tuple[object, float]] = {}

    def workers(self) -> list[dict]:
        """The records of all workers, in order of rank, with `alive` added."""
        names = sorted(n for n in list_names(self._folder) if not n.startswith("."))
        records = [read_json(join(self._folder, name)) for name in names]
        there = [record for record in records if isinstance(record, dict)]
        return [{**record, "alive": self._is_alive(record)} for record in there]

    def forget_dead(self) -> None:
        """Remove the records of processes of this machine that are gone."""
        for worker in self.workers():
            if worker["machine"] == machine_id() and not process_runs(worker["pid"]):
                remove(join(self._folder, f"{worker['worker']}.json"))

    def close(self) -> None:
        """Forget the dead, and remove their folder where nobody is left."""
        self.forget_dead()
        with contextlib.suppress(OSError):  # others work on, or there is no folder (in a blob)
            os.rmdir(self._folder)

    def _is_alive(self, record: dict) -> bool:
        if record["state"] == "stopped":
            return False
        if record["machine"] == machine_id() and not process_runs(record["pid"]):
            return False
        # Clocks of machines differ, so time is counted on ours, from when we first saw the beat.
        now = time.monotonic()
        beat, since = self._seen.get(record["worker"], (None, now))
        if beat != record["beat"]:
            since = now
        self._seen[record["worker"]] = (record["beat"], since)
        return now - since < DEAD_AFTER_S


def machine_id() -> str:
    """What tells this machine (and container) from others, beyond a host name used twice."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    return f"{platform.node()}-{uuid.getnode()}"


def process_runs(pid: int) -> bool:
    """Whether a process of this machine is there and more than a zombie; on Windows always True."""
    if sys.platform == "win32":  # where signal 0 is Ctrl-C; a heart that stops is noticed, too
        return True
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
