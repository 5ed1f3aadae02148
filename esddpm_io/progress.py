"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator

_LOG_EVERY_S = 30.0
_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress is shown within the block: for library calls."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


class Progress:
    """Counts to `total` (None: no end) with rate and time left; use as a context manager.

    On a terminal this is a bar; anywhere else a line at the start, every half minute and at the
    end, so that a log stays short. done: what an earlier run did, which no rate counts.
    """

    def __init__(self, total: int | None, unit: str, desc: str, done: int = 0):
        self._total, self._unit, self._desc = total, unit, desc
        self._done = self._earlier = done
        self._started = self._last_line = time.monotonic()
        self._bar = None
        self._is_quiet = _quiet.get()
        if self._is_quiet:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, desc=desc, initial=done, dynamic_ncols=True)
        elif total is not None:
            print(f"{desc}: {total} {unit}", file=sys.stderr, flush=True)

    def update(self, n: int, note: str = "") -> None:
        """Count `n` more; `note` is shown behind the figures."""
        self._done += n
        if self._is_quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last_line >= _LOG_EVERY_S or self._done == self._total:
            self._last_line = now
            print(self._line(now, note), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, now: float, note: str) -> str:
        rate = (self._done - self._earlier) / max(now - self._started, 1e-9)
        text = progress_text(self._done, self._total, self._unit, rate)
        return f"{self._desc}: {text}{'; ' + note if note else ''}"


def progress_text(done: int, total: int | None, unit: str, rate: float) -> str:
    """One line of figures: `rate` is in units a second."""
    if total is None:
        return f"{done} {unit}, {rate:.3g} {unit}/s"
    share = 100 * done / max(total, 1)
    text = f"{done}/{total} {unit} ({share:.0f}%), {rate:.3g} {unit}/s"
    if rate > 0 and done < total:
        text += f", {duration((total - done) / rate)} left"
    return text


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
