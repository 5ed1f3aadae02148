"""Training of diffusion models: guided-diffusion's `TrainLoop`, and its loss."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .. import logger
from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType
from ..resample import LossAwareSampler, ScheduleSampler, UniformSampler
from ..rng import Draws
from .loop import Trainer, log_terms


class TrainLoop(Trainer):
    """`Trainer` on the loss of a diffusion model; guided-diffusion's class, extended.

    `schedule_sampler` (default uniform) decides the timesteps; `snr_gamma`, if not 0, weighs their
    squared errors as `min_snr_weights`. All other keywords are `Trainer`'s.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion,
        data: Iterator[tuple[torch.Tensor, dict]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        snr_gamma: float = 0.0,
        **options: Any,
    ):
        self.diffusion = diffusion
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.fp16_scale_growth, self.snr_gamma = fp16_scale_growth, snr_gamma
        self.mse_weights: torch.Tensor | None = None
        if snr_gamma:
            weights = min_snr_weights(diffusion, snr_gamma, self.schedule_sampler_steps())
            self.mse_weights = torch.from_numpy(weights).float()
        options.setdefault("num_timesteps", self.schedule_sampler_steps())
        super().__init__(
            model=model,
            data=data,
            batch_size=batch_size,
            microbatch=microbatch,
            lr=lr,
            ema_rate=ema_rate,
            log_interval=log_interval,
            save_interval=save_interval,
            resume_checkpoint=resume_checkpoint,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            weight_decay=weight_decay,
            lr_anneal_steps=lr_anneal_steps,
            **options,
        )
        self.use_fp16 = self.precision == "float16"
        self.use_ddp, self.sync_cuda = self.world_size > 1, self.device.type == "cuda"

    def schedule_sampler_steps(self) -> int:
        """T' of early-stopped training, or all steps of the diffusion."""
        return getattr(self.schedule_sampler, "num_timesteps", self.diffusion.num_timesteps)

    def compute_losses(
        self, batch: torch.Tensor, cond: dict[str, torch.Tensor], draw: Draws
    ) -> dict[str, torch.Tensor]:
        n = len(batch)
        t, weights = self.schedule_sampler.sample(n, self.device, draw.uniforms(n))
        terms = self.diffusion.training_losses(
            self.ddp_model, batch, t, model_kwargs=cond, noise=draw.noise(batch)
        )
        if self.mse_weights is not None:
            extra = self.mse_weights.to(t.device)[t] - 1
            terms["loss"] = terms["loss"] + extra * terms["mse"]
        return {**terms, "t": t, "weight": weights}

    def update_sampler(self, terms: dict[str, torch.Tensor]) -> None:
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(terms["t"], terms["loss"])

    def sampler_state(self) -> dict[str, torch.Tensor]:
        gamma = torch.tensor(self.snr_gamma, dtype=torch.float64)
        return {**self.schedule_sampler.state_dict(), "snr_gamma": gamma}

    def load_sampler_state(self, state: dict[str, torch.Tensor]) -> None:
        before = float(state.get("snr_gamma", 0.0))
        if before != self.snr_gamma:
            logger.warn(
                f"--snr_gamma {self.snr_gamma:g}: the steps so far had {before:g} (0: no weights)"
            )
        self.schedule_sampler.load_state_dict(state)


def min_snr_weights(diffusion: GaussianDiffusion, gamma: float, num_timesteps: int) -> np.ndarray:
    """Weights of the squared errors at t < `num_timesteps`, float64 [num_timesteps], of mean 1.

    In terms of x_0 they are min(SNR, gamma), SNR = ᾱ / (1-ᾱ) (Hang et al. 2023, arXiv 2303.09556).
    ValueError for a diffusion whose loss has no squared error of the noise, x_0 or the velocity.
    """
    snr = diffusion.alphas_cumprod[:num_timesteps] / (1 - diffusion.alphas_cumprod[:num_timesteps])
    per_x_start = {  # squared errors of what is predicted, in those of x_0
        ModelMeanType.START_X: np.ones_like(snr),
        ModelMeanType.EPSILON: snr,
        ModelMeanType.VELOCITY: snr + 1,
    }
    if diffusion.loss_type.is_vb() or diffusion.model_mean_type not in per_x_start:
        raise ValueError("snr_gamma goes with losses of the squared error: leave out use_kl")
    weights = np.minimum(snr, gamma) / per_x_start[diffusion.model_mean_type]
    return weights / weights.mean()


def log_loss_dict(diffusion, ts: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
    """Log the means of loss terms [N], over all and over each quarter of the timesteps `ts` [N]."""
    terms = {name: values.detach().double().cpu().numpy() for name, values in losses.items()}
    log_terms(terms, ts.cpu().numpy(), diffusion.num_timesteps)
