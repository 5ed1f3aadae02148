"""The training loop: one for all models.

`Trainer` trains any module with any loss:

    def loss(model, batch, cond, draw):
        # batch: NCHW float in [-1, 1] on the device; cond: dict of tensors [N], {"y": labels} …
        # draw.noise(like) is N(0, 1) like `like`, draw.uniforms(n) n numbers in [0, 1):
        # take random numbers from there, then runs repeat whatever the number of processes.
        # Call `model(...)` itself, not its submodules: gradients are synchronised in its forward.
        return {"loss": per_example_losses, "kl": another_figure_to_log}   # each [N]

    trainer = Trainer(model=model, loss=loss, data=load_data(...), batch_size=64, lr=2e-4,
                      ema_rate="0.999", iterations=20000, save_interval=1000, seed=0,
                      resume_checkpoint="auto", sidecar={"kind": "vae", "flags": {...}})
    trainer.run_loop()

Two keys of the loss's dict are special: "t" (timesteps [N], figures are then also logged by quarter
of `num_timesteps`) and "weight" (importance weights [N] of the losses). `model` is moved to
`dist_util.dev()`. Files go to `logger.get_dir()`: modelNNNNNN.pt, ema_RATE_NNNNNN.pt,
optNNNNNN.pt and stateNNNNNN.pt, where NNNNNN is the number of steps done, and the curves of
progress.csv to progress.png at each save.

`diffusion.TrainLoop` is this loop with the diffusion loss, under guided-diffusion's keyword names.
"""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from esddpm_io.errors import UserError
from esddpm_io.progress import Progress, quiet

from .. import dist_util, logger
from ..compiling import Compiled
from ..fp16_util import INITIAL_LOG_LOSS_SCALE
from ..nn import update_ema
from ..power_ema import gamma_of, kept_share, widths
from ..rng import Draws
from .progress_plot import draw_progress
from .state import RunState

PRECISIONS = ("float32", "bfloat16", "float16")
# A single bad batch is survivable; three in a row mean that the run has diverged.
MAX_NON_FINITE_STEPS = 3

Loss = Callable[[nn.Module, torch.Tensor, dict, Draws], dict[str, torch.Tensor]]


class StopSignals:
    """Notes SIGTERM and SIGINT while it is entered, so that a step is never cut in two.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.name = ""

    def __enter__(self) -> "StopSignals":
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Trainer(RunState):
    """AdamW on a per-example loss, with EMAs, microbatches, checkpoints, resume and figures.

    Args:
        model: the module; its parameters are trained.
        data: iterator of (batch NCHW float in [-1, 1] [N, …], dict of tensors [N]). If it has a
            method `seek(step)`, a resumed run calls it, so that the data go on where they were;
            `seek(step, samples=n)` after n images in all, where batches had another size.
        batch_size: N, of this process; the global batch is N × number of processes.
        loss: see the top of this file.
        microbatch: rows that go through the model at once (-1: all); gradients are those of the
            whole batch.
        lr, weight_decay: of AdamW. lr_anneal_steps: lr falls linearly to 0 at this step, where
            training ends (0: constant).
        lr_warmup: lr rises linearly from 1 / lr_warmup of itself in this many steps (0: at once).
        grad_clip: a gradient whose norm is larger is scaled down to it (0: never).
        iterations: steps in all, resumed ones included (0: lr_anneal_steps; both 0: no end).
        ema_rate: one rate, or a comma list of rates ("": no averages).
        power_ema: a comma list of widths of power-function averages, saved as
            ema_powerWIDTH_NNNNNN.pt beside the others (see `power_ema`; "": none).
        log_interval, save_interval: in steps.
        resume_checkpoint: a modelNNNNNN.pt with its siblings beside it, "auto" for the newest
            complete set in the log folder (none: start anew), any other checkpoint for its weights.
        use_fp16: float16 torso with dynamic loss scale (the model needs `convert_to_fp16`).
        precision: "float32", "bfloat16" (autocast) or "float16"; "" follows use_fp16.
        keep_checkpoints: after a save remove all but the newest K sets up to it (0: keep all).
        seed: see `Draws`; None leaves all random numbers to the global generators.
        channels_last: keep images and weights in NHWC memory; faster on GPUs in half precision.
        compile: torch.compile the model. A shorter last microbatch is filled up, see `Compiled`.
        shard: split parameters, gradients, averages and moments over the processes (FSDP2); the
            files are those of a run that does not. Not with float16 or `compile`.
        sidecar: keyword arguments of `checkpoints.write_sidecar` (flags, kind, early_stop_steps)
            for the JSON beside model and EMA files.
        num_timesteps: T (or T') of "t", for the figures by quarter.
        sample_interval, draw_samples: every that many steps `draw_samples(model)`, with the first
            EMA's weights (its own without EMAs) in the model, returns a uint8 [H, W, 3] image for
            samplesNNNNNN.png.

    Raises UserError for a checkpoint that cannot be read or does not fit, and after three
    non-finite losses in a row; ValueError for impossible arguments.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        data: Iterator[tuple[torch.Tensor, dict]],
        batch_size: int,
        loss: Loss | None = None,
        microbatch: int = -1,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        lr_warmup: int = 0,
        grad_clip: float = 0.0,
        iterations: int = 0,
        ema_rate: float | str = "0.9999",
        power_ema: str = "",
        log_interval: int = 10,
        save_interval: int = 10000,
        resume_checkpoint: str = "",
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        precision: str = "",
        keep_checkpoints: int = 0,
        seed: int | None = None,
        channels_last: bool = False,
        compile: bool = False,
        shard: bool = False,
        sidecar: dict | None = None,
        num_timesteps: int | None = None,
        sample_interval: int = 0,
        draw_samples: Callable[[nn.Module], np.ndarray] | None = None,
    ):
        dist_util.setup_dist()
        self.rank, self.world_size = dist_util.rank(), dist_util.world_size()
        self.device = dist_util.dev()
        self.data = data
        self.batch_size = batch_size
        self.global_batch = batch_size * self.world_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay = lr, weight_decay
        self.lr_anneal_steps, self.lr_warmup = lr_anneal_steps, lr_warmup
        self.grad_clip = grad_clip
        self.iterations = iterations or lr_anneal_steps
        self._ends_at = "--iterations" if iterations else "--lr_anneal_steps"
        self.ema_rate = parse_rates(ema_rate)
        self.power_ema = widths(power_ema)
        self.log_interval, self.save_interval = log_interval, save_interval
        self.resume_checkpoint = resume_checkpoint
        self.precision = _checked_precision(precision, use_fp16)
        self.shard = shard and self.world_size > 1
        if shard and not self.shard:
            logger.warn("--shard: there is one process, which keeps the network whole")
        if shard and (compile or self.precision == "float16"):
            raise ValueError("shard goes with float32 and bfloat16, and without compile")
        self.keep_checkpoints = keep_checkpoints
        self.seed = seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.sidecar = sidecar
        self.num_timesteps = num_timesteps
        self.sample_interval, self.draw_samples = sample_interval, draw_samples
        self._loss = loss
        self._non_finite_steps = 0
        self._last_loss = math.nan

        self.model = model.to(self.device, memory_format=self.memory_format)
        self._start(fp16_scale_growth, initial_lg_loss_scale)
        self._distributed = self.ddp_model
        if compile:
            rows = min(self.microbatch, batch_size)
            self.ddp_model = Compiled(self._distributed, rows, self.memory_format)

    # What a subclass may define.

    figure_prefix = ""  # of the names of logged figures

    def seek_data(self, step: int) -> None:
        """Called by `run_loop` of a resumed run: the data go on with this step's."""
        if not hasattr(self.data, "seek"):
            return
        if self.samples == step * self.global_batch:
            self.data.seek(step)
        else:
            self.data.seek(step, samples=self.samples)

    def end_data_workers(self) -> None:
        """Called at the end of `run_loop`, however it ends."""
        if hasattr(self.data, "end_workers"):
            self.data.end_workers()

    def after_step(self) -> None:
        """Called by `run_loop` after each step, before figures are written."""

    def compute_losses(
        self, batch: torch.Tensor, cond: dict[str, torch.Tensor], draw: Draws
    ) -> dict[str, torch.Tensor]:
        """Losses of a microbatch as `loss` returns them, through `self.ddp_model`."""
        return self._loss(self.ddp_model, batch, cond, draw)

    def update_sampler(self, terms: dict[str, torch.Tensor]) -> None:
        """Called once a step with the losses of this process's whole batch, [N] on the device."""

    # The loop.

    def run_loop(self) -> None:
        """Train to the last step, or until SIGTERM or SIGINT, and save."""
        try:
            self._run_loop()
        finally:
            self.end_data_workers()

    def _run_loop(self) -> None:
        if self.resume_step:
            self.seek_data(self.global_step)
        first, total = self.global_step, self.iterations
        self._say_what_is_left()
        images = max(total - first, 0) * self.global_batch if total else None
        saved_at = first if self.resume_step else None
        with StopSignals() as stop, self._progress(images) as progress:
            while not total or self.global_step < total:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                self.step += 1
                self.after_step()
                progress.update(self.global_batch, note=f"loss {self._last_loss:.4g}")
                if self.global_step % self.log_interval == 0:
                    self._dump_figures()
                if self.draw_samples and self.global_step % self.sample_interval == 0:
                    self.save_samples()
                (stopping,) = dist_util.any_rank(bool(stop.name))
                if stopping or self.global_step % self.save_interval == 0:
                    self._save_and_draw()
                    saved_at = self.global_step
                    if os.environ.get("DIFFUSION_TRAINING_TEST"):
                        return
                if stopping:
                    logger.log(
                        f"stopped by {stop.name or 'a signal to another process'} after step"
                        f" {self.global_step}; --resume_checkpoint auto goes on from here"
                    )
                    return
            if saved_at != self.global_step:
                self._save_and_draw()

    def _save_and_draw(self) -> None:
        """A checkpoint set, and progress.png where there is a progress.csv."""
        self.save()
        if self.rank == 0:
            folder = Path(self._folder())
            try:
                draw_progress(folder / "progress.csv", folder / "progress.png")
            except (ImportError, OSError, ValueError) as error:  # no training ends over it
                logger.warn(f"progress.png is not drawn: {error}")

    def _say_what_is_left(self) -> None:
        """Tell of steps that are none: those done before, those at a learning rate of 0."""
        if 0 < self.iterations <= self.global_step:
            logger.warn(
                f"{self._ends_at} {self.iterations}: {self.global_step} steps are done already,"
                " nothing is left to do"
            )
        elif 0 < self.lr_anneal_steps < self.iterations:
            logger.warn(
                f"--iterations {self.iterations}: lr is 0 after --lr_anneal_steps"
                f" {self.lr_anneal_steps}, steps beyond it only move the averages"
            )

    def run_step(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> bool:
        """One optimiser step on a batch; does not count `step` up. Returns whether it was taken."""
        losses = self.forward_backward(batch, cond)
        grad_norm, figures = self._to_host(self.mp_trainer.gather_gradients(), losses)
        if self._any_non_finite(figures, grad_norm):
            taken = False
            self.mp_trainer.zero_grad()
            if self.precision == "float16":
                self.mp_trainer.apply(self.opt, math.nan)
        else:
            self._set_lr()
            if 0 < self.grad_clip < grad_norm:
                self.mp_trainer.scale_gradients(self.grad_clip / grad_norm)
            taken = self.mp_trainer.apply(self.opt, grad_norm)
        if taken:
            logger.logkv_mean("grad_norm", grad_norm)
            self._update_ema()
        self._last_loss = float((figures["loss"] * figures.get("weight", 1.0)).mean())
        self._log_losses(figures, self.figure_prefix)
        self.log_step()
        return taken

    def forward_backward(
        self, batch: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Add the batch's gradients; returns its loss terms [N], detached, on the device."""
        self.mp_trainer.zero_grad()
        if self.seed is not None:
            self._seed_global_generators()
        parts = []
        for rows, *inputs in self._microbatches(batch, cond):
            with self._no_sync(rows.stop < len(batch)):
                with self._autocast():
                    terms = self.compute_losses(*inputs)
                weighted = terms["loss"] * terms["weight"] if "weight" in terms else terms["loss"]
                self.mp_trainer.backward(weighted.sum() / len(batch))
            parts.append({name: value.detach() for name, value in terms.items()})
        terms = _concatenated(parts)
        self.update_sampler(terms)
        return terms

    @torch.no_grad()
    def evaluate(self, batch: torch.Tensor, cond: dict[str, torch.Tensor], prefix: str) -> None:
        """Log the figures of a batch under names that start with `prefix`; nothing is learned."""
        self.model.eval()
        with self._autocast():
            parts = [
                self.compute_losses(*inputs)
                for _, *inputs in self._microbatches(batch, cond, purpose=1)
            ]
        self.model.train()
        terms = _concatenated(parts)
        self._log_losses({name: value.cpu().numpy() for name, value in terms.items()}, prefix)

    def log_step(self) -> None:
        """Figures that say how far the run is."""
        logger.logkv("step", self.global_step + 1)
        logger.logkv("samples", self.samples + self.global_batch)
        if self.precision == "float16":
            logger.logkv("lg_loss_scale", self.mp_trainer.lg_loss_scale)

    def save_samples(self) -> None:
        """Draw `draw_samples` with the averaged weights into samplesNNNNNN.png."""
        if self.rank == 0 or self.shard:  # a split network runs on all processes or on none
            from esddpm_io.images import save_png

            # Named, for without a name the generators of all GPUs of the machine are saved.
            devices = [self.device] if self.device.type == "cuda" else []
            with self._averaged_weights(), torch.random.fork_rng(devices):
                image = self.draw_samples(self.model)
            if self.rank == 0:
                save_png(Path(self._folder()) / f"samples{self.global_step:06d}.png", image)

    # Inside a step.

    def _microbatches(
        self, batch: torch.Tensor, cond: dict[str, torch.Tensor], purpose: int = 0
    ) -> Iterator[tuple[slice, torch.Tensor, dict[str, torch.Tensor], Draws]]:
        """Rows, and what `compute_losses` takes for them, on the device."""
        for start in range(0, len(batch), self.microbatch):
            rows = slice(start, start + self.microbatch)
            micro = batch[rows].to(self.device, memory_format=self.memory_format, non_blocking=True)
            micro_cond = {k: v[rows].to(self.device, non_blocking=True) for k, v in cond.items()}
            first_row = self.rank * self.batch_size + start
            yield (
                rows,
                micro,
                micro_cond,
                Draws(self.seed, self.global_step, self.global_batch, first_row, purpose),
            )

    def _autocast(self):
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _no_sync(self, hold: bool):
        """Synchronise gradients with the other processes in the last microbatch only."""
        if self.shard:
            self.model.set_requires_gradient_sync(not hold)
            return contextlib.nullcontext()
        return (
            self._distributed.no_sync()
            if hold and self.world_size > 1
            else contextlib.nullcontext()
        )

    def _seed_global_generators(self) -> None:
        """Dropout and the like repeat in a resumed run; every process has masks of its own."""
        key = [self.seed, self.global_step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

    def _to_host(
        self, grad_norm: torch.Tensor, losses: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """One copy from the device a step: everything that decisions and figures need."""
        packed = [grad_norm.reshape(1), *losses.values()]
        values = torch.cat([part.double() for part in packed]).cpu().numpy()
        columns = values[1:].reshape(len(losses), -1)
        return float(values[0]), dict(zip(losses, columns, strict=True))

    def _any_non_finite(self, figures: dict[str, np.ndarray], grad_norm: float) -> bool:
        """Report losses that are not finite; UserError at the third time in a row.

        In float16 infinite gradients of finite losses are the loss scale's affair.
        """
        bad = ~np.isfinite(figures["loss"])
        here = bool(bad.any()) or (self.precision != "float16" and not math.isfinite(grad_norm))
        (anywhere,) = dist_util.any_rank(here)
        if not anywhere:
            self._non_finite_steps = 0
            return False
        self._non_finite_steps += 1
        step = self.global_step + 1
        if here:
            where = ""
            if "t" in figures:
                steps = figures["t"][bad] if bad.any() else figures["t"]
                where = f" at timesteps {sorted(steps.astype(int).tolist())}"
            what = "loss" if bad.any() else "gradient"
            logger.warn(f"step {step}: the {what} is not finite{where}; no update")
        logger.logkv_mean("non_finite", 1.0)
        if self._non_finite_steps >= MAX_NON_FINITE_STEPS:
            raise UserError(
                f"the loss was not finite in {MAX_NON_FINITE_STEPS} steps in a row, up to step"
                f" {step}: lower --lr, or resume from an earlier checkpoint"
            )
        return True

    def _set_lr(self) -> None:
        """Set lr; guided-diffusion lowers it after a step, so that the first two have the same."""
        if not self.lr_anneal_steps and not self.lr_warmup:
            return
        lr = self.lr
        if self.lr_anneal_steps:
            lr *= max(0.0, 1 - max(self.global_step - 1, 0) / self.lr_anneal_steps)
        if self.global_step < self.lr_warmup:
            lr *= (self.global_step + 1) / self.lr_warmup
        for group in self.opt.param_groups:
            group["lr"] = lr

    def _update_ema(self) -> None:
        step = self.global_step + 1
        powers = [kept_share(step, gamma_of(width)) for width in self.power_ema]
        for rate, params in zip([*self.ema_rate, *powers], self.ema_params, strict=True):
            update_ema(params, self.master_params, rate=rate)

    def _log_losses(self, figures: dict[str, np.ndarray], prefix: str) -> None:
        weights = figures.get("weight", 1.0)
        terms = {k: v * weights for k, v in figures.items() if k not in ("t", "weight")}
        log_terms(terms, figures.get("t"), self.num_timesteps, prefix)

    # Between steps.

    def _progress(self, images: int | None) -> Progress:
        with quiet() if self.rank else contextlib.nullcontext():
            return Progress(images, "images", "training")

    def _dump_figures(self) -> None:
        logger.logkv("param_norm", self.mp_trainer.param_norm())
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        for name, value in getattr(self.data, "figures", dict)().items():
            logger.logkv(name, value)
        logger.dumpkvs()


def log_terms(
    terms: dict[str, np.ndarray], t: np.ndarray | None, num_timesteps: int | None, prefix: str = ""
) -> None:
    for name, values in terms.items():
        logger.logkv_mean(prefix + name, float(values.mean()))
    if t is None or not num_timesteps:
        return
    quarters = (4 * t / num_timesteps).astype(int)
    for quarter, *values in zip(quarters, *terms.values(), strict=True):
        for name, value in zip(terms, values, strict=True):
            logger.logkv_mean(f"{prefix}{name}_q{quarter}", float(value))


def _concatenated(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def parse_rates(ema_rate: float | str) -> list[float]:
    """The rates of a comma list; ValueError, naming ema_rate, unless all are in [0, 1]."""
    try:
        rates = [float(rate) for rate in str(ema_rate).split(",") if rate]
    except ValueError:
        rates = [math.nan]
    if not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f'ema_rate must be a comma list of numbers in [0, 1], not "{ema_rate}"')
    return rates


def _checked_precision(precision: str, use_fp16: bool) -> str:
    precision = precision or ("float16" if use_fp16 else "float32")
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {", ".join(PRECISIONS)}, not "{precision}"')
    return precision
