"""What is to be known, beside the record of a run, to understand and repeat its results."""

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("torch", "numpy", "scipy", "tensorflow", "tensorflow-cpu")
_GIT_SECONDS = 5.0


def provenance() -> dict[str, object]:
    """Command line, date, machine, commit and versions of this process."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "version": _version("es-ddpm"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, "-dirty" if it was changed since."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
        return done.stdout.strip() or None
    return None
