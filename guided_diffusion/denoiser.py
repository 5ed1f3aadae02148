"""A network as the denoiser of k-diffusion and EDM samplers: D(x, σ)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import MODEL_TIME_SPAN, GaussianDiffusion, ModelMeanType


class Denoiser:
    """D(x, σ): the clean image in x = x_0 + σ n (Karras et al. 2022, arXiv 2206.00364, eq. 7).

    The network sees x c_in, c_in = 1 / sqrt(1 + σ²), at the timestep of that σ, interpolated in
    log σ where σ = sqrt((1-ᾱ)/ᾱ) at whole timesteps. sigma_min, sigma_max: of the first and the
    last of these; beyond them the network is evaluated at the end.
    """

    def __init__(self, module: Callable, diffusion: GaussianDiffusion):
        self._module = module
        self._gives = diffusion.model_mean_type
        scaled = MODEL_TIME_SPAN / diffusion.num_timesteps
        self._time_scale = scaled if diffusion.rescale_timesteps else 1.0
        levels = diffusion.alphas_cumprod
        self._log_sigmas = 0.5 * (np.log1p(-levels) - np.log(levels))
        self.sigma_min, self.sigma_max = map(float, np.exp(self._log_sigmas[[0, -1]]))

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """Timesteps of the noise levels sigma [N], float32 [N]."""
        wanted = sigma.detach().double().cpu().log().numpy()
        steps = np.interp(wanted, self._log_sigmas, np.arange(len(self._log_sigmas)))
        return torch.as_tensor(steps, dtype=torch.float32, device=sigma.device)

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        y: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """x: NCHW; sigma: a number or [N]; y: labels [N] if the network takes them. Returns x_0."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        each = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        times = self.timesteps(sigma) * self._time_scale
        if y is not None:
            kwargs["y"] = y
        c_in = (1 + each**2).rsqrt()
        output = self._module(c_in * x, times, **kwargs)[:, : x.shape[1]]
        if self._gives == ModelMeanType.START_X:
            return output
        if self._gives == ModelMeanType.VELOCITY:
            return c_in**2 * x - c_in * each * output
        return x - each * output
