"""What training on t < T' only saves: compute to equal quality, on emoji32.

    OMP_NUM_THREADS=1 python benchmarks/early_stop_training.py [--seeds 0 1 2]
        [--t_primes 100 200 400] [--variants 200:min-snr …] [--evaluations 5] [--results FOLDER]

Small networks are trained from scratch with the same first weights, data and noise: one of a seed
on all timesteps, one for each T' on t < T', and what --variants names. At log-spaced steps the
averaged weights carry the same VAE images to T' and back with the same noise (`dpmpp_2m_sde`).
Prints what compute each network needs to reach the distance that the one of all timesteps has at
its last step, as a share of that one's, and draws the curves. All networks and distances stay in
--results: a run that was stopped goes on, and more seeds or variants add to it.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError, run_main
from esddpm_io.help import CommandLine
from esddpm_io.images import open_images
from evaluations.features import choose_engine, load_graph, pool_features
from evaluations.metrics import frechet_distance, gaussian_of
from guided_diffusion import early_stop, load_network, logger
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.settings.presets import SCRIPTS_FOLDER, load_preset
from guided_diffusion.solvers import evaluation_timesteps
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.vae_sampling import load_vae

FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1,2,2",
    "num_head_channels": 32,
    "attention_resolutions": "4",
    "noise_schedule": "cosine",
    "use_scale_shift_norm": True,
}
BATCH_SIZE, LEARNING_RATE = 8, 2e-3
# An average over a tenth of the steps so far, so that a network of few steps is judged as fairly as
# one of many.
WIDTH = "0.1"
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, arXiv 2303.09556
SMALLER = {"channel_mult": "1,1"}  # a quarter of the weights
RECONSTRUCTED_FROM = 0.5  # share of T' from which "reconstructed" meets the VAE's images
CONTINUED_FROM = 0.5  # share of the steps after which "continue" leaves all timesteps


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train: T' (0: all timesteps), and names of VARIANTS with + ("": uniform in t)."""

    t_prime: int
    variant: str = ""

    @property
    def name(self) -> str:
        timesteps = f"t < {self.t_prime}" if self.t_prime else "all t"
        return f"{timesteps}, {self.variant}" if self.variant else timesteps

    @property
    def variants(self) -> set[str]:
        return set(filter(None, self.variant.split("+")))

    @property
    def folder(self) -> str:
        return f"stop{self.t_prime}_{self.variant}" if self.variant else f"stop{self.t_prime}"


class FixedDensity(ScheduleSampler):
    """Timesteps below len(density) in proportion to `density`, all losses alike."""

    def __init__(self, density: np.ndarray):
        self.num_timesteps = len(density)
        self._density = density

    def weights(self) -> np.ndarray:
        return self._density

    def sample(self, batch_size, device, uniforms=None):
        t, _ = super().sample(batch_size, device, uniforms)
        return t, torch.ones(batch_size)


def uniform(levels: np.ndarray, evaluations: int) -> FixedDensity:
    return FixedDensity(np.ones(len(levels)))


def rising(levels: np.ndarray, evaluations: int) -> FixedDensity:
    """Density in proportion to t: more of the timesteps where start images are not yet mended."""
    return FixedDensity(np.arange(1.0, len(levels) + 1))


def evaluated(levels: np.ndarray, evaluations: int) -> FixedDensity:
    """Only the timesteps that the sampler will ask for."""
    density = np.zeros(len(levels))
    density[evaluation_timesteps(levels, len(levels), evaluations)] = 1
    return FixedDensity(density)


DENSITIES = {"rising": rising, "evaluated": evaluated}
VARIANTS = ("continue", "smaller", "reconstructed", "min-snr", *DENSITIES)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    torch.set_num_threads(1)
    study = Study(args)
    for seed in args.seeds:
        for arm in study.arms:
            study.measure(arm, seed)
            print(f"seed {seed}: {arm.name} is there", flush=True)
    print_table(study)
    draw_curves(study, args.results / "curves.png")


class Study:
    """The networks and distances of all arms and seeds."""

    def __init__(self, args: argparse.Namespace):
        self.args, self._preset = args, load_preset("emoji32")
        self.arms = [Arm(0), *map(Arm, args.t_primes), *map(variant_arm, args.variants)]
        self.snapshots = log_spaced(args.iterations, args.snapshots)

    def t_primes_of(self, arm: Arm) -> list[int]:
        """The T' at which an arm is measured: its own, for "all t" those of all arms."""
        return [arm.t_prime] if arm.t_prime else sorted({a.t_prime for a in self.arms} - {0})

    def curve(self, arm: Arm, t_prime: int, evaluations: int) -> np.ndarray:
        """Distances, [seeds, snapshots]."""
        keys = [f"{step}/{t_prime}/{evaluations}" for step in self.snapshots]
        found = [self._read(arm, seed)["distances"] for seed in self.args.seeds]
        return np.array([[one.get(key, math.nan) for key in keys] for one in found])

    def seconds_per_step(self, arm: Arm) -> float:
        """Median of all networks of an arm's size."""
        alike = [one for one in self.arms if flags_of(one) == flags_of(arm)]
        every = [self._read(one, seed)["seconds"] for one in alike for seed in self.args.seeds]
        return float(np.median(np.concatenate(every)))

    def measure(self, arm: Arm, seed: int) -> None:
        """Train and score what is not there."""
        result = self._read(arm, seed)
        folder = self.args.results / f"{arm.folder}_seed{seed}"
        for step in self.snapshots_of(arm):
            wanted = {
                f"{step}/{t_prime}/{evaluations}": (t_prime, evaluations)
                for t_prime in self.t_primes_of(arm)
                for evaluations in self.args.evaluations
            }
            missing = {key: how for key, how in wanted.items() if key not in result["distances"]}
            if not missing:
                continue
            network = folder / f"ema_power{WIDTH}_{step:06d}.pt"
            if not network.exists():
                result["seconds"] += self._train(arm, seed, folder, step)
            for key, how in missing.items():
                result["distances"][key] = self._distance(network, *how, seed)
                print(f"seed {seed}, {arm.name}: {key}: {result['distances'][key]:.3f}", flush=True)
                with atomic_path(self._path(arm, seed)) as path:
                    path.write_text(json.dumps(result))

    def snapshots_of(self, arm: Arm) -> list[int]:
        if "continue" not in arm.variants:
            return self.snapshots
        return [step for step in self.snapshots if step > self._leaving]

    @property
    def _leaving(self) -> int:
        """The snapshot at which "continue" leaves all timesteps."""
        wanted = CONTINUED_FROM * self.args.iterations
        return min(self.snapshots, key=lambda step: abs(step - wanted))

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.args.results / f"{arm.folder}_seed{seed}.json"

    def _read(self, arm: Arm, seed: int) -> dict:
        args, path = self.args, self._path(arm, seed)
        settings = {"iterations": args.iterations, "snapshots": args.snapshots}
        settings |= {"num_samples": args.num_samples}
        if "evaluated" in arm.variants:
            settings["evaluations"] = args.evaluations[0]
        if not path.exists():
            return {"settings": settings, "distances": {}, "seconds": []}
        found = json.loads(path.read_text())
        if found["settings"] != settings:
            raise UserError(f"--results: {path} is of {found['settings']}, not {settings}")
        return found

    def _train(self, arm: Arm, seed: int, folder: Path, step: int) -> list[float]:
        """Go on to `step`; returns seconds of the processor, a mean a step."""
        logger.configure(dir=str(folder), format_strs=["csv"])
        torch.manual_seed(seed)
        flags = model_and_diffusion_defaults() | flags_of(arm)
        model, diffusion = create_model_and_diffusion(**flags)
        reconstructed = "reconstructed" in arm.variants
        if reconstructed:
            meet_reconstructions(diffusion, arm.t_prime)
        levels = diffusion.alphas_cumprod[: arm.t_prime or None]
        start = "auto"
        if "continue" in arm.variants and not any(folder.glob("model*.pt")):
            full = self.args.results / f"{Arm(0).folder}_seed{seed}"
            start = str(full / f"model{self._leaving:06d}.pt")
        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=load_data(
                data_dir=self._preset.reference_batch,
                batch_size=BATCH_SIZE,
                image_size=FLAGS["image_size"],
                random_flip=False,
                class_cond=reconstructed,
                num_workers=0,
                seed=seed,
            ),
            batch_size=BATCH_SIZE,
            microbatch=-1,
            lr=LEARNING_RATE,
            ema_rate="",
            power_ema=WIDTH,
            log_interval=50,
            save_interval=step,
            resume_checkpoint=start,
            schedule_sampler=density_of(arm)(levels, self.args.evaluations[0]),
            snr_gamma=MIN_SNR_GAMMA if "min-snr" in arm.variants else 0.0,
            iterations=step,
            seed=seed,
            sidecar={
                "flags": flags,
                "early_stop_steps": arm.t_prime or None,
            },
        )
        before, steps = time.process_time(), step - loop.global_step
        loop.run_loop()
        return [(time.process_time() - before) / steps]

    def _distance(self, network: Path, t_prime: int, evaluations: int, seed: int) -> float:
        samples = early_stop(
            load_network(str(network), device="cpu"),
            self._start_images,
            t_prime=t_prime,
            steps=evaluations,
            sampler="dpmpp_2m_sde",
            seed=seed,
            batch_size=50,
        )
        return self.distance_of(samples)

    def distance_of(self, images: np.ndarray) -> float:
        features = pool_features(self._engine, images)
        return float(frechet_distance(self._reference, gaussian_of(features)))

    def generator_distance(self) -> float:
        return self.distance_of(self._start_images)

    @functools.cached_property
    def _engine(self):
        return choose_engine(load_graph(self._preset.feature_graph), "torch")

    @functools.cached_property
    def _reference(self):
        batch = open_images(self._preset.reference_batch, flag="--results")
        return gaussian_of(pool_features(self._engine, batch.read(0, len(batch))))

    @functools.cached_property
    def _start_images(self) -> np.ndarray:
        source = open_images(self._preset.generator_images, flag="--num_samples")
        images = source.read(0, len(source))
        return images[np.linspace(0, len(images) - 1, self.args.num_samples).astype(int)]


def flags_of(arm: Arm) -> dict:
    return FLAGS | (SMALLER if "smaller" in arm.variants else {})


def density_of(arm: Arm) -> Callable[[np.ndarray, int], FixedDensity]:
    return next((DENSITIES[name] for name in DENSITIES if name in arm.variants), uniform)


def meet_reconstructions(diffusion: GaussianDiffusion, t_prime: int) -> None:
    """Let every second image reach x_t from its reconstruction by the VAE, near T'.

    As sampling does, which starts from the VAE's images; the target stays the real image. That is
    its q_sample with other noise: sqrt(ᾱ) x̂ + sqrt(1-ᾱ) ε is sqrt(ᾱ) x + sqrt(1-ᾱ) ε' for
    ε' = ε + sqrt(ᾱ/(1-ᾱ)) (x̂ - x).
    """
    vae = load_vae(str(SCRIPTS_FOLDER / "models" / "emoji32_vae.pt"))
    losses = diffusion.training_losses
    ratio = np.sqrt(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))

    def training_losses(model, x_start, t, model_kwargs, noise):
        with torch.no_grad():
            labels = model_kwargs["y"]
            shift = vae.decode(vae.encode(x_start, labels)[0], labels).clamp(-1, 1) - x_start
        met = (t >= RECONSTRUCTED_FROM * t_prime) & (torch.arange(len(t)) % 2 == 0)
        scale = torch.from_numpy(ratio).float()[t] * met
        return losses(model, x_start, t, {}, noise + scale.view(-1, 1, 1, 1) * shift)

    diffusion.training_losses = training_losses


def log_spaced(last: int, count: int) -> list[int]:
    """`count` steps up to `last`, the first a quarter of it."""
    return [round(last * 4 ** (i / (count - 1) - 1)) for i in range(count)]


def variant_arm(text: str) -> Arm:
    """`T':NAME` or `T':NAME+NAME`."""
    t_prime, _, names = text.partition(":")
    arm = Arm(int(t_prime) if t_prime.isdigit() else -1, names)
    if arm.t_prime < 0 or not arm.variants or not arm.variants.issubset(VARIANTS):
        raise UserError(f'--variants "{text}": T\':NAME+NAME of {", ".join(VARIANTS)}')
    return arm


# --- what the curves say ---


def steps_to(distance: float, steps: list[int], curve: np.ndarray) -> float:
    """Steps after which a curve has fallen to `distance`, in log(steps) linearly; else infinity."""
    best = np.minimum.accumulate(np.nan_to_num(curve, nan=math.inf))
    reached = np.flatnonzero(best <= distance)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0 or not math.isfinite(best[i - 1]):  # where the curve begins
        return float(steps[i])
    share = (best[i - 1] - distance) / (best[i - 1] - best[i])
    return float(np.exp(np.log(steps[i - 1]) * (1 - share) + np.log(steps[i]) * share))


def share_of_compute(study: Study, arm: Arm, t_prime: int, evaluations: int) -> np.ndarray:
    """Compute of an arm to the last distance of "all t", as a share of all of that, [seeds]."""
    full, own = (study.curve(one, t_prime, evaluations) for one in (Arm(0), arm))
    pairs = zip(full[:, -1], own, strict=True)
    reached = [steps_to(distance, study.snapshots, curve) for distance, curve in pairs]
    cost = study.seconds_per_step(arm) / study.seconds_per_step(Arm(0))
    return np.array(reached) / study.args.iterations * cost


def interval(values: np.ndarray) -> str:
    """Geometric mean of ratios over seeds with its 95 % interval (Student's t of logarithms)."""
    if not np.isfinite(values).all():
        return f"not reached by {np.sum(~np.isfinite(values))} of {len(values)}"
    logs = np.log(values)
    text = f"{np.exp(logs.mean()):.2f}"
    if len(logs) == 1:
        return text
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return f"{text} ({np.exp(logs.mean() - half):.2f}–{np.exp(logs.mean() + half):.2f})"


def print_table(study: Study) -> None:
    args = study.args
    seconds = study.seconds_per_step(Arm(0))
    print(
        f"\n{args.iterations} steps of {BATCH_SIZE} images, {seconds:.2f} s of a core each; seeds"
        f" {args.seeds}; {args.num_samples} images; distance of the VAE's images"
        f" {study.generator_distance():.2f}\n"
    )
    print("| T' | evaluations | trained on | distance at the end | less than all t | compute |")
    print("|---|---|---|---|---|---|")
    for arm in study.arms:
        for t_prime in study.t_primes_of(arm):
            for evaluations in args.evaluations:
                own, full = (study.curve(a, t_prime, evaluations)[:, -1] for a in (arm, Arm(0)))
                if np.isnan(own).any():
                    continue
                share = interval(share_of_compute(study, arm, t_prime, evaluations))
                print(
                    f"| {t_prime} | {evaluations} | {arm.name} | {spread(own)} |"
                    f" {spread(full - own)} | {share if arm != Arm(0) else 1} |"
                )


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1) if len(values) > 1 else 0:.2f}"


def draw_curves(study: Study, path: Path) -> None:
    """Mean and spread over seeds: a column of panels for each T', a row for each --evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, times = study.args.evaluations, study.t_primes_of(Arm(0))
    size = (4 * len(times), 3.2 * len(rows))
    figure, axes = plt.subplots(len(rows), len(times), figsize=size, squeeze=False)
    for axis, (evaluations, t_prime) in zip(axes.flat, product(rows, times), strict=True):
        for arm in study.arms:
            if arm.t_prime not in (0, t_prime):
                continue
            curve = study.curve(arm, t_prime, evaluations)
            mean, low, high = curve.mean(axis=0), curve.min(axis=0), curve.max(axis=0)
            (line,) = axis.plot(study.snapshots, mean, marker=".", label=arm.name)
            axis.fill_between(study.snapshots, low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(study.generator_distance(), color="gray", ls=":", label="the VAE's images")
        axis.set(xscale="log", xlabel="steps", title=f"T' = {t_prime}, {evaluations} evaluations")
        axis.set_xticks(study.snapshots, map(str, study.snapshots))
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        axis.legend(fontsize=7, loc="upper right")
    for axis in axes[:, 0]:
        axis.set_ylabel("Fréchet distance (emoji32 features)")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"\n{path}")


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--t_primes", type=int, nargs="*", default=[100, 200, 400])
    parser.add_argument("--variants", nargs="+", default=[], help="T':NAME+NAME, as 200:min-snr")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5])
    parser.add_argument("--iterations", type=int, default=800, help="optimiser steps of each")
    parser.add_argument("--snapshots", type=int, default=5, help="networks scored of each run")
    parser.add_argument("--num_samples", type=int, default=300)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/early_stop"))
    return parser


if __name__ == "__main__":
    run_main(main)
