"""Few network evaluations: which timesteps to evaluate, and DPM-Solver++ 2M between them.

Paper: DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), its multistep solvers with data prediction.
Everything here is arithmetic on noise levels; networks and guidance are the reverse loop's.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SOLVERS = ("dpmpp_2m", "dpmpp_2m_sde")
SPACINGS = ("uniform", "logsnr", "karras")

_KARRAS_RHO = 7  # Karras et al. 2022 (arXiv 2206.00364), section D.1


def evaluation_timesteps(
    alphas_cumprod: np.ndarray, t_prime: int, steps: int, spacing: str = "uniform"
) -> list[int]:
    """The `steps` timesteps that are evaluated on the way from noise level `t_prime`, descending.

    alphas_cumprod: float64 [T] of the original process. The first timestep is t_prime - 1. With
    "uniform" the i-th is t_prime (steps - i) / steps - 1, rounded: equal strides, the last of
    which ends at the clean image. "logsnr" and "karras" go down to timestep 0, in equal strides of
    log(alpha / sigma), or of (sigma / alpha)^(1/7). Every sampler can use them: pass them to
    SpacedDiffusion as `use_timesteps`. ValueError for values that the process cannot give.
    """
    total = len(alphas_cumprod)
    if not 1 <= t_prime <= total:
        raise ValueError(f"t_prime must be in 1 ... {total}, not {t_prime}")
    if not 1 <= steps <= t_prime:
        raise ValueError(f"steps must be in 1 ... {t_prime} for t_prime {t_prime}, not {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f'spacing must be one of {", ".join(SPACINGS)}, not "{spacing}"')
    if spacing == "uniform":
        return [(2 * t_prime * i + steps) // (2 * steps) - 1 for i in range(steps, 0, -1)]
    logsnr = _half_logsnr(np.asarray(alphas_cumprod)[:t_prime])
    # An axis that grows with the timestep, in which the strides are equal.
    axis = -logsnr if spacing == "logsnr" else np.exp(-logsnr / _KARRAS_RHO)
    wanted = np.linspace(axis[-1], axis[0], steps)
    nearest = np.rint(np.interp(wanted, axis, np.arange(t_prime))).astype(int)
    times = [t_prime - 1]
    for left, time in zip(range(steps - 2, -1, -1), nearest[1:], strict=True):
        # Timesteps that round to the same one move on, and leave room for those that follow.
        times.append(max(min(int(time), times[-1] - 1), left))
    return times


class MultistepSolver:
    """DPM-Solver++ 2M from noise level to noise level, one call a step; for one trajectory.

    levels: alphas_cumprod at the evaluated timesteps, descending, float64 [K]. eta is the share of
    the SDE's noise: 0 solves the ODE (arXiv 2211.01095, alg. 2), 1 the SDE (its appendix on
    SDE-DPM-Solver++).
    """

    def __init__(self, levels: np.ndarray, eta: float):
        self._coefficients = _coefficients(np.asarray(levels, dtype=np.float64), eta)
        self._done = 0
        self._before: torch.Tensor | None = None

    def __call__(
        self, x: "torch.Tensor", x_start: "torch.Tensor", z: "torch.Tensor"
    ) -> "torch.Tensor":
        """The next x from this one, the x_0 predicted from it, and standard normal noise z.

        With D = x_start and D' the one before: keep x + gain D + slope (D - D') + noise z. The
        first call has no D' and is first order; the last returns D.
        """
        keep, gain, slope, noise = (float(c) for c in self._coefficients[self._done])
        before = x_start if self._before is None else self._before
        self._done += 1
        self._before = x_start
        if self._done == len(self._coefficients):
            return x_start
        return keep * x + (gain + slope) * x_start - slope * before + noise * z


def make_solver(sampler: str, levels: np.ndarray, eta: float | None = None) -> MultistepSolver:
    """The solver of that name. eta is for "dpmpp_2m_sde" (default 1); "dpmpp_2m" has eta 0."""
    if sampler not in SOLVERS:
        raise ValueError(f'sampler must be one of {", ".join(SOLVERS)}, not "{sampler}"')
    if eta is None:
        eta = 1.0 if sampler == "dpmpp_2m_sde" else 0.0
    if sampler == "dpmpp_2m" and eta != 0:
        raise ValueError(f"eta must be 0 for dpmpp_2m, which adds no noise, not {eta}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0 ... 1, not {eta}")
    return MultistepSolver(levels, eta)


def _half_logsnr(levels: np.ndarray) -> np.ndarray:
    """lambda = log(alpha / sigma)."""
    return 0.5 * (np.log(levels) - np.log1p(-levels))


def _coefficients(levels: np.ndarray, eta: float) -> np.ndarray:
    """keep, gain, slope and noise of every step, float64 [K, 4]; the last row is not used."""
    alpha, sigma, logsnr = np.sqrt(levels), np.sqrt(1 - levels), _half_logsnr(levels)
    h = np.diff(logsnr)
    keep = sigma[1:] / sigma[:-1] * np.exp(-eta * h)
    gain = -alpha[1:] * np.expm1(-(1 + eta) * h)
    # 1 / (2 r) with r = h' / h, h' the step before; the first step has none.
    slope = gain * np.append(0.0, h[1:] / (2 * h[:-1]))[: len(h)]
    noise = sigma[1:] * np.sqrt(-np.expm1(-2 * eta * h))
    return np.append(np.stack([keep, gain, slope, noise], axis=1), [[0.0, 1.0, 0.0, 0.0]], axis=0)
