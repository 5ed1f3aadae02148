"""Fetching one big file over HTTP: resumed, checked, and in place only when it is whole."""

import base64
import contextlib
import hashlib
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from esddpm_io.errors import UserError, first_line
from esddpm_io.progress import Progress

if TYPE_CHECKING:
    import requests

_BLOCK = 1 << 20  # bytes between two steps of the progress bar
_TIMEOUT_S = 30  # without a byte, after which a connection counts as lost
_FRUITLESS_TRIES = 3  # connections in a row that may bring nothing before we give up
_RETRIES, _BACKOFF_S = 3, 0.3  # of a request without an answer: after 0, 0.6 and 1.2 seconds
_BUSY = (429, 500, 502, 503, 504)  # answers that another try may change
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


@contextlib.contextmanager
def _connection(url: str) -> Iterator[tuple["requests.Session", tuple[type[Exception], ...]]]:
    """A session, and the errors of its connections; UserError for what the server refuses.

    Requests that fail before the data come are tried again; proxies, certificates and ~/.netrc are
    those that requests finds.
    """
    import requests
    from urllib3.exceptions import HTTPError
    from urllib3.util import Retry

    retry = Retry(_RETRIES, backoff_factor=_BACKOFF_S, status_forcelist=_BUSY)
    retry.raise_on_status = False
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
        try:
            yield session, (requests.ConnectionError, requests.Timeout, HTTPError)
        except requests.HTTPError as error:
            answer = error.response
            raise UserError(
                f"{url}: the server answers {answer.status_code} {answer.reason}"
            ) from error
        except requests.RequestException as error:
            raise UserError(f"cannot reach {url} ({_reason(error)}): check the network") from error


def _reason(error: Exception) -> str:
    """What went wrong with a connection, without the attempts around it."""
    cause = error.args[0] if error.args else error
    return first_line(getattr(cause, "reason", None) or error)


def _ask(url: str) -> _Remote:
    with _connection(url) as (session, _):
        answer = session.head(url, timeout=_TIMEOUT_S, allow_redirects=True)
        answer.raise_for_status()
    size, md5 = answer.headers.get("Content-Length"), answer.headers.get("Content-MD5")
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
    fruitless, shown = 0, 0
    after = part.stat().st_size if part.exists() else -1
    while after != total:
        before = max(after, 0)
        shown = _show(bar, before, shown)
        problem = "closed by the server"
        with _connection(url) as (session, lost):
            try:
                for size in _receive(session, url, part, before, total):
                    shown = _show(bar, size, shown)
            except lost as error:
                problem = _reason(error)
        after = part.stat().st_size if part.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if after < total and fruitless >= _FRUITLESS_TRIES:
            raise UserError(
                f"{url}: the connection was lost at {after:,} of {total:,} bytes "
                f"({problem}); start the same command again to go on"
            )
        if fruitless:
            time.sleep(fruitless)


def _show(bar: Progress, size: int, shown: int) -> int:
    """Move the bar to `size` bytes; it counts whole megabytes, of which `shown` are shown."""
    reached = round(size / _MEGABYTE)
    if reached > shown:
        bar.update(reached - shown)
    return max(reached, shown)


def _receive(
    session: "requests.Session", url: str, part: Path, start: int, total: int
) -> Iterator[int]:
    """One connection: append from byte `start` on; yields the size of `part` after each block."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=headers, timeout=_TIMEOUT_S, stream=True) as answer:
        answer.raise_for_status()
        # A server that knows no ranges sends the whole file: begin again.
        resumed = answer.status_code == HTTPStatus.PARTIAL_CONTENT
        if resumed and not answer.headers["Content-Range"].startswith(f"bytes {start}-"):
            raise UserError(
                f"{url}: the server sends {answer.headers['Content-Range']}, not the"
                f" bytes from {start} on: remove {part} and start again"
            )
        size = start if resumed else 0
        with open(part, "ab" if resumed else "wb") as out:
            # What has come counts, also of a connection that is lost within a block.
            while size < total and (block := answer.raw.read1(min(_BLOCK, total - size))):
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
