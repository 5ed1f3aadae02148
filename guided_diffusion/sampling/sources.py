"""Where samples start: a generator's images, or pure noise with drawn labels."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource, open_images
from guided_diffusion.pixels import to_float
from guided_diffusion.sampling.random_streams import random_labels

_LABELS_AT_ONCE = 65536


@dataclasses.dataclass(frozen=True)
class Start:
    """What a range of indices starts from.

    images: clean images, float32 [n, 3, H, W] in [-1, 1], or None to start from pure noise.
    labels: int64 [n], or None where there are none.
    low_res: images to enlarge, float32 [n, 3, h, w] in [-1, 1], for a super-resolution model.
    """

    images: torch.Tensor | None
    labels: np.ndarray | None
    low_res: torch.Tensor | None = None


class GeneratorImages:
    """Images of a generator, read from their file as they are needed; the first `limit`, or all."""

    def __init__(self, images: ImageSource, limit: int = 0):
        self._images = images
        self._count = min(limit or len(images), len(images))
        self.has_labels = images.has_labels

    def __len__(self) -> int:
        return self._count

    def start(self, start: int, stop: int) -> Start:
        """Images and labels start … stop-1."""
        return Start(to_float(self._images.read(start, stop)), self._images.labels(start, stop))

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def stamp(self) -> str | None:
        return self._images.stamp()


class PureNoise:
    """The plain DDPM: nothing to start from but a label, where the model wants one."""

    def __init__(self, num_samples: int, seed: int, num_classes: int | None):
        self._num_samples, self._seed, self._num_classes = num_samples, seed, num_classes
        self.has_labels = num_classes is not None

    def __len__(self) -> int:
        return self._num_samples

    def start(self, start: int, stop: int) -> Start:
        """No images; labels start … stop-1, drawn from the samples' own streams."""
        if self._num_classes is None:
            return Start(None, None)
        return Start(None, random_labels(self._seed, start, stop, self._num_classes))

    def fingerprint(self) -> None:
        return None

    def stamp(self) -> None:
        return None


class ImagesToEnlarge:
    """Pure noise with small images beside it; sample i enlarges image i modulo their number."""

    def __init__(self, images: ImageSource, num_samples: int):
        self._images, self._num_samples = images, num_samples
        self.has_labels = images.has_labels

    def __len__(self) -> int:
        return self._num_samples

    def start(self, start: int, stop: int) -> Start:
        """No images to start from; small images and labels of samples start … stop-1."""
        pieces = list(self._pieces(start, stop))
        pixels = np.concatenate([self._images.read(*piece) for piece in pieces])
        labels = None
        if self.has_labels:
            labels = np.concatenate([self._images.labels(*piece) for piece in pieces])
        return Start(None, labels, to_float(pixels))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges of the file that follow each other in start … stop-1."""
        count = len(self._images)
        while start < stop:
            length = min(stop - start, count - start % count)
            yield start % count, start % count + length
            start += length

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def stamp(self) -> str | None:
        return self._images.stamp()


Source = GeneratorImages | PureNoise | ImagesToEnlarge


def open_generator_images(
    path: str,
    *,
    image_size: int,
    num_classes: int | None,
    limit: int = 0,
    flag: str = "--dataset_path",
) -> GeneratorImages:
    """Open a generator's images, the first `limit` or all, and hold them against the model.

    num_classes: how many classes the labels are for, None if the model takes no labels. Raises
    UserError, naming `flag`, for images of another size and for labels missing or out of range.
    """
    if not path:
        raise UserError(f"{flag}: name the .npz file or folder with the generator's images")
    images = _open_checked(path, image_size, num_classes, flag, "makes", "image_size")
    return GeneratorImages(images, limit)


def open_images_to_enlarge(
    path: str,
    *,
    small_size: int,
    num_samples: int,
    num_classes: int | None,
    flag: str = "--base_samples",
) -> ImagesToEnlarge:
    """Open the images that a super-resolution model enlarges; errors as `open_generator_images`."""
    if not path:
        raise UserError(f"{flag}: name the .npz file or folder with the images to enlarge")
    images = _open_checked(path, small_size, num_classes, flag, "takes", "small_size")
    return ImagesToEnlarge(images, num_samples)


def _open_checked(
    path: str, size: int, num_classes: int | None, flag: str, verb: str, size_flag: str
) -> ImageSource:
    images = open_images(path, flag=flag)
    height, width = images.shape[1:3]
    if (height, width) != (size, size):
        raise UserError(
            f"{flag}: the images of {path} are {width}x{height}, the model {verb} "
            f"{size}x{size} (--{size_flag})"
        )
    if num_classes is not None:
        _check_labels(images, path, num_classes, flag)
    return images


def _check_labels(images: ImageSource, path: str, num_classes: int, flag: str) -> None:
    if not images.has_labels:
        raise UserError(
            f"{flag}: {path} has no labels, which a class-conditional model needs: arr_1 in an "
            ".npz, names such as 27987_label_762.png in a folder"
        )
    for start in range(0, len(images), _LABELS_AT_ONCE):
        labels = images.labels(start, min(start + _LABELS_AT_ONCE, len(images)))
        bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(bad):
            raise UserError(
                f"{flag}: label {labels[bad[0]]} of image {start + bad[0]} in {path} is not one "
                f"of the classes 0 … {num_classes - 1}"
            )
