"""Child processes that end when their parents do; the cores that we may use, and what these can."""

import contextlib
import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# In the environment of a child: the pid of the parent without which it has nobody to work for.
PARENT_VARIABLE = "ESDDPM_LAUNCHER_PID"
_PATIENCE_S = 15.0  # for a child to end by itself after SIGTERM
_POLL_S = 0.5


def run_to_end(argv: list[str], env: Mapping[str, str] | None = None) -> int:
    """Run `argv` and return its exit code (128 + N if signal N ended it, as a shell has it).

    Its environment is `env`, or ours.
    """
    with running(argv, env=env) as process:
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A child process, which is ended where the block is left before it, by an interrupt too.

    It then gets SIGTERM, time to clean up, and in the end SIGKILL. It has a session of its own, so
    that Ctrl-C comes to us alone and reaches it once, through us. options: those of `Popen`.
    """
    process = subprocess.Popen(argv, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def watch_parent(parent: int, when_gone: Callable[[], object]) -> None:
    """Call a function, on a thread, when our parent is not the process `parent` any more.

    The number comes from the parent itself: it may be gone before we ask who it is.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        when_gone()

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 rather than imitating it (known on Linux only)."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(info.read().split())
    return False


def available_cores() -> int:
    """How many cores this process may run on; where the system does not say, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows
