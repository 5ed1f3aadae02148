"""Parameters, gradients, averages and moments split over the processes (FSDP2, `fully_shard`).

Each process keeps its part of every tensor, and whole blocks only while they compute. What is saved
is whole again: the files are those of any other run.
"""

from typing import Any

import torch
import torch.nn as nn

from esddpm_io.errors import UserError

# Methods that are called in place of `forward` (a VAE's), and need the weights as it does.
_ENTRANCES = ("encode", "decode")


def shard(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of `model`, which are the same on all processes, in place.

    Its blocks, the elements of its module lists, are gathered one after the other. UserError where
    this PyTorch cannot.
    """
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise UserError(f"--shard needs PyTorch 2.6 or newer, not {torch.__version__}") from error
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in [block for blocks in lists for block in blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in _ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def forget_gathered(model: nn.Module) -> None:
    """Have the next forward gather the parameters again, whose parts have been written to.

    FSDP keeps those of the outermost module gathered after a forward without gradients.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor put together if it is split; all processes must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def for_saving(value: Any, keep: bool) -> Any:
    """`value` with all split tensors in it put together, one after the other, on the CPU.

    All processes must call this; where not `keep`, nothing stays of them.
    """
    if isinstance(value, dict):
        return {name: for_saving(part, keep) for name, part in value.items()}
    if isinstance(value, list):
        return [for_saving(part, keep) for part in value]
    if not hasattr(value, "full_tensor"):
        return value
    together = value.full_tensor()
    return together.cpu() if keep else together.new_empty(0)


def split_like(value: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, split as `pattern` is (if it is)."""
    if not hasattr(pattern, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(pattern.device, pattern.dtype)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements)
