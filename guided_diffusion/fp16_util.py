"""Optimiser steps in float32 on master copies, for models whose torso runs in float16.

Mixed precision training after Micikevicius et al. 2018: the loss is multiplied by a scale so that
small gradients do not vanish in float16, gradients are divided by it in float32, and the scale
grows slowly while they stay finite and halves when they do not.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn

from . import logger
from .nn import convert_convolutions

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
        return torch.stack(torch._foreach_norm(gradients)).norm()

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
        return torch.stack(torch._foreach_norm(self.master_params)).norm().item()

    @torch.no_grad()
    def masters_to_model(self) -> None:
        """Round the master parameters into the model."""
        if self.use_fp16:
            torch._foreach_copy_(self.model_params, self.master_params)

    def master_params_to_state_dict(self, master_params: list[torch.Tensor]) -> dict:
        """A float32 state dict of the model with these values of its parameters."""
        state = {name: value.detach() for name, value in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        for name, value in zip(names, master_params, strict=True):
            state[name] = value.detach().float().contiguous()
        return state

    def state_dict_to_master_params(self, state_dict: dict) -> list[torch.Tensor]:
        """The values of a state dict in the order of `master_params`."""
        return [state_dict[name] for name, _ in self.model.named_parameters()]
