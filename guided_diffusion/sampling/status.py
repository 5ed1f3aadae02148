"""All workers of a folder in one screen, read from what they write into it."""

import dataclasses
import sys
import time
from typing import TextIO

from esddpm_io.progress import progress_text
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer

_SCREEN_EVERY_S = 0.5
_LOG_EVERY_S = 30.0
_COLUMNS = "{:>5} {:<14} {:<8} {:<9} {:>9} {:>10}  {}"


@dataclasses.dataclass(frozen=True)
class Overview:
    """Where a folder of samples stands. rate: images a second of all workers together."""

    total: int
    done: int
    rate: float
    workers: list[dict]

    @property
    def complete(self) -> bool:
        return self.done == self.total

    def headline(self) -> str:
        if self.complete:
            return f"{self.total} images, all of them"
        return progress_text(self.done, self.total, "images", self.rate)

    def line(self) -> str:
        """All in one line, for a log."""
        live = sum(worker["alive"] for worker in self.workers)
        workers = "" if self.complete else f"; {live} worker{'' if live == 1 else 's'}"
        return f"{self.headline()}{workers}"

    def table(self) -> list[str]:
        """One line on all, and one for each worker."""
        missing = self.total - self.done
        lines = [f"done {self.headline()}" + (f", {missing} missing" if missing else "")]
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
    """Looks at a folder again and again."""

    def __init__(self, folder: ChunkFolder):
        self._folder = folder
        self._observer = Observer(folder.folder)
        self._began, self._done_then = time.monotonic(), folder.count_done()

    def look(self) -> Overview:
        """The state of this moment."""
        workers = self._observer.workers()
        done = self._folder.count_done()
        rate = sum(worker.get("rate", 0.0) for worker in workers if worker["alive"])
        if not rate:  # nobody is at work (any more): what we saw ourselves
            rate = (done - self._done_then) / max(time.monotonic() - self._began, 1e-9)
        return Overview(self._folder.num_samples, done, rate, workers)


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
    return where
