"""Where samples start: a generator's images, pure noise, or noise with images to enlarge."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.files import join
from esddpm_io.images import ImageSource, noted_fingerprint, open_images
from guided_diffusion.pixels import to_float
from guided_diffusion.rng import random_labels
from guided_diffusion.sampling.chunks import IMAGES_FILE
from guided_diffusion.sampling.generators import FLAG as GENERATOR_FLAG
from guided_diffusion.sampling.generators import GeneratedImages, load_generator
from guided_diffusion.settings.record import StartSettings

_LABELS_AT_ONCE = 65536
_CPU = torch.device("cpu")


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


class Source:
    """What `len(source)` samples start from, read by index as it is needed."""

    in_random_order = False  # whether the first n are as good a choice as any

    def __len__(self) -> int:
        raise NotImplementedError

    def start(self, start: int, stop: int) -> Start:
        """What samples start … stop-1 start from."""
        raise NotImplementedError

    def fingerprint(self) -> str | None:
        """A hash of the images' contents, None where there are none."""
        return None

    def stamp(self) -> str | None:
        """A hash that changes when the files do; None where `fingerprint` costs no more."""
        return None


class _ImageFile(Source):
    """Images of an .npz, .npy or folder; `flag` and `path` are for messages."""

    def __init__(self, images: ImageSource, path: str, flag: str):
        self._images, self.path, self._flag = images, path, flag

    @property
    def available(self) -> int:
        """How many images there are."""
        return len(self._images)

    @property
    def shape(self) -> tuple[int, int]:
        """Their height and width, pixels."""
        return self._images.shape[1], self._images.shape[2]

    @property
    def has_labels(self) -> bool:
        return self._images.has_labels

    def fingerprint(self) -> str:
        return self._images.fingerprint()

    def stamp(self) -> str | None:
        return self._images.stamp()

    def check(self, size: int, size_flag: str, num_classes: int | None, multiple: int = 0) -> None:
        """UserError, naming the flag, unless all images have the network's `size` and, with
        `num_classes`, a label below it each.

        multiple: images that are not square will do if both sides are multiples of it (0: never).
        """
        height, width = self.shape
        if multiple and height != width:
            if height % multiple or width % multiple:
                raise UserError(
                    f"{self._flag}: the images of {self.path} are {width}x{height}; the network "
                    f"takes sides that are multiples of {multiple}"
                )
        elif (height, width) != (size, size):
            raise UserError(
                f"{self._flag}: the images of {self.path} are {width}x{height}, the network "
                f"takes {size}x{size} ({size_flag})"
            )
        if num_classes is not None:
            self._check_labels(num_classes)

    def _check_labels(self, num_classes: int) -> None:
        if not self.has_labels:
            raise UserError(
                f"{self._flag}: {self.path} has no labels, or not for all images, which a "
                "class-conditional model needs: "
                "arr_1 in an .npz, names such as 27987_label_762.png or a subfolder for each "
                "class in a folder, num_classes of a generator"
            )
        for start in range(0, self.available, _LABELS_AT_ONCE):
            labels = self._images.labels(start, min(start + _LABELS_AT_ONCE, self.available))
            assert labels is not None
            bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
            if len(bad):
                raise UserError(
                    f"{self._flag}: label {labels[bad[0]]} of image {start + bad[0]} in "
                    f"{self.path} is not one of the classes 0 … {num_classes - 1}"
                )


class GeneratorImages(_ImageFile):
    """Images of a generator, the first `limit` of them, or all."""

    def __init__(self, images: ImageSource, path: str, flag: str, limit: int = 0):
        super().__init__(images, path, flag)
        self._count = min(limit or len(images), len(images))
        self.in_random_order = isinstance(images, GeneratedImages)

    def __len__(self) -> int:
        return self._count

    def start(self, start: int, stop: int) -> Start:
        return Start(to_float(self._images.read(start, stop)), self._images.labels(start, stop))


class ImagesToEnlarge(_ImageFile):
    """Pure noise with small images beside it; sample i enlarges image i modulo their number."""

    def __init__(self, images: ImageSource, path: str, flag: str, num_samples: int):
        super().__init__(images, path, flag)
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def start(self, start: int, stop: int) -> Start:
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


class PureNoise(Source):
    """The plain DDPM: nothing to start from but a label, where the network wants one."""

    def __init__(self, num_samples: int, seed: int, num_classes: int | None):
        self._num_samples, self._seed, self._num_classes = num_samples, seed, num_classes

    def __len__(self) -> int:
        return self._num_samples

    def start(self, start: int, stop: int) -> Start:
        if self._num_classes is None:
            return Start(None, None)
        return Start(None, random_labels(self._seed, start, stop, self._num_classes))


def open_generator_images(
    path: str, limit: int = 0, *, flag: str = "--dataset_path"
) -> GeneratorImages:
    """Open a generator's images, the first `limit` or all; UserError, naming `flag`, if none."""
    if not path:
        raise UserError(f"{flag}: name the .npz file or folder with the generator's images")
    return GeneratorImages(open_images(path, flag=flag), path, flag, limit)


def open_generator(
    target: str, num_samples: int, seed: int, device: torch.device
) -> GeneratorImages:
    """Load the generator that --generator names on the device; UserError if it cannot be."""
    images = GeneratedImages(load_generator(target, device), num_samples, seed)
    return GeneratorImages(images, target, GENERATOR_FLAG)


def open_images_to_enlarge(
    path: str, num_samples: int, *, flag: str = "--base_samples"
) -> ImagesToEnlarge:
    """Open the images that a super-resolution model enlarges; errors likewise."""
    if not path:
        raise UserError(f"{flag}: name the .npz file or folder with the images to enlarge")
    return ImagesToEnlarge(open_images(path, flag=flag), path, flag, num_samples)


def open_source(
    start: StartSettings, num_samples: int, seed: int, device: torch.device = _CPU
) -> Source:
    """What the record of a run says that samples start from; device: where a generator works."""
    if start.kind == "noise":
        return PureNoise(num_samples, seed, start.num_classes)
    assert start.path is not None
    if start.kind == "generator":
        return open_generator(start.path, num_samples, seed, device)
    if start.kind == "enlarge":
        return open_images_to_enlarge(start.path, num_samples)
    return open_generator_images(start.path, num_samples)


def contents_of(start: StartSettings) -> str | None:
    """The hash of the start images as they are now."""
    if start.kind == "generator":
        assert start.path is not None
        return load_generator(start.path, _CPU).contents  # without making images
    return open_source(start, 1, 0).fingerprint()


def check_source(source: Source, start: StartSettings, save_dir: str) -> None:
    """UserError if the images are not those of the record any more."""
    if noted_fingerprint(source, join(save_dir, IMAGES_FILE)) != start.contents:
        raise UserError(
            f"{start.path} has changed since the run's settings were written: start it anew in "
            "another folder"
        )
