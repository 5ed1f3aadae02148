"""Small trials: some start images through the reverse loop with one sampler after the other.

All samplers of a trial see the same images with the same noise, so their figures are paired.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from esddpm_io.progress import Progress
from guided_diffusion.sampling.job import Job
from guided_diffusion.sampling.sampler import Sampler
from guided_diffusion.sampling.sources import Source, Start
from guided_diffusion.settings.record import Run, SamplerSettings


class Spread(Source):
    """`count` start images, evenly spread over a source that may be sorted by label."""

    def __init__(self, source: Source, count: int):
        self._source = source
        count = min(count, len(source))
        last = count - 1 if source.in_random_order else len(source) - 1
        self._indices = np.linspace(0, last, count).astype(int)

    def __len__(self) -> int:
        return len(self._indices)

    def start(self, start: int, stop: int) -> Start:
        starts = [self._source.start(i, i + 1) for i in self._indices[start:stop]]
        images = [one.images for one in starts if one.images is not None]
        labels = [one.labels for one in starts if one.labels is not None]
        return Start(
            torch.cat(images) if images else None, np.concatenate(labels) if labels else None
        )


class Trial:
    """`count` of a run's start images; what is made of them is in memory only.

    device: as in `Job`. Each call samples `batch_size` images at a time.
    """

    def __init__(
        self, run: Run, source: Source, count: int, *, device: str = "", batch_size: int = 50
    ):
        self._run, self._source = run, Spread(source, count)
        self._device, self._batch_size = device, batch_size

    def __len__(self) -> int:
        return len(self._source)

    def start_images(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The start images uint8 [n, H, W, 3] and their labels int64 [n], or None."""
        begin = self._source.start(0, len(self))
        assert begin.images is not None
        pixels = ((begin.images + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy(), begin.labels

    def sample(self, settings: SamplerSettings, what: str) -> np.ndarray:
        """What these settings make of the start images, uint8 [n, H, W, 3].

        `what` is said beside the progress. Raises the errors of `Sampler`.
        """
        run = dataclasses.replace(self._run, sampler=settings)
        sampler = Sampler(Job(run, self._source, save_dir="", device=self._device), _silent)
        with Progress(len(self), "images", what) as progress:
            return np.concatenate(list(self._batches(sampler, progress.update)))

    def _batches(self, sampler: Sampler, tell: Callable[[int], None]) -> Iterator[np.ndarray]:
        for start in range(0, len(self), self._batch_size):
            images, _ = sampler.sample(start, min(start + self._batch_size, len(self)))
            tell(len(images))
            yield images


def _silent(text: str) -> None:
    """What a sampler says of its device is said once, by the command."""
