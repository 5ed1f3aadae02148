"""Training of classifiers of noisy images."""

import torch
import torch.nn.functional as F

from ..resample import LossAwareSampler
from ..rng import Draws
from .loop import Trainer


class ClassifierTrainer(Trainer):
    """`Trainer` on the cross entropy of q(x_t | x_0) at random t (or of clean images)."""

    figure_prefix = "train_"

    def __init__(
        self, *, diffusion, sampler, noised: bool, val_data, eval_interval: int, **options
    ):
        self.diffusion, self.sampler, self.noised = diffusion, sampler, noised
        self.val_data, self.eval_interval = val_data, eval_interval
        super().__init__(num_timesteps=sampler.num_timesteps, **options)

    def compute_losses(
        self, batch: torch.Tensor, cond: dict[str, torch.Tensor], draw: Draws
    ) -> dict[str, torch.Tensor]:
        n, labels = len(batch), cond["y"]
        if self.noised:
            t, weight = self.sampler.sample(n, self.device, draw.uniforms(n))
            batch = self.diffusion.q_sample(batch, t, noise=draw.noise(batch))
        else:
            t = torch.zeros(n, dtype=torch.long, device=self.device)
            weight = torch.ones(n, device=self.device)
        logits = self.ddp_model(batch, t).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        hits = logits.topk(5, dim=1).indices == labels[:, None]
        return {
            "loss": losses,
            "acc@1": hits[:, 0].float(),
            "acc@5": hits.any(dim=1).float(),
            "t": t,
            "weight": weight,
        }

    def update_sampler(self, terms: dict[str, torch.Tensor]) -> None:
        if self.noised and isinstance(self.sampler, LossAwareSampler):
            self.sampler.update_with_local_losses(terms["t"], terms["loss"])

    def seek_data(self, step: int) -> None:
        super().seek_data(step)
        if self.val_data is not None:
            self.val_data.seek(step // self.eval_interval)  # evaluations before this step

    def end_data_workers(self) -> None:
        super().end_data_workers()
        if self.val_data is not None:
            self.val_data.end_workers()

    def after_step(self) -> None:
        if self.val_data is not None and self.global_step % self.eval_interval == 0:
            self.evaluate(*next(self.val_data), prefix="val_")

    def sampler_state(self) -> dict[str, torch.Tensor]:
        return self.sampler.state_dict()

    def load_sampler_state(self, state: dict[str, torch.Tensor]) -> None:
        self.sampler.load_state_dict(state)
