"""Make solvers.npz: trajectories of diffusers' DPMSolverMultistepScheduler on our timesteps.

    pip install diffusers && PYTHONPATH=. python tests/golden/make_solvers.py

diffusers 0.42.1 made the stored values. The network is `toy_noise`, all numbers are float64.
"""

from pathlib import Path

import numpy as np
import torch

from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.solvers import evaluation_timesteps

# Schedule, T', steps; 16 steps are where diffusers changes its rule for the last step.
CASES = {
    "whole": ("linear", 1000, 6),
    "early": ("cosine", 500, 8),
    "many": ("linear", 400, 16),
    "two": ("cosine", 200, 2),
    "one": ("cosine", 200, 1),
}
ALGORITHMS = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}


def toy_noise(x: torch.Tensor, t: torch.Tensor, **_) -> torch.Tensor:
    """A network without weights: noise predicted at the timesteps t [N]."""
    return torch.sin(2 * x) + t.view(-1, 1, 1, 1) / 2000


def start_and_noises(steps: int) -> torch.Tensor:
    """x at the first timestep, then the draws of the steps, float64 [1 + steps, 1, 1, 3, 3]."""
    return torch.from_numpy(np.random.default_rng(steps).standard_normal((1 + steps, 1, 1, 3, 3)))


def trajectory(algorithm: str, schedule: str, t_prime: int, steps: int) -> np.ndarray:
    from diffusers import DPMSolverMultistepScheduler

    betas = get_named_beta_schedule(schedule, 1000)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas, algorithm_type=algorithm, final_sigmas_type="zero"
    )
    # Its tables are float32; these are the same in float64.
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    times = evaluation_timesteps(np.cumprod(1 - betas), t_prime, steps)
    scheduler.set_timesteps(timesteps=times)
    levels = np.append(np.cumprod(1 - betas)[times], 1.0)
    scheduler.sigmas = torch.from_numpy(np.sqrt((1 - levels) / levels))
    x, *noises = start_and_noises(steps)
    states = []
    for t, z in zip(scheduler.timesteps, noises, strict=True):
        eps = toy_noise(x, t[None].double())
        x = scheduler.step(eps, t, x, variance_noise=z).prev_sample.double()
        states.append(x.numpy())
    return np.stack(states)


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_name("solvers.npz"),
        **{
            f"{name}/{sampler}": trajectory(algorithm, *case)
            for name, case in CASES.items()
            for sampler, algorithm in ALGORITHMS.items()
        },
    )
