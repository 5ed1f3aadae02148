"""One random stream per sample and purpose: it depends on the seed and the global index alone."""

import numpy as np
import torch

# What random numbers are for. Each purpose has a far-off part of Philox's counter to itself, so
# that no number serves twice: a VAE's code must not come back as the noise that its image gets.
_PURPOSES = ("noise", "labels", "codes")


class RandomStreams:
    """The streams of samples start … stop-1 for a purpose, in step with each other.

    `purpose` is "noise" of the diffusion, "labels", or "codes" of a generator. Numbers are drawn
    in float32 on the CPU, so they are the same whatever the device, the batch or the rank. Streams
    continue from call to call; a batch that is sampled again needs new ones.
    """

    def __init__(self, seed: int, start: int, stop: int, purpose: str = "noise"):
        self._generators = [_generator(seed, index, purpose) for index in range(start, stop)]

    def randn(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise with the shape [n, …], device and dtype of `like`."""
        noise = torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)
        for generator, row in zip(self._generators, noise.numpy(), strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        # Pinned, so the copy runs while the CPU goes on; on the CPU this copies nothing.
        return noise.to(like.device, like.dtype, non_blocking=True)


def random_labels(seed: int, start: int, stop: int, num_classes: int) -> np.ndarray:
    """Uniform labels of samples start … stop-1, int64 [n]; drawing them leaves noise as it is."""
    indices = range(start, stop)
    draws = [_generator(seed, index, "labels").integers(num_classes) for index in indices]
    return np.array(draws, np.int64)


def _generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    key = np.array([seed, index], np.uint64)
    counter = [0, 0, 0, _PURPOSES.index(purpose)]
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
