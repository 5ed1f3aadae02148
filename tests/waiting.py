"""Waiting for what other processes do: long enough for slow machines, no longer than it takes."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 600.0  # many times what anything here takes on an idle machine
_POLL_S = 0.005
T = TypeVar("T")


def wait_until(condition: Callable[[], T], *processes: subprocess.Popen) -> T:
    """The first true value of `condition()`; none of the processes may end before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"in vain for {PATIENCE_S:.0f} seconds"
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(_POLL_S)
    return value
