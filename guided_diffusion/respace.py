"""Shorter chains: keep some steps of a diffusion process (improved DDPM, section 4)."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .gaussian_diffusion import MODEL_TIME_SPAN, GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Iterable[int]) -> set[int]:
    """Choose which of the steps 0 ... num_timesteps - 1 a respaced chain keeps.

    section_counts: "250" keeps 250 evenly spaced steps; "10,15,25" (or a list) divides the chain
    into equal sections and keeps that many in each; "ddim25" keeps 25 by a whole stride from
    step 0, as DDIM does. ValueError where the chain cannot give the steps.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided(num_timesteps, section_counts)
        section_counts = _parse_counts(section_counts)
    counts = list(section_counts)
    if not 1 <= len(counts) <= num_timesteps:
        raise ValueError(f"a chain of {num_timesteps} steps has 1 ... {num_timesteps} sections")
    base, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for index, count in enumerate(counts):
        size = base + (index < longer)
        if not 1 <= count <= size:
            raise ValueError(
                f"cannot keep {count} steps of a section of {size}: choose 1 ... {size}"
            )
        kept.update(start + offset for offset in _even_offsets(size, count))
        start += size
    return kept


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f'a chain length is a number, a comma list of numbers, or "ddim" and a number,'
            f' not "{text}"'
        ) from None


def _even_offsets(size: int, count: int) -> list[int]:
    """`count` offsets from 0 to size - 1, both ends included.

    Rounded from a running sum, whose rounding errors decide ties: networks were respaced so.
    """
    stride = (size - 1) / (count - 1) if count > 1 else 1
    return [round(position) for position in itertools.accumulate([0.0] + [stride] * (count - 1))]


def _strided(num_timesteps: int, spec: str) -> set[int]:
    """The steps of "ddimN": the smallest whole stride that keeps exactly N steps."""
    possible: dict[int, int] = {}
    for stride in range(1, num_timesteps + 1):
        possible.setdefault(len(range(0, num_timesteps, stride)), stride)
    text = spec.removeprefix("ddim")
    if not text.isdecimal() or int(text) not in possible:
        wanted = int(text) if text.isdecimal() else 50
        near = sorted(sorted(possible, key=lambda n: abs(n - wanted))[:5])
        raise ValueError(
            f'no whole stride over {num_timesteps} steps gives "{spec}";'
            f" near it: {', '.join(f'ddim{n}' for n in near)}"
        )
    return set(range(0, num_timesteps, possible[int(text)]))


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process that keeps the steps `use_timesteps` of a base process.

    kwargs (with the base process's `betas`) go to GaussianDiffusion. The betas are those under
    which the kept steps have their old noise levels; `timestep_map[i]` is the original step of
    index i, which is what the network sees.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        betas = np.asarray(kwargs["betas"], dtype=np.float64)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.timestep_reverse_map = {t: index for index, t in enumerate(self.timestep_map)}
        self.original_num_steps = len(betas)
        if not self.timestep_map or not (
            self.timestep_map[0] >= 0 and self.timestep_map[-1] < len(betas)
        ):
            raise ValueError(f"use_timesteps must be some of 0 ... {len(betas) - 1}")
        levels = np.cumprod(1.0 - betas)[self.timestep_map]
        kwargs["betas"] = 1 - levels / np.append(1.0, levels[:-1])
        super().__init__(**kwargs)
        self.original_betas = betas

    def _kept_timesteps(self) -> list[int]:
        return self.timestep_map

    def _scale_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        original = self._original_timesteps(t)
        if self.rescale_timesteps:
            return original.float() * (MODEL_TIME_SPAN / self.original_num_steps)
        return original

    def _original_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        key = ("timestep_map", t.device)
        if key not in self._tables:
            self._keep_table(key, torch.tensor(self.timestep_map, dtype=t.dtype))
        return self._tables[key][t]


class _WrappedModel:
    """A network that is called with the indices of a shorter chain, and sees original timesteps.

    Not used here (`SpacedDiffusion` translates by itself); code written for guided-diffusion's
    processes imports it.
    """

    def __init__(
        self,
        model: Callable,
        timestep_map: Iterable[int],
        rescale_timesteps: bool,
        original_num_steps: int,
    ):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: torch.Tensor, ts: torch.Tensor, **kwargs: Any) -> Any:
        """`model(x, original timesteps of ts [N], **kwargs)`."""
        original = torch.tensor(list(self.timestep_map), device=ts.device, dtype=ts.dtype)[ts]
        if self.rescale_timesteps:
            original = original.float() * (MODEL_TIME_SPAN / self.original_num_steps)
        return self.model(x, original, **kwargs)
