"""Images by index: out of an .npz, an .npy or a folder, and into PNGs and grids."""

import contextlib
import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from esddpm_io.atomic import atomic_path, write_json
from esddpm_io.errors import UserError
from esddpm_io.files import blobfile, fingerprint_file, is_blob, open_binary, read_json
from esddpm_io.npz import NpyReader, NpzReader, NpzWriter
from esddpm_io.progress import Progress

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LABELLED_NAME = re.compile(r"\d+_label_(\d+)\.[^.]+$")
_FILES_AT_ONCE = 8
_SMALL = 128 * 128  # pixels of an image from which decoding is worth threads
_IMAGES_AT_ONCE = 64  # in memory, of what is written
_CAPTION_SIZE = 16  # pixels of a line of text
# What decoders raise for damaged files.
_BROKEN_IMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error),
    Image.DecompressionBombError,
)


class ImageSource:
    """N images of one size, read by index; memory use does not grow with N.

    `shape` is (N, H, W, 3), `has_labels` says whether every image has a class label. Label i is
    `class_names[i]` where the classes have names.
    """

    shape: tuple[int, int, int, int]
    has_labels: bool
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start … stop-1, uint8 [n, H, W, 3]."""
        raise NotImplementedError

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        """Their labels, int64 [n], or None if the source has none."""
        return None

    def pick(self, indices: Iterable[int]) -> np.ndarray:
        """Images of any indices, uint8 [n, H, W, 3]."""
        return np.concatenate([self.read(index, index + 1) for index in indices])

    def check(self) -> None:
        """`UserError`, naming the image, for what reading all of them would meet, at less cost.

        Files of one array are checked as far as their headers go when they are opened.
        """

    def fingerprint(self) -> str:
        """A hash that stays the same while the contents do, wherever the files lie."""
        raise NotImplementedError

    def stamp(self) -> str | None:
        """A hash that changes whenever the files do, without reading them.

        None where `fingerprint` reads no more than that itself.
        """
        return None


class HasContents(Protocol):
    """What `ImageSource` says of its contents."""

    def fingerprint(self) -> str | None: ...
    def stamp(self) -> str | None: ...


def noted_fingerprint(images: HasContents, note: str) -> str | None:
    """The fingerprint of images, noted in the file `note` where it costs reading all of them."""
    stamp = images.stamp()
    if stamp is None:
        return images.fingerprint()
    known = read_json(note)
    if not (isinstance(known, dict) and known.get("stamp") == stamp):
        known = {"stamp": stamp, "fingerprint": images.fingerprint()}
        write_json(note, known)
    return str(known["fingerprint"])


class _NpzImages(ImageSource):
    """`arr_0` uint8 [N, H, W, 3] and, where it is there, `arr_1` integer [N]."""

    def __init__(self, path: str, flag: str):
        self._reader = NpzReader(path, flag=flag)
        self.shape = check_image_array(
            self._reader.shape("arr_0"), self._reader.dtype("arr_0"), f"{flag}: arr_0 of {path}"
        )
        self.has_labels = "arr_1" in self._reader.names
        if self.has_labels:
            shape, dtype = self._reader.shape("arr_1"), self._reader.dtype("arr_1")
            if shape != self.shape[:1] or dtype.kind not in "iu":
                raise UserError(
                    f"{flag}: the labels arr_1 of {path} are {dtype}{list(shape)}, they must be "
                    f"integers, one for each of the {self.shape[0]} images"
                )

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._reader.rows("arr_0", start, stop)

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        if not self.has_labels:
            return None
        return self._reader.rows("arr_1", start, stop).astype(np.int64)

    def fingerprint(self) -> str:
        names = ["arr_0", "arr_1"] if self.has_labels else ["arr_0"]
        return _digest(
            f"{name}{self._reader.shape(name)}{self._reader.crc(name)}" for name in names
        )


class _NpyImages(ImageSource):
    """One uint8 array [N, H, W, 3], no labels."""

    has_labels = False

    def __init__(self, path: str, flag: str):
        self._path, self._flag = path, flag
        self._reader = NpyReader(path, flag=flag)
        self.shape = check_image_array(self._reader.shape, self._reader.dtype, f"{flag}: {path}")

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._reader.rows(start, stop)

    def fingerprint(self) -> str:
        return fingerprint_file(self._path, flag=self._flag)

    def stamp(self) -> str:
        return _digest([_stamp(self._path)])


class _FolderImages(ImageSource):
    """A folder of image files: numbers in names count as numbers, `5_label_7.png` carries label 7.

    Where they lie in subfolders, at any depth, and have no such names, labels are those of
    torchvision's ImageFolder: the place of the first subfolder's name among all of them, in order.
    Grey becomes RGB, an alpha channel is dropped, every image must have the size of the first.
    """

    def __init__(self, path: str, flag: str):
        self._path, self._flag = path, flag
        self._names = sorted(_image_names(path, flag), key=_natural_key)
        if not self._names:
            raise UserError(
                f"{flag}: the folder {path} has no images ({', '.join(IMAGE_SUFFIXES)})"
            )
        height, width = self._open(self._names[0]).shape[:2]
        self.shape = (len(self._names), height, width, 3)
        self._labels, self.class_names = _labels_of(self._names)
        self.has_labels = self._labels is not None

    def read(self, start: int, stop: int) -> np.ndarray:
        names = self._names[start:stop]
        out = np.empty((len(names), *self.shape[1:]), np.uint8)

        def fill(row: int) -> None:
            image = self._open(names[row])
            self._check_size(names[row], *image.shape[:2])
            out[row] = image

        # A network on a GPU is quicker than one core that decodes; with small images threads would
        # wait for Python's lock.
        small = self.shape[1] * self.shape[2] < _SMALL
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for _ in (map if small else pool.map)(fill, range(len(names))):
                pass
        return out

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        return None if self._labels is None else self._labels[start:stop]

    def check(self) -> None:
        """Every file is there, of one size, and whole as far as its format lets one see."""
        with (
            Progress(len(self), "images", f"checking {self._path}") as progress,
            ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
        ):
            sizes = pool.map(self._checked_size, self._names)
            for name, size in zip(self._names, sizes, strict=True):
                self._check_size(name, *size)
                progress.update(1)

    def _checked_size(self, name: str) -> tuple[int, int]:
        with self._image(name) as image:
            size = image.height, image.width
            if image.format == "PNG":
                image.verify()  # the CRCs of its chunks
            else:
                image.draft("RGB", (1, 1))  # a JPEG is then unpacked at an eighth of its size
                image.load()
        return size

    def _check_size(self, name: str, height: int, width: int) -> None:
        if (height, width) != self.shape[1:3]:
            raise UserError(
                f"{self._flag}: {self._path}/{name} is {width}x{height}, the first image of the "
                f"folder {self.shape[2]}x{self.shape[1]}"
            )

    def fingerprint(self) -> str:
        return self._digest_files(lambda path: fingerprint_file(path, flag=self._flag))

    def stamp(self) -> str:
        return self._digest_files(_stamp)

    def _digest_files(self, of_path: Callable[[str], str]) -> str:
        # Threads, for files on a network have to be waited for.
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            found = list(pool.map(of_path, (f"{self._path}/{name}" for name in self._names)))
        return _digest(f"{name}:{text}" for name, text in zip(self._names, found, strict=True))

    def _open(self, name: str) -> np.ndarray:
        with self._image(name) as image:
            return _to_rgb(image)

    @contextlib.contextmanager
    def _image(self, name: str) -> Iterator[Image.Image]:
        path = f"{self._path}/{name}"
        with open_binary(path, flag=self._flag) as stream:
            try:
                with _opened(stream) as image:
                    yield image
            except UserError as error:
                raise UserError(f"{self._flag}: cannot read the image {path}: {error}") from error


def open_images(path: str | os.PathLike, *, flag: str) -> ImageSource:
    """Open the images at `path`: an .npz (`arr_0`, `arr_1`), an .npy or a folder of image files.

    Raises `UserError`, naming `flag` and the file, if there is nothing there, no image in it, or
    an array that is not uint8 [N, H, W, 3].
    """
    if not str(path):
        raise UserError(f"{flag}: the path is empty")
    path = str(path).rstrip("/") or "/"
    if path.endswith(".npy"):
        return _NpyImages(path, flag)
    if path.endswith(".npz"):
        return _NpzImages(path, flag)
    if os.path.isdir(path) or is_blob(path):
        return _FolderImages(path, flag)
    if os.path.exists(path):
        raise UserError(f"{flag}: {path} is neither an .npz or .npy file nor a folder of images")
    raise UserError(f"{flag}: there is no file or folder {path}")


def decode_image(file: str | os.PathLike | BinaryIO) -> np.ndarray:
    """The image in a file as uint8 [H, W, 3]: every reader of image files decodes with this.

    Grey and palettes become RGB, alpha is dropped, 16 bits a value become 8 (65535 is 255).
    Raises UserError, with the reason alone, for what is no whole image or has no known range.
    """
    with _opened(file) as image:
        return _to_rgb(image)


@contextlib.contextmanager
def _opened(file: str | os.PathLike | BinaryIO) -> Iterator[Image.Image]:
    """The image in a file; what is wrong with it, in the block too, becomes a UserError."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError("not an image") from error
    except _BROKEN_IMAGE as error:
        raise UserError(f"{error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image))
    elif image.mode == "F":
        raise ValueError("floating-point values have no known range")
    return np.asarray(image.convert("RGB"))


def _eight_bits(values: np.ndarray) -> Image.Image:
    """16-bit grey, [H, W] of any integer type, to the nearest of 256 levels.

    Pillow's own conversion clips at 255, so that nearly everything becomes white.
    """
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("values of more than 16 bits have no known range")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write one image, uint8 [H, W, 3], atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def write_npz(
    path: str | os.PathLike,
    images: ImageSource,
    count: int,
    tell: Callable[[int], object] = lambda done: None,
) -> None:
    """Stream the first `count` images, and their labels if they have some, into an .npz.

    tell: is called with the number of images that are written more.
    """
    read = {"arr_0": images.read}
    layout: dict = {"arr_0": ((count, *images.shape[1:]), np.uint8)}
    if images.has_labels:
        read["arr_1"], layout["arr_1"] = images.labels, ((count,), np.int64)
    with NpzWriter(path, layout) as writer:
        for start in range(0, count, _IMAGES_AT_ONCE):
            stop = min(start + _IMAGES_AT_ONCE, count)
            for name in layout:
                writer.append(name, read[name](start, stop))
            tell(stop - start)


def png_name(index: int, label: int | None) -> str:
    """The name of a PNG in a folder of images: `5_label_7.png`, `5.png` without a label."""
    return f"{index}.png" if label is None else f"{index}_label_{label}.png"


def image_grid(arrays: np.ndarray | Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Images uint8 [H, W, 3] of one size side by side, row by row, on white, as one uint8 image."""
    arrays = [np.asarray(array) for array in arrays]
    height, width = arrays[0].shape[:2]
    rows = math.ceil(len(arrays) / columns)
    gap = 2  # pixels of white between neighbours and around them
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, array in enumerate(arrays):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        grid[top : top + height, left : left + width] = array
    return grid


def enlarge(image: np.ndarray, times: int) -> np.ndarray:
    """An image [H, W, 3] with every pixel repeated `times` in both directions."""
    return image.repeat(times, axis=0).repeat(times, axis=1)


def with_caption(image: np.ndarray, text: str) -> np.ndarray:
    """An image uint8 [H, W, 3] with a line of text under it, black on white."""
    font = ImageFont.load_default(_CAPTION_SIZE)
    height, width = image.shape[:2]
    out = Image.new("RGB", (width, height + 2 * _CAPTION_SIZE), "white")
    out.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(out)
    draw.text((_CAPTION_SIZE // 2, height + _CAPTION_SIZE), text, "black", font, anchor="lm")
    return np.asarray(out)


def check_image_array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    what: str,
    *,
    count: int | None = None,
    size: int | None = None,
) -> tuple[int, int, int, int]:
    """The shape, if it is [N, H, W, 3] of uint8 and N is not 0; UserError naming `what` if not.

    `count` and `size`, where given, are what N, and H and W, must be.
    """
    wanted = (count, size, size, 3)
    fits = len(shape) == 4 and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))
    if dtype != np.uint8 or not fits or 0 in shape:
        texts = zip(wanted, ("N", "height", "width", "3"), strict=True)
        text = ", ".join(name if number is None else str(number) for number, name in texts)
        raise UserError(f"{what} is {dtype}{list(shape)}, it must be uint8 [{text}], values 0-255")
    return shape


def _image_names(path: str, flag: str) -> list[str]:
    """Images in a folder, or in its subfolders: `cats/1.png`. `UserError` where both have some."""
    names = blobfile().listdir(path) if is_blob(path) else os.listdir(path)
    own, nested = [name for name in names if _is_image(name)], []
    if is_blob(path):
        walk = blobfile().walk(path)
    else:  # folders that are linked beside images are no classes of them
        walk = os.walk(path) if own else _walk_through_links(path, flag)
    for folder, _, files in walk:
        below = str(folder)[len(path) :].strip("/")
        if below and not any(part.startswith(".") for part in below.split("/")):
            nested += [f"{below}/{name}" for name in files if _is_image(name)]
        if own and nested:
            raise UserError(
                f"{flag}: {path} has images itself ({min(own)}) and in subfolders ({min(nested)}): "
                "name one that has the one or the other"
            )
    return own or nested


def _walk_through_links(path: str, flag: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` into links to folders; `UserError` for one that leads back up, without end."""
    above: dict[str, tuple[str, ...]] = {}  # where the folders on the way to one really are
    for folder, below, files in os.walk(path, followlinks=True):
        way, real = above.get(os.path.dirname(folder), ()), os.path.realpath(folder)
        if real in way:
            raise UserError(f"{flag}: {folder} is a link to a folder that it lies in itself")
        above[folder] = (*way, real)
        below[:] = [name for name in below if not name.startswith(".")]
        yield folder, below, files


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def _labels_of(names: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels int64 [N], of the names if all have one, else of the subfolders, whose names follow.

    None for what there is not.
    """
    found = [_LABELLED_NAME.search(name) for name in names]
    if all(found):
        return np.array([int(match[1]) for match in found if match], np.int64), None
    if not all("/" in name for name in names):
        return None, None
    classes, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    return labels.astype(np.int64), tuple(classes.tolist())


def _stamp(path: str) -> str:
    """What the file system or the store keeps of a file that changes whenever its contents do."""
    if is_blob(path):
        return str(blobfile().stat(path))
    status = os.stat(path)
    # The time of the last change of status cannot be set back, as that of the contents can.
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
