"""Files that are there whole or not at all."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from esddpm_io.files import blobfile, is_blob


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` once the block has succeeded.

    The data is flushed to the disk before the rename, so a crash leaves the old file or the new
    one. If the block raises, the temporary file is removed and `path` is untouched. The folder is
    made if it is missing. The temporary name ends like `path`, for writers that go by the suffix.
    A blob is written to a local file first and uploaded when the block has succeeded.
    """
    if is_blob(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / str(path).rsplit("/", 1)[-1]
            yield temporary
            blobfile().copy(str(temporary), str(path), overwrite=True)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, obj: object) -> None:
    """Write `obj` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=2) + "\n", encoding="utf-8")
