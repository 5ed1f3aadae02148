"""Files and folders, on a disk or in a blob store, under one set of names."""

import contextlib
import hashlib
import json
import os
import uuid
import zipfile
from pathlib import Path
from typing import BinaryIO

from esddpm_io.errors import UserError

BLOB_SCHEMES = ("gs://", "az://", "s3://", "http://", "https://")


def is_blob(path: str | os.PathLike) -> bool:
    """Whether `path` names something in a blob store rather than on a disk."""
    return str(path).startswith(BLOB_SCHEMES)


def blobfile():
    """The optional blobfile package, which reads and writes `gs://` and `az://` paths."""
    try:
        import blobfile as package
    except ImportError as error:
        raise UserError("blob paths need the blobfile package: pip install blobfile") from error
    return package


def open_binary(path: str | os.PathLike, *, flag: str = "") -> BinaryIO:
    """Open a file for reading; `flag` is named in the error if it cannot be opened."""
    prefix = f"{flag}: " if flag else ""
    if is_blob(path):
        package = blobfile()
        try:
            return package.BlobFile(str(path), "rb")
        except (package.Error, FileNotFoundError, ValueError) as error:
            raise UserError(f"{prefix}cannot read {path}: {error}") from error
    try:
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
    """The contents of a JSON file that others may replace or remove, None if it is not there."""
    try:
        if is_blob(path):
            return json.loads(blobfile().read_text(str(path)))
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def remove(path: str | os.PathLike) -> None:
    """Remove a file; it is no error if another process did so before."""
    with contextlib.suppress(FileNotFoundError):
        blobfile().remove(str(path)) if is_blob(path) else os.remove(path)


def create_exclusively(path: str | os.PathLike, text: str) -> bool:
    """Make a small file unless there is one already; return whether this call made it.

    Of several processes one wins. A blob store has no such operation: there two that call at the
    same moment may both win.
    """
    if is_blob(path):
        package = blobfile()
        if package.exists(str(path)):
            return False
        package.write_text(str(path), text)
        return True
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Written whole under a name of its own, then linked, so that no reader sees half a file.
    temporary = Path(path).with_name(f".tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def fingerprint_file(path: str | os.PathLike, *, flag: str = "") -> str:
    """A hash of a file's contents; of a zip archive (.npz, .pt) that of its directory's CRCs."""
    digest = hashlib.sha256()
    with open_binary(path, flag=flag) as stream:
        if zipfile.is_zipfile(stream):
            for info in zipfile.ZipFile(stream).infolist():
                digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\0".encode())
        else:
            stream.seek(0)
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
