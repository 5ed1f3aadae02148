"""Divergences and likelihoods of Gaussians, in nats."""

import math

import torch


def normal_kl(
    mean1: torch.Tensor | float,
    logvar1: torch.Tensor | float,
    mean2: torch.Tensor | float,
    logvar2: torch.Tensor | float,
) -> torch.Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise in nats.

    Arguments broadcast; at least one is a tensor.
    """
    like = next((a for a in (mean1, logvar1, mean2, logvar2) if torch.is_tensor(a)), None)
    if like is None:
        raise ValueError("normal_kl needs at least one tensor among its four arguments")
    logvar1, logvar2 = (torch.as_tensor(v, dtype=like.dtype, device=like.device)
                        for v in (logvar1, logvar2))  # fmt: skip
    variance_ratio = torch.exp(logvar1 - logvar2)
    scaled_distance = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (variance_ratio + scaled_distance - 1.0 + logvar2 - logvar1)


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Tanh approximation of the standard normal's cumulative distribution (Page, 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, *, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log probability that a Gaussian gives to the 8-bit bin of each value (DDPM, eq. 13).

    x: images whose uint8 levels were mapped to [-1, 1], so bins are 2/255 wide; the first and
    last bins reach to infinity. means, log_scales (log standard deviation): the shape of x.
    Returns nats, elementwise.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            "x, means and log_scales must have one shape, not "
            f"{tuple(x.shape)}, {tuple(means.shape)}, {tuple(log_scales.shape)}"
        )
    half_bin = 1.0 / 255.0
    # Levels lie 2/255 apart, so only the outermost one is beyond +-0.999.
    lowest, highest = x < -0.999, x > 0.999
    inverse_scale = torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse_scale * (x - means + half_bin))
    lower = approx_standard_normal_cdf(inverse_scale * (x - means - half_bin))
    upper = torch.where(highest, torch.ones_like(upper), upper)
    lower = torch.where(lowest, torch.zeros_like(lower), lower)
    # The clamp keeps the logarithm finite where the bin's mass underflows float32.
    return torch.log((upper - lower).clamp(min=1e-12))
