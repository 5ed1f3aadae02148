"""A child process that ends when we do, and the cores that we may use."""

import os
import subprocess
from collections.abc import Mapping

_PATIENCE_S = 15.0  # for a child to end by itself after SIGTERM


def run_to_end(argv: list[str], env: Mapping[str, str] | None = None) -> int:
    """Run `argv` and return its exit code (128 + N if signal N ended it, as a shell has it).

    Its environment is `env`, or ours.
    If we are interrupted or terminated meanwhile, the child gets SIGTERM, time to clean up, and
    in the end SIGKILL; then the exception goes on. It has a session of its own, so that Ctrl-C
    comes to us alone and reaches it once, through us.
    """
    process = subprocess.Popen(argv, start_new_session=True, env=env)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise
    return code if code >= 0 else 128 - code


def available_cores() -> int:
    """How many cores this process may run on; where the system does not say, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows
