"""Reading and writing .npz files a few rows at a time, so that memory does not grow with them."""

import contextlib
import lzma
import math
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError
from esddpm_io.files import open_binary

_LOCAL_HEADER = struct.Struct("<26x2H")  # the two lengths that end a zip member's local header
_SKIP_BYTES = 1 << 20
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError),
    *(struct.error, RuntimeError),
)
# What NumPy's parser of headers lets through when their text is no Python literal
_BAD_HEADER = (tokenize.TokenError, SyntaxError, TypeError, KeyError, AttributeError)


class DamagedFile(UserError):
    """An .npz or .npy that is cut short, or whose bytes are not those that were written."""


class _NotNumbers(Exception):
    """An array of a kind that cannot be read here, in a file that may be whole."""


def read_npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of the .npy data in `stream`: shape, Fortran order, dtype."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"unsupported .npy version {version}")
    try:
        shape, fortran, dtype = read(stream)
    except _BAD_HEADER as error:
        raise ValueError("its header makes no sense") from error
    if dtype.hasobject:
        raise _NotNumbers("it holds Python objects, not numbers")
    if any(length < 0 for length in shape) or not dtype.itemsize:
        raise ValueError(f"its header says {dtype}{list(shape)}")
    return shape, fortran, dtype


class _Crc:
    """The CRC-32 of a member, taken as its bytes go by.

    It follows the bytes from the first to the last: whatever order they are asked for in, those
    that continue what was seen so far count, others do not. Raises `BadZipFile` as soon as all
    have been seen and the CRC is wrong, and with every read from then on.
    """

    def __init__(self, expected: int, size: int):
        self._expected, self._size = expected, size
        self._seen = self._value = 0

    def add(self, start: int, data: memoryview | bytes) -> None:
        """Bytes `data` of the member, from byte `start` on."""
        if start <= self._seen < start + len(data):
            self._value = zlib.crc32(data[self._seen - start :], self._value)
            self._seen = start + len(data)
        if self._seen == self._size and self._value != self._expected:
            raise zipfile.BadZipFile("bytes in it have changed: its CRC-32 is wrong")


class _Member:
    """One array inside a file: its header, and its rows wherever they are asked for.

    A stored array is read in place with seek and read. That costs no more than mapping it, works
    on blob files, and pages that were read do not stay in the process's memory. A compressed one
    is unpacked forward; asking for earlier rows starts again from its beginning.

    `size` is that of header and rows together, `crc` their CRC-32 or None where there is none to
    know. The zip layer checks that of a compressed member.
    """

    def __init__(
        self,
        open_stream: Callable[[], BinaryIO],
        *,
        seekable: bool,
        size: int,
        crc: int | None = None,
    ):
        self._open_stream = open_stream
        self._seekable = seekable
        self._crc = None if crc is None else _Crc(crc, size)
        self._restart()
        expected = self._header_bytes + self.dtype.itemsize * math.prod(self.shape)
        if size != expected:
            raise ValueError(f"{size} bytes, its header speaks of {expected}")
        if self._crc:
            self._stream.seek(self._begin)
            self._crc.add(0, self._stream.read(self._header_bytes))

    def _restart(self) -> None:
        self._stream = self._open_stream()
        self._begin = self._stream.tell()
        self.shape, self.fortran, self.dtype = read_npy_header(self._stream)
        self._header_bytes = self._stream.tell() - self._begin
        self._next_row = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.fortran and len(self.shape) > 1:
            return self.array()[start:stop]
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        if self._seekable:
            self._stream.seek(self._begin + self._header_bytes + start * row_bytes)
        else:
            self._forward_to(start, row_bytes)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._fill(out, start * row_bytes)
        self._next_row = stop
        return out

    def array(self) -> np.ndarray:
        if not self.shape:
            out = np.empty((1,), self.dtype)
            self._restart()
            self._fill(out)
            return out.reshape(())
        if self.fortran and len(self.shape) > 1:
            self._restart()
            out = np.empty(self.shape[::-1], self.dtype)
            self._fill(out)
            return out.T
        return self.rows(0, self.shape[0])

    def _forward_to(self, row: int, row_bytes: int) -> None:
        if row < self._next_row:
            self._restart()
        skip = (row - self._next_row) * row_bytes
        while skip:
            got = len(self._stream.read(min(skip, _SKIP_BYTES)))
            if not got:
                raise EOFError("it ends early")
            skip -= got

    def _fill(self, out: np.ndarray, start: int = 0) -> None:
        """Read straight into the array, which begins at byte `start` of the rows: no copy."""
        whole = left = memoryview(out.reshape(-1).view(np.uint8))
        while left.nbytes:
            got = self._stream.readinto(left)
            if not got:
                raise EOFError("it ends early")
            left = left[got:]
        if self._crc:
            self._crc.add(self._header_bytes + start, whole)


class NpzReader:
    """The arrays of an .npz file, whole or by rows (rows are indices of the first axis).

    Stored members are read in place, compressed ones are unpacked forward, so ask for rows in
    rising order. Raises `UserError`, naming the file, if it is missing or lacks the array asked
    for, and `DamagedFile`, naming the array too, if it is not an npz, cut short, or changed.

    The CRC-32 of a member is verified by the read that completes it: by `array`, and by `rows`
    once they have gone from the first to the last in rising order. Rows that are skipped or only
    read out of order are not verified; `verify` is for those who read so.
    """

    def __init__(self, path: str | os.PathLike, *, flag: str = ""):
        self.path = path
        self._prefix = f"{flag}: " if flag else ""
        self._file = open_binary(path, flag=flag)
        self._members: dict[str, _Member] = {}
        with self._explained():
            self._zip = zipfile.ZipFile(self._file)
        suffix = ".npy"
        self._infos = {
            info.filename.removesuffix(suffix): info
            for info in self._zip.infolist()
            if info.filename.endswith(suffix)
        }

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._member(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._member(name).dtype

    def crc(self, name: str) -> int:
        """CRC-32 of the member's contents as the zip directory has it: free, and content-based."""
        self._member(name)
        return self._infos[name].CRC

    def is_stored(self, name: str) -> bool:
        """Whether the array lies there uncompressed, so that any row can be read at once."""
        self._member(name)
        return self._infos[name].compress_type == zipfile.ZIP_STORED

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start … stop-1 (0 <= start <= stop <= length) as an array of their own."""
        member = self._member(name)
        if not member.shape or not 0 <= start <= stop <= member.shape[0]:
            raise ValueError(f"rows {start}:{stop} are outside {name} of shape {member.shape}")
        with self._explained(name):
            return member.rows(start, stop)

    def array(self, name: str) -> np.ndarray:
        """The whole array."""
        member = self._member(name)
        with self._explained(name):
            return member.array()

    def verify(self) -> None:
        """Read everything once: `DamagedFile`, naming the array, unless each member is whole."""
        for name in self._infos:
            self._member(name)
        for info in self._zip.infolist():
            with self._explained(info.filename.removesuffix(".npy")), self._zip.open(info) as data:
                while data.read(_SKIP_BYTES):
                    pass

    def close(self) -> None:
        self._members.clear()
        self._zip.close()
        self._file.close()

    def __enter__(self) -> "NpzReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            if name not in self._infos:
                there = ", ".join(self._infos) or "no arrays"
                raise UserError(f"{self._prefix}{self.path} has no {name} (it has {there})")
            with self._explained(name):
                self._members[name] = self._open_member(self._infos[name])
        return self._members[name]

    def _open_member(self, info: zipfile.ZipInfo) -> _Member:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return _Member(lambda: self._zip.open(info), seekable=False, size=info.file_size)

        def at_start_of_data() -> BinaryIO:
            self._file.seek(info.header_offset)
            name_length, extra_length = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
            self._file.seek(name_length + extra_length, os.SEEK_CUR)
            return self._file

        return _Member(at_start_of_data, seekable=True, size=info.file_size, crc=info.CRC)

    def _explained(self, name: str = ""):
        what = f"{name} in {self.path}" if name else f"{self.path}"
        return _explained(f"{self._prefix}{what}", ".npz")


class NpyReader:
    """The one array of an .npy file by rows; errors as `NpzReader`, but it has no CRC."""

    def __init__(self, path: str | os.PathLike, *, flag: str = ""):
        self._what = f"{flag}: {path}" if flag else f"{path}"
        self._file = open_binary(path, flag=flag)

        def at_start() -> BinaryIO:
            self._file.seek(0)
            return self._file

        with _explained(self._what, ".npy"):
            size = self._file.seek(0, os.SEEK_END)
            self._member = _Member(at_start, seekable=True, size=size)
        self.shape, self.dtype = self._member.shape, self._member.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        with _explained(self._what, ".npy"):
            return self._member.rows(start, stop)


@contextlib.contextmanager
def _explained(what: str, kind: str):
    """Turns what reading a broken file raises into one line about `what`."""
    try:
        yield
    except _NotNumbers as error:
        raise UserError(f"{what} cannot be used: {error}") from error
    except (*_BROKEN, OSError) as error:
        # bz2 raises an OSError for damaged data, without the number that those of a disk have.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise DamagedFile(
            f"{what} is not a complete {kind} file ({error}): fetch or make it anew"
        ) from error


class NpzWriter:
    """Write arrays of known shape row by row into an .npz that appears only when it is complete.

    `arrays` maps each name to (shape, dtype). Rows may be appended to the arrays in any
    alternation. Members are stored, so that readers can read them in place, or deflated with
    `compressed`, for files that ship where a few megabytes count. The first array is streamed to
    its place, the others wait in a temporary file on the same disk: give the largest one first.
    Leaving the block with rows missing is a `ValueError`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        arrays: dict[str, tuple[tuple[int, ...], np.dtype | type]],
        *,
        compressed: bool = False,
    ):
        self._path = path
        self._compression = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        self._arrays = {n: (tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in arrays.items()}
        self._written = dict.fromkeys(arrays, 0)

    def __enter__(self) -> "NpzWriter":
        first, *others = self._arrays
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._zip = stack.enter_context(zipfile.ZipFile(temporary, "w"))
            self._streams = {first: stack.enter_context(self._open_member(first))}
            for name in others:
                spool = tempfile.TemporaryFile(dir=temporary.parent)
                self._streams[name] = stack.enter_context(spool)
            self._stack = stack.pop_all()
        return self

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows [n, …] to the array; they must fit its shape and dtype."""
        shape, dtype = self._arrays[name]
        rows = np.ascontiguousarray(rows)
        end = self._written[name] + len(rows)
        if rows.shape[1:] != shape[1:] or rows.dtype != dtype or end > shape[0]:
            raise ValueError(
                f"{rows.dtype}{list(rows.shape)} after row {self._written[name]} does not fit "
                f"{name}, {dtype}{list(shape)}"
            )
        self._streams[name].write(rows.reshape(-1).view(np.uint8).data)
        self._written[name] = end

    def __exit__(self, kind, value, traceback) -> None:
        with self._stack:  # sees the error too, and then takes the temporary file away
            if value is not None:
                raise value
            self._finish()

    def _finish(self) -> None:
        for name, (shape, _) in self._arrays.items():
            if self._written[name] != shape[0]:
                raise ValueError(f"{name} got {self._written[name]} of {shape[0]} rows")
        first, *others = self._arrays
        self._streams[first].close()
        for name in others:
            waiting = self._streams[name]
            waiting.seek(0)
            with self._open_member(name) as member:
                shutil.copyfileobj(waiting, member, _SKIP_BYTES)

    def _open_member(self, name: str):
        shape, dtype = self._arrays[name]
        info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same arrays give the same file
        info.compress_type = self._compression
        info.file_size = dtype.itemsize * math.prod(shape) + 4096
        stream = self._zip.open(info, "w")
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        return stream
