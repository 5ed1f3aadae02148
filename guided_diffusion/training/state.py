"""What training changes, and its checkpoints: made new, resumed, saved."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from esddpm_io.errors import UserError
from esddpm_io.files import exists

from .. import dist_util, logger
from ..checkpoint_sets import (
    MOMENTS,
    CheckpointSet,
    find_set,
    fit_optimizer_state,
    prune_sets,
    set_aside,
)
from ..checkpoints import check_fit, load_weights, network_state
from ..fp16_util import MixedPrecisionTrainer
from ..rng import random_state, restore_random_state
from ..sharding import for_saving, forget_gathered, shard, split_like


class RunState:
    """Model, master parameters, averages, optimiser and counters of a run, and their files.

    A base class of `Trainer`, which sets all that its arguments say before `_start`.
    """

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    global_batch: int
    lr: float
    weight_decay: float
    ema_rate: list[float]
    power_ema: list[float]
    precision: str
    seed: int | None
    resume_checkpoint: str
    keep_checkpoints: int
    sidecar: dict | None
    shard: bool
    step = 0  # done by this process …
    resume_step = 0  # … and before it started
    resume_samples = 0  # images of those steps

    # What a subclass may define.

    def sampler_state(self) -> dict[str, torch.Tensor]:
        """State beside the model's that a resumed run needs."""
        return {}

    def load_sampler_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `sampler_state` gave."""

    # Where the run is.

    @property
    def global_step(self) -> int:
        """Optimiser steps done since the model was new."""
        return self.step + self.resume_step

    @property
    def samples(self) -> int:
        """Images that the model has been trained on, repeated ones counted each time."""
        return self.resume_samples + self.step * self.global_batch

    @property
    def master_params(self) -> list[torch.Tensor]:
        return self.mp_trainer.master_params

    @property
    def ema_names(self) -> list[float | str]:
        """What the files of `ema_params` are called by."""
        return [*self.ema_rate, *(f"power{width}" for width in self.power_ema)]

    @property
    def averaged_params(self) -> list[torch.Tensor]:
        """The first EMA's values; the master parameters themselves where there are no EMAs."""
        return self.ema_params[0] if self.ema_params else self.master_params

    @property
    def model_params(self) -> list[nn.Parameter]:
        return self.mp_trainer.model_params

    def save(self) -> None:
        """Write a checkpoint set; only when its last file, the model's, is there does it count."""
        rng = dist_util.gather_objects(random_state() if self.seed is None else None)
        if self.shard or self.rank == 0:  # of split tensors all processes bring their parts
            keep, to_state_dict = self.rank == 0, self.mp_trainer.master_params_to_state_dict
            model = to_state_dict(self.master_params, keep)
            emas = {
                name: to_state_dict(params, keep)
                for name, params in zip(self.ema_names, self.ema_params, strict=True)
            }
            opt = for_saving(self.opt.state_dict(), keep)
        if self.rank == 0:
            files = CheckpointSet(Path(self._folder()), self.global_step)
            logger.log(f"saving step {self.global_step}")
            state = {
                "step": self.global_step,
                "samples": self.samples,
                "lg_loss_scale": self.mp_trainer.lg_loss_scale,
                "sampler": self.sampler_state(),
                "random": rng,
            }
            files.write(model=model, emas=emas, opt=opt, state=state, sidecar=self.sidecar)
            if self.keep_checkpoints:
                prune_sets(files.folder, self.keep_checkpoints, files.step)
        # Nobody goes on, or ends, before the files are there.
        dist_util.any_rank(False)

    @contextlib.contextmanager
    def _averaged_weights(self):
        """`averaged_params` in the model, in evaluation mode, for the length of a block."""
        before = [p.detach().clone() for p in self.model_params]
        training = self.model.training
        self._set_weights(self.averaged_params)
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
            self._set_weights(before)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        for param, value in zip(self.model_params, values, strict=True):
            param.copy_(value)  # one by one: split tensors have no _foreach_copy_
        if self.shard:
            forget_gathered(self.model)

    def _folder(self) -> str:
        folder = logger.get_dir()
        if folder is None:
            raise UserError("call logger.configure() first: checkpoints go to its folder")
        return folder

    # Start and resume.

    def _start(self, fp16_scale_growth: float, initial_lg_loss_scale: float) -> None:
        """Make all that training changes, with the values of the checkpoint if there is one."""
        self._resume_set = self._find_resume_set()
        self._load_weights()
        if self.shard:
            shard(self.model, self.device)
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model,
            use_fp16=self.precision == "float16",
            fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=initial_lg_loss_scale,
        )
        self.opt = torch.optim.AdamW(
            self.master_params, lr=self.lr, weight_decay=self.weight_decay, fused=True
        )
        self.ema_params = [self._load_ema(name) for name in self.ema_names]
        self._load_optimizer()
        self._load_state()
        self.ddp_model = self._distribute()

    def _find_resume_set(self) -> CheckpointSet | None:
        """The set to resume from; rank 0 looks, for all."""
        found = dist_util.on_rank_zero(self._look_for_set)
        self.resume_step = found.step if found else 0
        return found

    def _look_for_set(self) -> CheckpointSet | None:
        found = find_set(self.resume_checkpoint, logger.get_dir())
        if found is None and self.resume_checkpoint == "auto":
            logger.log(
                f"--resume_checkpoint auto: no checkpoint in {self._folder()}, starting anew"
            )
        if found and (folder := set_aside(Path(self._folder()), beyond=found.step)):
            logger.warn(f"averages of later steps than {found.step} are in {folder} now")
        return found

    def _load_weights(self) -> None:
        path = self._resume_set.model if self._resume_set else self.resume_checkpoint
        if path and path != "auto":
            logger.log(f"loading the model from {path}")
            dist_util.on_rank_zero(
                lambda: load_weights(self.model, path, flag="--resume_checkpoint")
            )
        dist_util.sync_params([*self.model.parameters(), *self.model.buffers()])

    def _load_ema(self, name: float | str) -> list[torch.Tensor]:
        """The average of this name from the set, or a copy of the parameters."""
        params = [p.detach().clone() for p in self.master_params]
        if self._resume_set and self._is_there(path := self._resume_set.ema(name)):
            state = network_state(self._read(path), path, flag="--resume_checkpoint")
            check_fit(self.model, state, path, flag="--resume_checkpoint")
            values = self.mp_trainer.state_dict_to_master_params(state)
            for target, value in zip(params, values, strict=True):
                target.copy_(split_like(value, target))
        elif self._resume_set and str(name).startswith("power"):
            raise UserError(
                f"--power_ema: there is no {path}, and an average of this kind cannot begin in the "
                "middle of a run: leave its width out"
            )
        elif self._resume_set:
            logger.warn(f"no {path}: this average starts from the model's weights")
        return params

    def _load_optimizer(self) -> None:
        if self._resume_set is None:
            return
        if not self._is_there(self._resume_set.opt):
            logger.warn(f"no {self._resume_set.opt}: the optimiser starts anew")
            return
        names = (name for name, _ in self.model.named_parameters())
        params = dict(zip(names, self.master_params, strict=True))
        state = fit_optimizer_state(self._read(self._resume_set.opt), params, self._resume_set.opt)
        for index, moments in state["state"].items():
            for name in MOMENTS:
                moments[name] = split_like(moments[name], self.master_params[index])
        self.opt.load_state_dict(state)
        for param, moments in self.opt.state.items():
            # The fused kernel wants the count of steps where the parameter is, and walks moments
            # and parameter as they lie in memory.
            moments["step"] = moments["step"].to(param.device)
            for name in MOMENTS:
                moments[name] = torch.empty_like(param).copy_(moments[name])
        for group in self.opt.param_groups:  # what the user asks for now goes before what was saved
            group.update(lr=self.lr, weight_decay=self.weight_decay, fused=True, foreach=None)

    def _load_state(self) -> None:
        if self._resume_set is None:
            return
        self.resume_samples = self.resume_step * self.global_batch
        if not self._is_there(self._resume_set.state):
            return
        state = self._read(self._resume_set.state)
        self.mp_trainer.lg_loss_scale = state["lg_loss_scale"]
        if "samples" in state and state["samples"] != self.resume_samples:
            self.resume_samples = state["samples"]
            logger.warn(
                f"--batch_size: the {self.resume_step} steps so far had other batches than"
                f" {self.global_batch} images; the data go on after {self.samples} images"
            )
        try:
            self.load_sampler_state(state["sampler"])
        except ValueError as error:
            logger.warn(f"--schedule_sampler: {error}: this one starts anew")
        if self.seed is None and len(state["random"]) == self.world_size:
            restore_random_state(state["random"][self.rank])

    def _is_there(self, path: str) -> bool:
        return dist_util.on_rank_zero(lambda: exists(path))

    def _read(self, path: str) -> Any:
        return dist_util.load_state_dict(path, flag="--resume_checkpoint")

    def _distribute(self) -> nn.Module:
        if self.world_size == 1 or self.shard:
            return self.model
        return nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
