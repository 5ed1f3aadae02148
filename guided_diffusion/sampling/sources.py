"""Where samples start: a generator's images, or pure noise with drawn labels."""

import dataclasses

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource, open_images
from guided_diffusion.sampling.random_streams import random_labels

_LABELS_AT_ONCE = 65536


@dataclasses.dataclass(frozen=True)
class Start:
    """What a range of indices starts from.

    images: clean images, float32 [n, 3, H, W] in [-1, 1], or None to start from pure noise.
    labels: int64 [n], or None where there are none.
    """

    images: torch.Tensor | None
    labels: np.ndarray | None


class GeneratorImages:
    """Images of a generator, read from their file as they are needed."""

    def __init__(self, images: ImageSource):
        self._images = images
        self.has_labels = images.has_labels

    def __len__(self) -> int:
        return len(self._images)

    def start(self, start: int, stop: int) -> Start:
        """Images and labels start … stop-1."""
        pixels = torch.from_numpy(self._images.read(start, stop))
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return Start(images, self._images.labels(start, stop))

    def fingerprint(self) -> str:
        return self._images.fingerprint()


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


Source = GeneratorImages | PureNoise


def open_generator_images(
    path: str, *, image_size: int, num_classes: int | None, flag: str = "--dataset_path"
) -> GeneratorImages:
    """Open a generator's images and hold them against the model.

    num_classes: how many classes the labels are for, None if the model takes no labels. Raises
    UserError, naming `flag`, for images of another size and for labels missing or out of range.
    """
    if not path:
        raise UserError(f"{flag}: name the .npz file or folder with the generator's images")
    images = open_images(path, flag=flag)
    height, width = images.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise UserError(
            f"{flag}: the images of {path} are {width}x{height}, the model makes "
            f"{image_size}x{image_size} (--image_size)"
        )
    if num_classes is not None:
        _check_labels(images, path, num_classes, flag)
    return GeneratorImages(images)


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
