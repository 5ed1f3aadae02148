"""All workers of a folder in one screen, read from what they write into it."""

import dataclasses
import os
import sys
import time
from typing import TextIO

from esddpm_io.progress import progress_text
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer
from guided_diffusion.sampling.queue import JobQueue

_SCREEN_EVERY_S = 0.5
_LOG_EVERY_S = 30.0
_COLUMNS = "{:>5} {:<14} {:<8} {:<9} {:>9} {:>10}  {}"


@dataclasses.dataclass(frozen=True)
class Overview:
    """Where samples stand, in `unit`s. rate: of these a second, all workers together."""

    total: int
    done: int
    rate: float
    workers: list[dict]
    unit: str = "images"
    queue: str = ""  # on the Slurm jobs that are left

    @property
    def complete(self) -> bool:
        return self.done == self.total

    def headline(self) -> str:
        if self.complete:
            return f"{self.total} {self.unit}, all of them"
        return progress_text(self.done, self.total, self.unit, self.rate)

    def line(self) -> str:
        """All in one line, for a log."""
        live = sum(worker["alive"] for worker in self.workers)
        workers = "" if self.complete else f"; {live} worker{'' if live == 1 else 's'}"
        queue = f"; {self.queue}" if self.queue else ""
        return f"{self.headline()}{workers}{queue}"

    def table(self) -> list[str]:
        """One line on all, and one for each worker."""
        missing = self.total - self.done
        lines = [f"done {self.headline()}" + (f", {missing} missing" if missing else "")]
        if self.queue:
            lines.append(self.queue)
        if self.workers:
            titles = ("rank", "host", "device", "state", "images", "images/s", "at")
            lines.append(_COLUMNS.format(*titles))
        for worker in self.workers:
            lines.append(
                _COLUMNS.format(
                    worker["rank"],
                    worker["host"][:14],
                    worker["device"],
                    worker["state"] if worker["alive"] else "dead",
                    f"{worker.get('images', 0):.0f}",
                    f"{worker.get('rate', 0):.3g}",
                    _position(worker),
                )
            )
        return lines


class Monitor:
    """Looks at folders again and again.

    Those of several runs, which take different numbers of steps an image, are measured in network
    evaluations.
    """

    def __init__(self, *folders: ChunkFolder):
        self._folders = folders
        self._unit = "images" if len(folders) == 1 else "network evaluations"
        several = len(folders) > 1
        self._weights = [len(f.run.sampler.timesteps) if several else 1 for f in folders]
        self._observers = [Observer(folder.folder) for folder in folders]
        self._queue = JobQueue(folder.folder for folder in folders)
        self._began, self._done_then = time.monotonic(), self._done()

    def look(self) -> Overview:
        """The state of this moment."""
        found = [observer.workers() for observer in self._observers]
        done = self._done()
        rate = sum(
            weight * worker.get("rate", 0.0)
            for workers, weight in zip(found, self._weights, strict=True)
            for worker in workers
            if worker["alive"]
        )
        if not rate:  # nobody is at work (any more): what we saw ourselves
            rate = (done - self._done_then) / max(time.monotonic() - self._began, 1e-9)
        pairs = list(zip(self._folders, self._weights, strict=True))
        total = sum(weight * folder.num_samples for folder, weight in pairs)
        where = [os.path.basename(f.folder) if len(pairs) > 1 else "" for f in self._folders]
        all_workers = [
            {**worker, "folder": name}
            for name, workers in zip(where, found, strict=True)
            for worker in workers
        ]
        return Overview(total, done, rate, all_workers, self._unit, self._queue.look())

    def _done(self) -> int:
        pairs = zip(self._folders, self._weights, strict=True)
        return sum(weight * folder.count_done() for folder, weight in pairs)


class Screen:
    """Shows overviews: a table in place on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._lines_up = 0
        # A terminal has its table at once; a log's first line has something to tell.
        self._next = 0.0 if self._on_terminal else time.monotonic() + _LOG_EVERY_S

    def is_due(self) -> bool:
        """Whether it is time to look and show again."""
        return time.monotonic() >= self._next

    def show(self, overview: Overview) -> None:
        """Show an overview now."""
        every = _SCREEN_EVERY_S if self._on_terminal else _LOG_EVERY_S
        self._next = time.monotonic() + every
        if not self._on_terminal:
            print(overview.line(), file=self._stream, flush=True)
            return
        lines = overview.table()
        up = f"\x1b[{self._lines_up}A" if self._lines_up else ""
        # Each line is cleared to its end, and what is below the last one too.
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"{up}{text}\x1b[J", end="", file=self._stream, flush=True)
        self._lines_up = len(lines)

    def note(self, message: str) -> None:
        """Print a message that stays, above the table."""
        up = f"\x1b[{self._lines_up}A\x1b[J" if self._lines_up else ""
        print(f"{up}{message}", file=self._stream, flush=True)
        self._lines_up = 0
        self._next = 0.0 if self._on_terminal else self._next


def _position(worker: dict) -> str:
    if worker["state"] != "sampling":
        return ""
    start, stop = worker["indices"]
    where = f"images {start}-{stop - 1}"
    if "step" in worker:
        where += f", step {worker['step']}/{worker['steps']}"
    return f"{worker['folder']}: {where}" if worker.get("folder") else where
