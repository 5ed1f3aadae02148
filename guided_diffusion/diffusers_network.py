"""The U-Net of diffusers, called as our networks are."""

import json

import numpy as np
import torch

from .gaussian_diffusion import get_named_beta_schedule


class DiffusersNetwork(torch.nn.Module):
    """A UNet2DModel that is called as our networks are.

    alphas_cumprod: float64 [T] of the process if the U-Net predicts v, from which x_0 is made:
    v = sqrt(ᾱ) ε - sqrt(1-ᾱ) x_0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D), and so
    x_0 = sqrt(ᾱ) x_t - sqrt(1-ᾱ) v.
    """

    def __init__(self, unet: torch.nn.Module, alphas_cumprod: np.ndarray | None = None):
        super().__init__()
        self.unet = unet
        self.predicts_v = alphas_cumprod is not None
        if alphas_cumprod is not None:
            sigmas = torch.tensor(log_sigmas(alphas_cumprod), dtype=torch.float32)
            self.register_buffer("log_sigmas", sigmas, persistent=False)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `UNetModel.forward`: the noise, or x_0 if the U-Net predicts that or v."""
        dtype = next(self.unet.parameters()).dtype
        output = self.unet(x.to(dtype), timesteps, y, return_dict=False)[0].to(x.dtype)
        return self._x_start(output, x, timesteps) if self.predicts_v else output

    def _x_start(self, v: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        below = t.floor().long() if t.is_floating_point() else t
        above = (below + 1).clamp(max=len(self.log_sigmas) - 1)
        log_sigma = torch.lerp(
            self.log_sigmas[below], self.log_sigmas[above], (t - below).to(self.log_sigmas.dtype)
        )
        # σ² = (1-ᾱ)/ᾱ, so ᾱ is the sigmoid of -2 log σ.
        level = torch.sigmoid(-2 * log_sigma).view(-1, 1, 1, 1)
        v, variance = v[:, : x.shape[1]], v[:, x.shape[1] :]
        return torch.cat([level.sqrt() * x - (1 - level).sqrt() * v, variance], dim=1)

    def convert_to(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`, as diffusers does: all of the U-Net but its sinusoids."""
        self.unet.to(dtype)


def log_sigmas(alphas_cumprod: np.ndarray) -> np.ndarray:
    """log σ, σ = sqrt((1-ᾱ)/ᾱ): x_t / sqrt(ᾱ) = x_0 + σ ε."""
    return 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))


def create_diffusers(
    unet: str, v_prediction: bool, noise_schedule: str, diffusion_steps: int
) -> DiffusersNetwork:
    """A new network; unet: the JSON of a UNet2DModel's config."""
    from diffusers import UNet2DModel

    levels = None
    if v_prediction:
        levels = np.cumprod(1 - get_named_beta_schedule(noise_schedule, diffusion_steps))
    return DiffusersNetwork(UNet2DModel.from_config(json.loads(unet)), levels)
