"""Parameters, gradients, averages and moments split over the processes (FSDP2, `fully_shard`).

Each process keeps its part of every tensor, and whole blocks only while they compute. What is saved
is whole again: the files are those of any other run.
"""

from typing import Any

import torch
import torch.nn as nn


def shard(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of `model`, which are the same on all processes, in place.

    Its blocks, the elements of its module lists, are gathered one after the other.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in [block for blocks in lists for block in blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Any) -> Any:
    """`value` with all split tensors in it put together; all processes must call this."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def split_like(value: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, split as `pattern` is (if it is)."""
    if not hasattr(pattern, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(pattern.device, pattern.dtype)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements)
