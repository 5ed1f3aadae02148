"""Resizing before the network: antialiased, by Pillow, in float (Parmar et al. 2022, clean-fid).

The published evaluator leaves it to the graph, whose bilinear interpolation looks at four pixels
however much it shrinks an image.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from esddpm_io.processes import available_cores

if TYPE_CHECKING:
    from evaluations.features import Engine

PUBLISHED_RESIZE, CLEAN = "published", "clean"
RESIZES = (PUBLISHED_RESIZE, CLEAN)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ResizedEngine:
    """An engine whose images are resized by `CLEAN`, to the size that the graph works at."""

    def __init__(self, engine: "Engine", size: tuple[int, int]):
        self.name = engine.name
        self._engine, self._size = engine, size

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._engine(resized(images, self._size))


def resized(images: np.ndarray, size: tuple[int, int], resample: str = "bicubic") -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, *size, 3] of 0-255, each channel by itself, not rounded.

    What bicubic interpolation throws out of 0-255 is clipped, as clean-fid does.
    """
    height, width = size
    if images.shape[1:3] == size:
        return images.astype(np.float32)
    out = np.empty((len(images), height, width, images.shape[3]), np.float32)

    def resize(index: int) -> None:
        for channel in range(images.shape[3]):
            plane = Image.fromarray(images[index, :, :, channel].astype(np.float32))
            out[index, :, :, channel] = plane.resize((width, height), FILTERS[resample])

    # Threads, for Pillow lets go of the interpreter's lock.
    with ThreadPoolExecutor(min(len(images), available_cores())) as pool:
        list(pool.map(resize, range(len(images))))
    return np.clip(out, 0, 255, out=out)
