"""Fetching one big file over HTTP: resumed, checked, and in place only when it is whole."""

import base64
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from esddpm_io.errors import UserError, describe_os_error
from esddpm_io.progress import Progress

_BLOCK = 1 << 20  # bytes between two steps of the progress bar
_TIMEOUT_S = 30  # without a byte, after which a connection counts as lost
_FRUITLESS_TRIES = 3  # connections in a row that may bring nothing before we give up
_MEGABYTE = 1e6


@dataclass(frozen=True)
class _Remote:
    """What the server says of a file: its size in bytes and, if it keeps one, its MD5 digest."""

    size: int
    md5: bytes | None


def download(url: str, path: str | os.PathLike, *, expected_bytes: int | None = None) -> bool:
    """Fetch `url` into the file `path`; return False if a good one was there already.

    The data goes to `path` + ".part", where a later call goes on, and takes its final name once
    its size, its MD5 digest (if the server states one) and its zip directory (.npz) are right. A
    file that is there is never overwritten: it is kept if its size is right or, where the server
    cannot be reached, if it looks whole. Raises UserError, naming the URL or the file, if the
    server cannot be reached, a file of another size is in the way or the disk is too small.
    """
    path = Path(path)
    if path.exists() and expected_bytes == path.stat().st_size and _looks_whole(path, path.suffix):
        return False
    try:
        remote = _ask(url)
    except UserError as error:
        if not path.exists() or expected_bytes is not None or not _looks_whole(path, path.suffix):
            raise UserError(f"{error}; or fetch it elsewhere and put it at {path}") from error
        print(f"{path}: kept as it is; its size was not checked: {error}", file=sys.stderr)
        return False
    if expected_bytes is not None and remote.size != expected_bytes:
        raise UserError(f"{url} has {remote.size} bytes now, not the {expected_bytes} expected")
    if path.exists():
        _keep(path, remote, url)
        return False
    _fetch(url, path, remote)
    return True


def _ask(url: str) -> _Remote:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            size, md5 = answer.headers["Content-Length"], answer.headers["Content-MD5"]
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot reach {url} ({reason}): check the network") from error
    if size is None:
        raise UserError(f"{url}: the server does not tell the size of the file")
    return _Remote(int(size), base64.b64decode(md5) if md5 else None)


def _keep(path: Path, remote: _Remote, url: str) -> None:
    """Accept the file that is there, or say what is wrong with it."""
    size = path.stat().st_size
    if size != remote.size:
        raise UserError(
            f"{path} has {size} bytes and {url} {remote.size}: it is truncated or another file; "
            "move it away and start again"
        )
    if not _looks_whole(path, path.suffix):
        raise UserError(f"{path} is damaged: move it away and start again")


def _looks_whole(path: Path, suffix: str) -> bool:
    """Whether the file can be what `suffix` says: the directory of a zip is its last part."""
    return suffix != ".npz" or zipfile.is_zipfile(path)


def _fetch(url: str, path: Path, remote: _Remote) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if part.exists() and part.stat().st_size > remote.size:
        part.unlink()
    done = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if free < remote.size - done:
        raise UserError(
            f"{path} needs {remote.size - done:,} bytes more, and {path.parent} has {free:,} free"
        )
    if done:
        print(f"{path.name}: going on after {done:,} bytes", file=sys.stderr)
    with Progress(round(remote.size / _MEGABYTE), "MB", path.name) as bar:
        _fill(url, part, remote.size, bar)
    _check(url, part, path, remote)
    os.replace(part, path)


def _fill(url: str, part: Path, total: int, bar: Progress) -> None:
    """Append to `part` until it has `total` bytes, over as many connections as it takes."""
    fruitless = shown = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        shown = _show(bar, before, shown)
        if before == total and part.exists():
            return
        problem = None
        try:
            for size in _receive(url, part, before, total):
                shown = _show(bar, size, shown)
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and describe_os_error(error):
                raise  # the disk is full: no other connection will help
            problem = getattr(error, "reason", error)
        after = part.stat().st_size if part.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if after < total and fruitless >= _FRUITLESS_TRIES:
            raise UserError(
                f"{url}: the connection was lost at {after:,} of {total:,} bytes "
                f"({problem or 'closed by the server'}); start the same command again to go on"
            )
        if fruitless:
            time.sleep(fruitless)


def _show(bar: Progress, size: int, shown: int) -> int:
    """Move the bar to `size` bytes; it counts whole megabytes, of which `shown` are shown."""
    reached = round(size / _MEGABYTE)
    if reached > shown:
        bar.update(reached - shown)
    return max(reached, shown)


def _receive(url: str, part: Path, start: int, total: int):
    """One connection: append from byte `start` on; yields the size of `part` after each block."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        # A server that knows no ranges sends the whole file: begin again.
        resumed = answer.status == http.client.PARTIAL_CONTENT
        if resumed and not answer.headers["Content-Range"].startswith(f"bytes {start}-"):
            raise http.client.HTTPException(f"wrong range {answer.headers['Content-Range']}")
        size = start if resumed else 0
        with open(part, "ab" if resumed else "wb") as out:
            while size < total and (block := answer.read(min(_BLOCK, total - size))):
                out.write(block)
                size += len(block)
                yield size
            out.flush()
            os.fsync(out.fileno())


def _check(url: str, part: Path, path: Path, remote: _Remote) -> None:
    """Refuse, and remove, a complete `part` whose contents are wrong."""
    problem = None
    if remote.md5 is not None:
        with open(part, "rb") as stream:
            if hashlib.file_digest(stream, "md5").digest() != remote.md5:
                problem = "its MD5 digest is not the server's"
    if problem is None and not _looks_whole(part, path.suffix):
        problem = "it is not a zip archive"
    if problem:
        part.unlink()
        raise UserError(f"{url} arrived damaged ({problem}): start the same command again")
