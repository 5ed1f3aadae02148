"""Access to the reference values in tests/golden (what the published code computes).

No weights are stored there: `fill` derives every parameter from its name, so that parity of a
forward pass also proves names and shapes.
"""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


@cache
def meta() -> dict:
    """Configurations, state-dict names and shapes, and seeds of the cases."""
    with gzip.open(FOLDER / "meta.json.gz", "rt") as file:
        return json.load(file)


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/NAME.npz."""
    with np.load(FOLDER / f"{name}.npz") as npz:
        return {key: npz[key] for key in npz.files}


def tensor(name: str, key: str) -> torch.Tensor:
    """One array as a tensor of its own."""
    return torch.from_numpy(arrays(name)[key].copy())


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Names and shapes of a state dict, as tests/golden/meta.json.gz stores them."""
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def fill(model: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    """Give every parameter the value that its name determines; returns the model in eval mode.

    A standard normal seeded with the name's CRC-32: divided by the root of the fan-in where there
    are two or more dimensions, else 1 + 0.1 n for weights and 0.1 n for biases.
    """
    for name, parameter in model.named_parameters():
        rng = np.random.default_rng(zlib.crc32((salt + name).encode()))
        n = rng.standard_normal(tuple(parameter.shape))
        if parameter.ndim >= 2:
            value = n / np.sqrt(np.prod(parameter.shape[1:]))
        else:
            value = 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
        parameter.data.copy_(torch.from_numpy(value.astype(np.float32)))
    return model.eval()


def small_model(name: str, **changes):
    """The filled model and the diffusion process of a golden configuration."""
    from guided_diffusion.script_util import create_model_and_diffusion

    model, diffusion = create_model_and_diffusion(**{**meta()[name]["config"], **changes})
    return fill(model), diffusion
