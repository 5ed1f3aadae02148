"""Which timesteps a batch is trained on.

`UniformSampler` draws all alike; `LossSecondMomentResampler` draws a timestep in proportion to the
root mean square of its latest losses (improved DDPM, Nichol and Dhariwal 2021, section 3.3). All
take `num_timesteps` = T' for early-stopped training: only t < T' are drawn then.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from . import dist_util

SAMPLERS = ("uniform", "loss-second-moment")


def create_named_schedule_sampler(
    name: str, diffusion, num_timesteps: int | None = None
) -> "ScheduleSampler":
    """The sampler called `name` ("uniform" or "loss-second-moment") over t < `num_timesteps`.

    `num_timesteps` None is all steps of `diffusion`. ValueError for another name, or a number
    outside 1 … diffusion.num_timesteps.
    """
    if name == "uniform":
        return UniformSampler(diffusion, num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion, num_timesteps=num_timesteps)
    raise ValueError(f'schedule_sampler must be one of {", ".join(SAMPLERS)}, not "{name}"')


def _checked_steps(diffusion, num_timesteps: int | None) -> int:
    if num_timesteps is None:
        return diffusion.num_timesteps
    if not 1 <= num_timesteps <= diffusion.num_timesteps:
        raise ValueError(
            f"early_stop_steps must be in 1 … {diffusion.num_timesteps} (the diffusion's steps),"
            f" not {num_timesteps}"
        )
    return num_timesteps


class ScheduleSampler(ABC):
    """A distribution over timesteps; importance weights keep the loss's expectation."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights, one a timestep, in any scale."""

    def sample(
        self, batch_size: int, device: torch.device, uniforms: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps and their importance weights.

        `uniforms` are numbers in [0, 1) [batch_size] that decide the draw; NumPy's global generator
        gives them if they are left out. Returns t, int64 [batch_size], and float32 weights
        1 / (T p(t)) [batch_size].
        """
        weights = self.weights()
        p = weights / weights.sum()
        cumulative = p.cumsum()
        cumulative /= cumulative[-1]
        if uniforms is None:
            uniforms = np.random.random_sample(batch_size)
        steps = cumulative.searchsorted(uniforms, side="right")
        importance = 1 / (len(p) * p[steps])
        return (
            torch.from_numpy(steps).long().to(device),
            torch.from_numpy(importance).float().to(device),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs to draw on as before."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up the state of `state_dict`; ValueError for that of a sampler of another kind."""
        if "loss_history" in state:
            raise ValueError("the saved sampler went by losses")


class UniformSampler(ScheduleSampler):
    """All timesteps alike."""

    def __init__(self, diffusion, num_timesteps: int | None = None):
        self.diffusion = diffusion
        self.num_timesteps = _checked_steps(diffusion, num_timesteps)
        self._weights = np.ones([self.num_timesteps])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from losses; all processes see all losses and stay equal."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Tell the sampler this process's timesteps and losses [N]; call it on every process.

        Processes may bring batches of different sizes. Order of the update: by rank.
        """
        gathered = dist_util.gather_objects((local_ts.tolist(), local_losses.tolist()))
        self.update_with_all_losses(
            [t for ts, _ in gathered for t in ts], [loss for _, ls in gathered for loss in ls]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take in timesteps and losses of all processes, the same on each of them."""


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) ∝ sqrt(E[L_t²]) over the last `history_per_term` losses of each timestep.

    Uniform until every timestep has a full history; `uniform_prob` is mixed in so that none dies
    out.
    """

    def __init__(
        self,
        diffusion,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
        num_timesteps: int | None = None,
    ):
        self.diffusion = diffusion
        self.num_timesteps = _checked_steps(diffusion, num_timesteps)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([self.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([self.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones([self.num_timesteps], dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if not np.isfinite(loss):
                continue  # one such loss would make the timestep's weight NaN for good
            count = self._loss_counts[t]
            if count == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, count] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            "loss_history": torch.from_numpy(self._loss_history.copy()),
            "loss_counts": torch.from_numpy(self._loss_counts.copy()),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up losses; of another number of timesteps those that this sampler has, too.

        ValueError for the state of a sampler of another kind, or with a history of another length.
        """
        if "loss_history" not in state:
            raise ValueError("the saved sampler kept no losses")
        history, counts = state["loss_history"].numpy(), state["loss_counts"].numpy()
        if history.shape[1] != self.history_per_term:
            raise ValueError(
                f"history_per_term is {self.history_per_term}, the saved sampler's was"
                f" {history.shape[1]}"
            )
        common = min(len(history), self.num_timesteps)
        self._loss_history[:common] = history[:common]
        self._loss_counts[:common] = counts[:common]
