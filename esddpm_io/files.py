"""Files and folders, on a disk or in a blob store, under one set of names."""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
import types
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from esddpm_io.errors import UserError, first_line

BLOB_SCHEMES = ("gs://", "az://")
_AZURE_URL = re.compile(r"https://[^/]+\.blob\.core\.windows\.net/")  # the same store as az://
_ANY_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BLOB_RETRIES = 10  # of a request, half a minute in all; blobfile's own default is for ever
_SILENT_RETRIES = 6  # those after them are told


def is_blob(path: str | os.PathLike) -> bool:
    """Whether `path` names something in a blob store rather than on a disk.

    UserError for an address of another kind, such as s3://, which cannot be used.
    """
    text = str(path)
    if text.startswith(BLOB_SCHEMES) or _AZURE_URL.match(text):
        return True
    if _ANY_SCHEME.match(text):
        raise UserError(
            f"{text} cannot be used: give a path on a disk, or of a store, beginning with "
            f"{' or '.join(BLOB_SCHEMES)}"
        )
    return False


def blobfile():
    """What the optional blobfile package reads and writes `gs://` and `az://` paths with."""
    try:
        import blobfile as package
    except ImportError as error:
        raise UserError("blob paths need the blobfile package: pip install blobfile") from error
    return _blob_context(package)


@functools.cache
def _blob_context(package: types.ModuleType):
    """A context of our own, so that the settings of a program that imports us stay as they are."""
    return package.create_context(
        retry_limit=_BLOB_RETRIES,
        retry_log_threshold=_SILENT_RETRIES,
        retry_common_log_threshold=_SILENT_RETRIES,
        log_callback=lambda text: print(text, file=sys.stderr, flush=True),
    )


def open_binary(path: str | os.PathLike, *, flag: str = "") -> BinaryIO:
    """Open a file for reading; `flag` is named in the error if it cannot be opened."""
    prefix = f"{flag}: " if flag else ""
    if is_blob(path):
        store = blobfile()
        try:
            return store.BlobFile(str(path), "rb")
        except (sys.modules["blobfile"].Error, OSError, ValueError) as error:
            raise UserError(f"{prefix}cannot read {path}: {first_line(error)}") from error
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # to open one would wait for its writer
            raise UserError(f"{prefix}cannot read {path}: it is a pipe, not a file")
        return open(Path(path), "rb")
    except FileNotFoundError as error:
        raise UserError(f"{prefix}there is no file {path}") from error
    except OSError as error:
        raise UserError(f"{prefix}cannot read {path}: {error.strerror}") from error


def join(folder: str | os.PathLike, *parts: str) -> str:
    """A path inside `folder`, on a disk or in a blob store."""
    if is_blob(folder):
        return "/".join([str(folder).rstrip("/"), *parts])
    return os.path.join(folder, *parts)


def absolute(path: str | os.PathLike) -> str:
    """A path that a user typed, which starts where they stand, as an absolute one."""
    return str(path) if is_blob(path) else os.path.abspath(os.path.expanduser(path))


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """As many of the last parts of each path as no other path ends in."""
    parts = [tuple(str(path).rstrip("/").split("/")) for path in paths]
    endings = Counter(own[start:] for own in set(parts) for start in range(len(own)))

    def short(own: tuple[str, ...]) -> str:
        unique = [start for start in range(len(own)) if endings[own[start:]] == 1]
        return "/".join(own[max(unique, default=0) :])

    return [short(own) for own in parts]


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or folder `path`."""
    return blobfile().exists(str(path)) if is_blob(path) else os.path.exists(path)


def list_names(folder: str | os.PathLike) -> list[str]:
    """Names inside `folder`, in no order; none if there is no such folder."""
    if is_blob(folder):
        package = blobfile()
        return list(package.listdir(str(folder))) if package.isdir(str(folder)) else []
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def read_json(path: str | os.PathLike) -> object | None:
    """The contents of a JSON file that others may replace or remove, None if it is not there.

    UserError, naming the file, if it is no JSON.
    """
    try:
        if is_blob(path):
            return json.loads(blobfile().read_text(str(path)))
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error


def check_output_file(path: str | os.PathLike, *, flag: str) -> None:
    """UserError naming `flag` unless a file `path` could be written, before work goes into it.

    Nothing is left behind; its folder may be missing, if it can be made. A blob store is believed.
    """
    if is_blob(path):
        blobfile()
        return
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag}: {path} is not a file that could be replaced")
    _check_can_hold(path.parent, path, flag)


def check_output_folder(path: str | os.PathLike, *, flag: str) -> None:
    """UserError naming `flag` unless `path` is a folder to write in, or one that could be made."""
    if is_blob(path):
        blobfile()
        return
    _check_can_hold(Path(path), Path(path), flag)


def _check_can_hold(folder: Path, path: Path, flag: str) -> None:
    """Try to write where `folder` is or, if it is missing, where it would be made."""
    there = Path(os.path.abspath(folder))
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{flag}: {path} cannot be written: {there} is not a folder")
    try:
        # What a later mkdir or open will do; permissions alone tell root nothing of /proc.
        os.rmdir(tempfile.mkdtemp(prefix=".tmp-", dir=there))
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written: {error.strerror}") from error


def remove(path: str | os.PathLike) -> None:
    """Remove a file; it is no error if another process did so before."""
    with contextlib.suppress(FileNotFoundError):
        blobfile().remove(str(path)) if is_blob(path) else os.remove(path)


def sha256(path: str | os.PathLike, *, flag: str = "") -> str:
    """SHA-256 of a file's bytes; of a folder that of its files' names and bytes, hidden ones not.

    UserError, naming `flag`, if it cannot be read.
    """
    if not is_blob(path) and os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        parts = [f"{name}\0{sha256(join(path, name), flag=flag)}\0" for name in names]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    with open_binary(path, flag=flag) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_file(path: str | os.PathLike, *, flag: str = "") -> str:
    """A hash of a file's contents; of a zip archive (.npz, .pt) that of its directory's CRCs."""
    with open_binary(path, flag=flag) as stream:
        if zipfile.is_zipfile(stream):
            digest = hashlib.sha256()
            for info in zipfile.ZipFile(stream).infolist():
                digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\0".encode())
        else:
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256")
    return digest.hexdigest()[:16]
