"""Layers and small tensor functions that every model of the package is built from."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.utils.checkpoint

# GroupNorm groups of every published model; channel counts must be multiples of it.
NORM_GROUPS = 32

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class SiLU(nn.SiLU):
    """x * sigmoid(x), under the name that guided-diffusion code imports."""


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


def _by_dims(table: Mapping[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in table:
        raise ValueError(f"dims must be one of {sorted(table)}, not {dims}")
    return table[dims]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    return _by_dims(_CONV, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional average pooling."""
    return _by_dims(_AVG_POOL, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


def normalization(channels: int) -> GroupNorm32:
    """The normalisation layer of all models: 32 groups over `channels`."""
    if channels % NORM_GROUPS:
        raise ValueError(f"channels must be a multiple of {NORM_GROUPS}, not {channels}")
    return GroupNorm32(NORM_GROUPS, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero all parameters of `module` and return it: residual branches start as identity."""
    return scale_module(module, 0.0)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of `module` by `scale` in place and return it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


@torch.no_grad()
def update_ema(
    target_params: Iterable[torch.Tensor], source_params: Iterable[torch.Tensor], rate: float = 0.99
) -> None:
    """Exponential moving average in place: target = rate * target + (1 - rate) * source."""
    targets = [p.detach() for p in target_params]
    # A half-precision source is rounded already: the average itself keeps the target's dtype.
    sources = [p.detach().to(t.dtype) for t, p in zip(targets, source_params, strict=True)]
    torch._foreach_lerp_(targets, sources, 1.0 - rate)


def mean_flat(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over all dimensions but the first: [N, ...] -> [N]."""
    return tensor.flatten(1).mean(dim=1) if tensor.ndim > 1 else tensor


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, max_period: float = 10000
) -> torch.Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5), cosines first.

    timesteps: [N], may be fractional. Returns float32 [N, dim]; frequencies fall geometrically
    from 1 to 1 / max_period, and an odd `dim` ends in a zero column.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def checkpoint(
    func: Callable, inputs: tuple, params: Iterable[torch.Tensor], flag: bool
) -> torch.Tensor:
    """Call `func(*inputs)`; if `flag`, recompute its activations in the backward pass.

    `params` is part of guided-diffusion's signature; autograd finds the parameters by itself.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction(torch.autograd.Function):
    """`CheckpointFunction.apply(func, n, *inputs, *params)`: `checkpoint` for n inputs.

    Not used here: unlike `checkpoint` it draws other dropout masks in the backward pass. Code
    written for guided-diffusion calls it.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Callable, length: int, *args: torch.Tensor) -> Any:
        ctx.run_function, ctx.length = run_function, length
        ctx.save_for_backward(*args)
        return run_function(*args[:length])

    @staticmethod
    def backward(ctx: Any, *output_grads: torch.Tensor) -> Any:
        args = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in args[: ctx.length]]
        with torch.enable_grad():
            # Views, so that a function that works in place leaves the inputs as they are.
            outputs = ctx.run_function(*(x.view_as(x) for x in inputs))
        wanted = [x for x in (*inputs, *args[ctx.length :]) if x.requires_grad]
        grads = iter(torch.autograd.grad(outputs, wanted, output_grads, allow_unused=True))
        every = (*inputs, *args[ctx.length :])
        return None, None, *(next(grads) if x.requires_grad else None for x in every)


def convert_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights and biases of all convolutions inside `module` to `dtype`, in place.

    Normalisation, embedding and linear layers keep float32: they are cheap and sensitive.
    """
    for layer in module.modules():
        if isinstance(layer, tuple(_CONV.values())):
            layer.to(dtype)
