"""All random streams: of samples, of training steps, of the order and cropping of training data.

Each is a Philox generator whose key is (seed, number): the number of a sample, of a training step,
of an epoch or of an image. Two words of its counter say what the numbers are for, so that none
serves twice: a generator's latent must not come back as the noise that its image gets.
"""

import concurrent.futures
import random
from typing import Any

import numpy as np
import torch

# What a sample's numbers are for, and those of the training data.
_PURPOSES = ("noise", "labels", "latents", "seeds")
DATA_PURPOSES = {"order": 1, "flip": 2, "crop": 3}


def philox(seed: int, number: int, *, family: int = 0, purpose: int = 0) -> np.random.Generator:
    """The stream of a seed and a number; `family` and `purpose` are words of its counter."""
    key = np.array([seed, number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, family, purpose]))


def data_stream(seed: int, purpose: str, number: int) -> np.random.Generator:
    """The stream of training data for a purpose of DATA_PURPOSES and an epoch, step or position."""
    return philox(seed, number, family=DATA_PURPOSES[purpose])


class RandomStreams:
    """The streams of samples start … stop-1 for a purpose, in step with each other.

    `purpose` is "noise" of the diffusion, "labels", or "latents" of a generator. Numbers are drawn
    in float32 on the CPU, so they are the same whatever the device, the batch or the rank. Streams
    continue from call to call; a batch that is sampled again needs new ones.
    """

    def __init__(self, seed: int, start: int, stop: int, purpose: str = "noise"):
        self._generators = [_generator(seed, index, purpose) for index in range(start, stop)]

    def randn(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise with the shape [n, …], device and dtype of `like`."""
        return _moved(self.fill(_buffer(like)), like)

    def fill(self, noise: torch.Tensor) -> torch.Tensor:
        """Fill `noise`, float32 [n, …] on the CPU, with the next numbers, and return it."""
        for generator, row in zip(self._generators, noise.numpy(), strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        return noise


class DrawnAhead:
    """The first `draws` draws of `streams`, each made on a thread while the device is at work.

    Values and order are those of `streams.randn`; all draws have the shape of the first.
    """

    def __init__(self, streams: RandomStreams, draws: int):
        self._streams, self._left = streams, draws
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._next: concurrent.futures.Future[torch.Tensor] | None = None

    def randn(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise with the shape [n, …], device and dtype of `like`."""
        fill = self._streams.fill
        noise = self._next.result() if self._next else fill(_buffer(like))
        self._left -= 1
        self._next = self._thread.submit(fill, _buffer(like)) if self._left > 0 else None
        return _moved(noise, like)


def _buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=torch.float32, pin_memory=like.is_cuda)


def _moved(noise: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Pinned, so the copy runs while the CPU goes on; on the CPU this copies nothing.
    return noise.to(like.device, like.dtype, non_blocking=True)


def random_labels(seed: int, start: int, stop: int, num_classes: int) -> np.ndarray:
    """Uniform labels of samples start … stop-1, int64 [n]; drawing them leaves noise as it is."""
    indices = range(start, stop)
    draws = [_generator(seed, index, "labels").integers(num_classes) for index in indices]
    return np.array(draws, np.int64)


def derived_seed(seed: int, number: int) -> int:
    """A seed for other people's generators of random numbers, in 0 … 2⁶³-1."""
    return int(_generator(seed, number, "seeds").integers(2**63))


def _generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    return philox(seed, index, purpose=_PURPOSES.index(purpose))


class Draws:
    """Random numbers for some rows of one step's global batch.

    With a seed they are a function of (seed, step, position in the global batch): N processes with
    batch B draw what one process with batch N·B draws, and a resumed run draws on as before. With
    seed None they come from the global generators of NumPy and torch, in the order of the calls.
    """

    def __init__(
        self, seed: int | None, step: int, global_batch: int, first_row: int, purpose: int = 0
    ):
        self._seed, self._step, self._purpose = seed, step, purpose
        self._global_batch, self._first_row = global_batch, first_row
        self._calls = 0

    def uniforms(self, n: int) -> np.ndarray | None:
        """Numbers in [0, 1), float64 [n]; None (the sampler's own draw) without a seed."""
        if self._seed is None:
            return None
        return self._stream().random(self._global_batch)[self._first_row :][:n]

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        """N(0, 1) in the shape, dtype and device of `like` [n, …]."""
        if self._seed is None:
            return torch.randn_like(like)
        seeds = self._stream().integers(0, 2**63, self._global_batch)[self._first_row :]
        generator = torch.Generator(like.device)
        noise = torch.empty_like(like)
        for row, seed in zip(noise, seeds.tolist(), strict=False):
            generator.manual_seed(seed)
            row.copy_(
                torch.randn(row.shape, dtype=like.dtype, device=like.device, generator=generator)
            )
        return noise

    def _stream(self) -> np.random.Generator:
        self._calls += 1
        assert self._seed is not None
        return philox(self._seed, self._step, family=self._purpose, purpose=self._calls)


def random_state() -> dict[str, Any]:
    """States of the global generators, in types that `weights_only` loading accepts."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
