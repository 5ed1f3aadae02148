"""Optimiser steps in float32 on master copies, for models whose torso runs in float16.

Mixed precision training after Micikevicius et al. 2018: the loss is multiplied by a scale so that
small gradients do not vanish in float16, gradients are divided by it in float32, and the scale
grows slowly while they stay finite and halves when they do not.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from . import logger
from .nn import convert_convolutions
from .sharding import for_saving, whole

INITIAL_LOG_LOSS_SCALE = 20.0
# Bounds of the scale's binary logarithm. Below: 2^-14 is the smallest normal float16, and a smaller
# scale only helps gradients that no float16 could hold. Above: 2^30 lifts the smallest float16
# number, 2^-24, far into its range, and a loss times 2^30 is still far from float32's end.
LG_LOSS_SCALE_RANGE = (-14.0, 30.0)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 (guided-diffusion's name)
    """Cast the convolutions of `l` to float16; for `model.apply`."""
    convert_convolutions(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Undo `convert_module_to_f16`."""
    convert_convolutions(l, torch.float32)


def zero_grad(model_params: Iterable[nn.Parameter]) -> None:
    """Forget the gradients of these parameters."""
    for parameter in model_params:
        parameter.grad = None


def check_overflow(value: float) -> bool:
    """Whether a gradient norm (or any other number) is infinite or NaN."""
    return value != value or value in (float("inf"), -float("inf"))


ParamGroup = list[tuple[str, torch.Tensor]]
GroupsAndShapes = list[tuple[ParamGroup, Any]]


def get_param_groups_and_shapes(
    named_model_params: Iterable[tuple[str, torch.Tensor]],
) -> GroupsAndShapes:
    """Named parameters in two groups, vectors [-1] and all others [1, -1]: group and flat shape.

    guided-diffusion's float16 training keeps its master parameters, and so the moments in its
    optNNNNNN.pt, as one flat tensor a group; the functions below go between the two forms.
    """
    named = list(named_model_params)
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    others = [(name, p) for name, p in named if p.ndim > 1]
    return [(vectors, (-1,)), (others, (1, -1))]


def make_master_params(param_groups_and_shapes: GroupsAndShapes) -> list[nn.Parameter]:
    """A float32 copy of each group as one parameter."""
    return [
        nn.Parameter(_flat([p.detach().float() for _, p in group]).view(shape))
        for group, shape in param_groups_and_shapes
    ]


def model_grads_to_master_grads(
    param_groups_and_shapes: GroupsAndShapes, master_params: Iterable[torch.Tensor]
) -> None:
    """Copy gradients in float32; parameters without one count as zeros."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flat([param_grad_or_zeros(p).float() for _, p in group]).view(shape)


@torch.no_grad()
def master_params_to_model_params(
    param_groups_and_shapes: GroupsAndShapes, master_params: Iterable[torch.Tensor]
) -> None:
    """Round the values of flat master parameters into the model's."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, p), value in zip(group, unflatten_master_params(group, master), strict=True):
            p.copy_(value)


def unflatten_master_params(
    param_group: ParamGroup, master_param: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The parts of a flat tensor in the shapes of the group's parameters."""
    parts = master_param.flatten().split([p.numel() for _, p in param_group])
    return tuple(part.view_as(p) for part, (_, p) in zip(parts, param_group, strict=True))


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: GroupsAndShapes | None,
    master_params: list[torch.Tensor],
    use_fp16: bool,
) -> dict[str, torch.Tensor]:
    """The model's state dict with the values of master parameters, flat ones if `use_fp16`."""
    state = model.state_dict()
    if not use_fp16:
        return state | dict(zip(dict(model.named_parameters()), master_params, strict=True))
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        state |= dict(zip(dict(group), unflatten_master_params(group, master), strict=True))
    return state


def state_dict_to_master_params(
    model: nn.Module, state_dict: dict[str, torch.Tensor], use_fp16: bool
) -> list[torch.Tensor]:
    """The values of a state dict in the order of `model.parameters()`, flat if `use_fp16`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return make_master_params(get_param_groups_and_shapes(named))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[torch.Tensor]) -> None:
    """Forget the gradients of master parameters."""
    zero_grad(master_params)


def param_grad_or_zeros(param: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, zeros if it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all of them together, a scalar."""
    return whole(torch.stack(torch._foreach_norm(tensors)).norm())


class MixedPrecisionTrainer:
    """The parameters an optimiser works on, and the way of gradients to them.

    `master_params` are float32 and in the order of `model.parameters()`: the model's own ones, or
    with `use_fp16` copies, after `model.convert_to_fp16()`. Use: `zero_grad()`, `backward(loss)`
    once or more, `optimize(opt)` with an optimiser over `master_params`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ):
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        # A group for each parameter: unlike guided-diffusion's, our masters are not flat.
        named = model.named_parameters()
        self.param_groups_and_shapes = [([(name, p)], p.shape) for name, p in named]
        if use_fp16:
            # Copied first: the masters start from the weights before rounding.
            self.master_params = [
                nn.Parameter(p.detach().float().clone(), p.requires_grad) for p in self.model_params
            ]
            model.convert_to_fp16()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        zero_grad(self.model_params)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss (times the loss scale in float16)."""
        if self.use_fp16:
            loss = loss.float() * 2.0**self.lg_loss_scale
        loss.backward()

    @torch.no_grad()
    def gather_gradients(self) -> torch.Tensor:
        """Bring the gradients to all master parameters, unscaled; return their norm (scalar)."""
        if self.use_fp16:
            for master, parameter in zip(self.master_params, self.model_params, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        gradients = [p.grad for p in self.master_params if p.grad is not None]
        if self.use_fp16:
            torch._foreach_mul_(gradients, 2.0**-self.lg_loss_scale)
        return _norm(gradients)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiply what `gather_gradients` brought to the master parameters."""
        gradients = [p.grad for p in self.master_params if p.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def apply(self, opt: torch.optim.Optimizer, grad_norm: float) -> bool:
        """Take the optimiser's step unless `grad_norm` (of `gather_gradients`) is not finite.

        Adjusts the loss scale in float16. Returns whether the step was taken.
        """
        overflow = check_overflow(grad_norm)
        if self.use_fp16:
            lowest, highest = LG_LOSS_SCALE_RANGE
            change = -1.0 if overflow else self.fp16_scale_growth
            self.lg_loss_scale = min(max(self.lg_loss_scale + change, lowest), highest)
        if not overflow:
            opt.step()
            self.masters_to_model()
        zero_grad(self.master_params)
        return not overflow

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """`gather_gradients` and `apply` in one call, with the norms logged."""
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        grad_norm = self.gather_gradients().item()
        taken = self.apply(opt, grad_norm)
        if taken:
            logger.logkv_mean("grad_norm", grad_norm)
            logger.logkv_mean("param_norm", self.param_norm())
        else:
            logger.log(f"gradients not finite: lg_loss_scale is now {self.lg_loss_scale:.3f}")
        return taken

    @torch.no_grad()
    def param_norm(self) -> float:
        """Euclidean norm of all master parameters."""
        return _norm(self.master_params).item()

    @torch.no_grad()
    def masters_to_model(self) -> None:
        """Round the master parameters into the model."""
        if self.use_fp16:
            torch._foreach_copy_(self.model_params, self.master_params)

    def master_params_to_state_dict(
        self, master_params: list[torch.Tensor], keep: bool = True
    ) -> dict:
        """A float32 state dict of the model with these values of its parameters.

        Of split ones all processes must call this, and only where `keep` it has their values.
        """
        state = master_params_to_state_dict(self.model, None, master_params, use_fp16=False)
        trained = dict(self.model.named_parameters())
        return {
            name: value.detach().float().contiguous() if name in trained else value.detach()
            for name, value in for_saving(state, keep).items()
        }

    def state_dict_to_master_params(self, state_dict: dict) -> list[torch.Tensor]:
        """The values of a state dict in the order of `master_params`."""
        return state_dict_to_master_params(self.model, state_dict, use_fp16=False)
