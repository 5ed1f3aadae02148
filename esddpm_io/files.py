"""Opening a file for reading, on a disk or in a blob store."""

import os
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
