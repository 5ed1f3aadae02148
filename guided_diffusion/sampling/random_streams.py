"""One random stream per sample: its noise depends on the seed and its global index alone."""

import numpy as np
import torch

# Philox counters start here for labels, far from the noise of the same stream.
_LABEL_COUNTER = [0, 0, 0, 1]


class RandomStreams:
    """The streams of samples start … stop-1, in step with each other.

    Noise is drawn in float32 on the CPU, so it is the same whatever the device, the batch or the
    rank. Streams continue from call to call; a batch that is sampled again needs new ones.
    """

    def __init__(self, seed: int, start: int, stop: int):
        self._generators = [
            np.random.Generator(np.random.Philox(key=_key(seed, index)))
            for index in range(start, stop)
        ]

    def randn(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise with the shape [n, …], device and dtype of `like`."""
        noise = torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)
        for generator, row in zip(self._generators, noise.numpy(), strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        # Pinned, so the copy runs while the CPU goes on; on the CPU this copies nothing.
        return noise.to(like.device, like.dtype, non_blocking=True)


def random_labels(seed: int, start: int, stop: int, num_classes: int) -> np.ndarray:
    """Uniform labels of samples start … stop-1, int64 [n]; drawing them leaves noise as it is."""
    return np.array(
        [
            np.random.Generator(
                np.random.Philox(key=_key(seed, index), counter=_LABEL_COUNTER)
            ).integers(num_classes)
            for index in range(start, stop)
        ],
        np.int64,
    )


def _key(seed: int, index: int) -> np.ndarray:
    return np.array([seed, index], np.uint64)
