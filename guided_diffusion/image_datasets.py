"""Training images: folders of any depth or .npz files in, endless shuffled batches out.

Which images a step gets, and how they are cropped and flipped, is a function of (seed, step,
position in the global batch) alone. So a resumed run goes on with the data where it stopped, and
N processes with batch B see together what one process with batch N·B sees.
"""

import contextlib
import math
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from esddpm_io.errors import UserError
from esddpm_io.files import blobfile, is_blob, open_binary
from esddpm_io.images import IMAGE_SUFFIXES, check_image_array, decode_image
from esddpm_io.npz import NpzReader

from . import dist_util, logger
from .pixels import to_float
from .rng import data_stream
from .script_util import NUM_CLASSES

LABEL_SOURCES = ("name", "folder")
# An array up to this size is held in memory, a larger one is read row by row where it lies.
_IN_MEMORY_BYTES = 2 << 30
# Images of a folder that may be unreadable one after the other before the folder is given up.
_MAX_UNREADABLE_RUN = 100


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    label_from: str = "name",
    num_workers: int = 1,
    seed: int | None = None,
    num_classes: int = NUM_CLASSES,
) -> "BatchStream":
    """An endless iterator of (images, cond) for this process.

    images: float32 NCHW in [-1, 1], contiguous; cond: {"y": int64 [N]} if `class_cond`, else {}.

    Args:
        data_dir: a folder (any depth, or a blob path), or an .npz with `arr_0` uint8 [N, H, W, 3]
            of the model's size and, for `class_cond`, `arr_1` integer labels [N].
        deterministic: in the data's order, not shuffled.
        random_crop: a random part of each image of a folder instead of its centre.
        random_flip: mirror every second image, at random.
        label_from: labels of a folder: "name" is the part of a file's name before the first `_`,
            "folder" the folder it lies in; both numbered in alphabetical order.
        num_workers: processes that decode the images of a folder (0: this one).
        seed: of order, crops and flips; None takes one from NumPy's global generator.

    Raises UserError, naming the flag, for data that are not there, do not fit, or lack labels.
    """
    if label_from not in LABEL_SOURCES:
        raise UserError(f"--label_from must be {' or '.join(LABEL_SOURCES)}, not {label_from}")
    if seed is None:
        seed = dist_util.gather_objects(int(np.random.randint(2**31)))[0]
    labels = label_from if class_cond else None
    return BatchStream(
        _open_images(data_dir, image_size, labels, num_classes, random_crop),
        batch_size,
        shuffle=not deterministic,
        random_flip=random_flip,
        num_workers=num_workers,
        seed=seed,
    )


def _open_images(
    data_dir: str, image_size: int, labels: str | None, num_classes: int, random_crop: bool
) -> "ArrayImages | ImageDataset":
    """The images of an .npz or a folder, without labels if `labels` (where they are) is None."""
    if not data_dir:
        raise UserError("--data_dir: give a folder of images or an .npz file")
    if str(data_dir).endswith(".npz"):
        return load_npz(data_dir, image_size, labels is not None, num_classes)
    paths = list_image_files(data_dir)
    classes = label_files(paths, labels, data_dir, num_classes) if labels else None
    return ImageDataset(image_size, paths, classes, random_crop=random_crop)


class BatchStream:
    """Endless batches of one process out of `ArrayImages` or an `ImageDataset`.

    `seek(step)` goes to the batch of any step; see the top of this file.
    """

    def __init__(
        self,
        images: "ArrayImages | ImageDataset",
        batch_size: int,
        *,
        shuffle: bool = True,
        random_flip: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ):
        self.images = images
        self.batch_size = batch_size
        self._global_batch = batch_size * dist_util.world_size()
        self._first_row = batch_size * dist_util.rank()
        self._shuffle, self._random_flip = shuffle, random_flip
        self._num_workers = num_workers
        self._seed = seed
        self._order_of_epoch: dict[int, np.ndarray] = {}
        self._unreadable: set[str] = set()
        self.seek(0)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pixels, indices = next(self._decoded)
        if self._random_flip:
            flips = data_stream(self._seed, "flip", self._step).random(self._global_batch)
            flips = flips[self._first_row :][: self.batch_size] < 0.5
            pixels[flips] = pixels[flips, :, ::-1]
        self._step += 1
        batch = to_float(pixels).contiguous()
        if self.images.classes is None:
            return batch, {}
        return batch, {"y": torch.from_numpy(self.images.classes[indices])}

    def seek(self, step: int, samples: int | None = None) -> None:
        """Go on with the batch of this step (0: the first).

        `samples`, where given, is how many images the steps before had over all processes: not
        this batch size each.
        """
        self._step = step
        self._before = step * self._global_batch if samples is None else samples
        self._before -= step * self._global_batch
        if isinstance(self.images, ImageDataset):
            self._decoded = self._decode_in_workers(step)
        else:
            self._decoded = self._take_from_memory(step)

    def end_workers(self) -> None:
        """End the processes that decode; the next batch would start them again."""
        self._decoded.close()
        self.seek(self._step, self._before + self._step * self._global_batch)

    def figures(self) -> dict[str, int]:
        """Figures for the log: how many images could not be read so far."""
        return {"unreadable_images": len(self._unreadable)} if self._unreadable else {}

    def _take_from_memory(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            indices, _ = self._rows(step)
            yield self.images.take(indices), indices
            step += 1

    def _decode_in_workers(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        loader = DataLoader(
            _Decoder(self.images, self._seed),
            batch_sampler=_Steps(self, step),
            num_workers=self._num_workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            # Its own generator: starting the workers must not shift torch's global one.
            generator=torch.Generator(),
        )
        with _stop_signals_blocked():
            batches = iter(loader)
        for pixels, indices, unreadable in batches:
            if pixels is None:
                path, problem = unreadable[0]
                raise UserError(
                    f"--data_dir: cannot read {len(unreadable)} images in a row, {path} first"
                    f" ({problem})"
                )
            for path, problem in unreadable:
                if path not in self._unreadable:
                    self._unreadable.add(path)
                    logger.warn(f"skipping {path}: {problem}")
            yield pixels, indices

    def _rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This process's image indices [N] in a step, and their positions in the whole stream."""
        start = self._before + step * self._global_batch + self._first_row
        positions = np.arange(start, start + self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.images))
        if not self._shuffle:
            return offsets, positions
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            indices[mine] = self._order(epoch)[offsets[mine]]
        return indices, positions

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._order_of_epoch:
            # A step touches at most the end of one epoch and the start of the next, unless the
            # data are fewer than a batch; then an order costs nothing to make again.
            while len(self._order_of_epoch) > 1:
                self._order_of_epoch.pop(min(self._order_of_epoch))
            order = data_stream(self._seed, "order", epoch).permutation(len(self.images))
            self._order_of_epoch[epoch] = order
        return self._order_of_epoch[epoch]


class ArrayImages:
    """Images uint8 [n, H, W, 3], in memory or read by rows, and their classes [n] or None."""

    def __init__(self, pixels: "np.ndarray | _NpzRows", classes: np.ndarray | None):
        self._pixels, self.classes = pixels, classes

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """A copy of these images, uint8 [N, H, W, 3]."""
        return self._pixels[indices]


class _NpzRows:
    """Rows of a stored array, read when they are asked for; the page cache serves all processes."""

    def __init__(self, reader: NpzReader, name: str):
        self._reader, self._name = reader, name

    def __len__(self) -> int:
        return self._reader.shape(self._name)[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        rows = [self._reader.rows(self._name, i, i + 1) for i in indices.tolist()]
        return np.concatenate(rows)


def load_npz(path: str, image_size: int, class_cond: bool, num_classes: int) -> ArrayImages:
    """`arr_0` and, for `class_cond`, `arr_1` of a file; UserError if they do not fit."""
    flag = "--data_dir"
    reader = NpzReader(path, flag=flag)
    shape, dtype = reader.shape("arr_0"), reader.dtype("arr_0")
    check_image_array(shape, dtype, f"{flag}: arr_0 of {path}", size=image_size)
    classes = None
    if class_cond:
        classes = reader.array("arr_1")
        if classes.shape != shape[:1] or classes.dtype.kind not in "iu":
            raise UserError(
                f"{flag}: arr_1 of {path} is {classes.dtype}{list(classes.shape)}, labels must be"
                f" integers, one for each of the {shape[0]} images"
            )
        classes = classes.astype(np.int64)
        _check_labels(classes, num_classes, str(path))
    in_place = not is_blob(path) and reader.is_stored("arr_0")  # so that any row can be read
    if math.prod(shape) <= _IN_MEMORY_BYTES or not in_place:
        return ArrayImages(reader.array("arr_0"), classes)
    return ArrayImages(_NpzRows(reader, "arr_0"), classes)


def _check_labels(classes: np.ndarray, num_classes: int, what: str) -> None:
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(
            f"--data_dir: {what} has labels {classes.min()} … {classes.max()}, the model knows"
            f" 0 … {num_classes - 1}"
        )


def list_image_files(data_dir: str) -> list[str]:
    """Paths of all images in a folder of any depth (or under a blob path), sorted."""
    walk = blobfile().walk if is_blob(data_dir) else os.walk
    if not is_blob(data_dir) and not os.path.isdir(data_dir):
        raise UserError(f"--data_dir: {data_dir} is neither a folder nor an .npz file")
    paths = [
        os.path.join(folder, name)
        for folder, _, names in walk(data_dir)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    ]
    if not paths:
        raise UserError(f"--data_dir: {data_dir} has no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


def label_files(
    paths: Sequence[str], label_from: str, data_dir: str = "", num_classes: int = NUM_CLASSES
) -> list[int]:
    """A class for each file by LABEL_SOURCES; classes are numbered in alphabetical order."""
    if label_from == "name":
        names = [Path(path).name.split("_")[0] for path in paths]
    else:
        names = [Path(path).parent.name for path in paths]
        loose = [path for path in paths if Path(path).parent == Path(data_dir)]
        if loose:
            raise UserError(f"--label_from folder: {loose[0]} lies in no folder of --data_dir")
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    classes = [number[name] for name in names]
    what = f"{data_dir}, labelled by {'the names up to _' if label_from == 'name' else 'folder'},"
    _check_labels(np.array(classes), num_classes, what)
    return classes


# Under guided-diffusion's name.
_list_image_files_recursively = list_image_files


class ImageDataset(Dataset):
    """Image files at one resolution.

    Items are (float32 CHW in [-1, 1], {"y": int64} if `classes` else {}), cropped and flipped with
    Python's global generator. `shard` of `num_shards` takes every num_shards-th file.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ):
        self.resolution = resolution
        self.local_images = list(image_paths)[shard::num_shards]
        self.local_classes = None
        if classes is not None:
            self.local_classes = np.asarray(classes, np.int64)[shard::num_shards]
        self.random_crop, self.random_flip = random_crop, random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    @property
    def classes(self) -> np.ndarray | None:
        """Labels, int64 [N], as `ArrayImages` has them."""
        return self.local_classes

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.int64]]:
        pixels = self.read(idx, random)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = to_float(np.ascontiguousarray(pixels[None]))[0].contiguous().numpy()
        return pixels, {} if self.classes is None else {"y": self.classes[idx]}

    def read(self, idx: int, rng: random.Random) -> np.ndarray:
        """One image, cropped, uint8 [resolution, resolution, 3]; UserError if it is unreadable."""
        path = self.local_images[idx]
        with open_binary(path, flag="--data_dir") as stream:
            image = Image.fromarray(decode_image(stream))
        if self.random_crop:
            return random_crop_arr(image, self.resolution, rng=rng)
        return center_crop_arr(image, self.resolution)


class _Decoder(Dataset):
    """What the worker processes run: (index, position) to pixels."""

    def __init__(self, images: ImageDataset, seed: int):
        self._images, self._seed = images, seed

    def __getitem__(self, row: tuple[int, int]):
        index, position = row
        rng = random.Random(int(data_stream(self._seed, "crop", position).integers(2**63)))
        unreadable = []
        for _ in range(min(_MAX_UNREADABLE_RUN, len(self._images))):
            try:
                return self._images.read(index, rng), index, unreadable
            except UserError as error:
                unreadable.append((self._images.local_images[index], str(error)))
                index = (index + 1) % len(self._images)
        return None, index, unreadable


class _Steps:
    """Rows of every step from `first` on, for a DataLoader."""

    def __init__(self, stream: BatchStream, first: int):
        self._stream, self._first = stream, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self._first
        while True:
            indices, positions = self._stream._rows(step)
            yield list(zip(indices.tolist(), positions.tolist(), strict=True))
            step += 1


def _collate(
    items: list[tuple],
) -> tuple[np.ndarray | None, np.ndarray, list[tuple[str, str]]]:
    """Pixels, indices, (path, problem) of files passed over; None and the files of a lost image.

    An error would be wrapped in the worker's traceback.
    """
    for image, index, unreadable in items:
        if image is None:
            return None, np.array([index]), unreadable
    pixels, indices, unreadable = zip(*items, strict=True)
    return np.stack(pixels), np.array(indices), [pair for pairs in unreadable for pair in pairs]


# macOS and Windows do not tell who sent a signal.
_TELLS_SENDERS = hasattr(signal, "sigwaitinfo")


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Start workers inside: they inherit the mask, so that no signal is early for them."""
    if not _TELLS_SENDERS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C, Slurm and a launcher signal the whole group; the parent saves first.

    Only what the parent itself sends ends a worker, as PyTorch's own handler has it; where the
    parent is gone PyTorch's watchdog does. On macOS and Windows any SIGTERM ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _TELLS_SENDERS:
        threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()


def _end_when_the_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The largest centred square of an image, as uint8 [image_size, image_size, 3].

    Halved by box averages while it is twice too large, then resized bicubically.
    """
    pixels = np.array(_shrink(pil_image, image_size))
    top = (pixels.shape[0] - image_size) // 2
    left = (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random | None = None,
) -> np.ndarray:
    """A random square with a side of `min_crop_frac` … `max_crop_frac` of the image's shorter one.

    Returns uint8 [image_size, image_size, 3]; `rng` defaults to Python's global generator.
    """
    rng = rng or random
    shortest = math.ceil(image_size / max_crop_frac)
    longest = math.ceil(image_size / min_crop_frac)
    pixels = np.array(_shrink(pil_image, rng.randrange(shortest, longest + 1)))
    top = rng.randrange(pixels.shape[0] - image_size + 1)
    left = rng.randrange(pixels.shape[1] - image_size + 1)
    return pixels[top : top + image_size, left : left + image_size]


def _shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Resize an image so that its shorter side is this long."""
    while min(image.size) >= 2 * shorter_side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.BOX)
    scale = shorter_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, resample=Image.BICUBIC)
