"""Samplers at few network evaluations, on emoji32 from T' = 500, by Fréchet distance.

    python benchmarks/emoji32_solvers.py [--rows ROW ROW …] [--seeds 0 1 2]
        [--num_samples 500] [--results FILE.json]

All rows start from the same images with the same noise, so two rows of a seed are a pair. Finished
pairs of row and seed stay in --results: a run that was stopped goes on, and one with other rows or
seeds adds to the table. Prints a Markdown table: mean over the seeds, lowest to highest, and the
difference from the first row of the table on the seeds that both have, with its spread.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from esddpm_io.errors import UserError, run_main
from esddpm_io.images import open_images
from evaluations.features import choose_engine, flatten_outputs, load_graph
from evaluations.metrics import Gaussian, frechet_distance, gaussian_of, precision_recall
from guided_diffusion.checkpoints import load_weights, read_sidecar
from guided_diffusion.pixels import to_uint8
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.rng import RandomStreams
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.presets import load_preset
from guided_diffusion.solvers import SOLVERS, evaluation_timesteps, make_solver

T_PRIME = 500
BATCH = 50
# sampler:evaluations[:option,…]; options are noclip, fractions, logsnr and karras.
# "respaced" is DDPM in the chain of the published options --chain_length 2K --reverse_steps K.
ROWS = (
    *("respaced:25", "dpmpp_2m_sde:4:noclip", "dpmpp_2m_sde:5:noclip", "dpmpp_2m_sde:8:noclip"),
    *("dpmpp_2m_sde:4", "dpmpp_2m_sde:5", "dpmpp_2m_sde:8"),
    # Of T' = 500, 4 and 5 evaluations are at whole timesteps anyway; 3 are not.
    *("dpmpp_2m_sde:3:noclip", "dpmpp_2m_sde:3:noclip,fractions"),
    *("ddpm:8", "ddim:8", "ddim1:8", "dpmpp_2m:8:noclip"),
    *("dpmpp_2m_sde:8:noclip,logsnr", "dpmpp_2m_sde:8:noclip,karras"),
)
SAMPLERS = ("respaced", "ddpm", "ddim", "ddim1", *SOLVERS)
OPTIONS = ("noclip", "fractions", "logsnr", "karras")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SAMPLER:K[:OPTION,…]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/solvers.json"))
    args = parser.parse_args(argv)
    for row in args.rows:
        parse_row(row)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.num_samples)
    for seed in args.seeds:
        for row in args.rows:
            key = f"{row} seed {seed} of {args.num_samples}"
            if key not in results:
                results[key] = bench.measure(row, seed)
                args.results.write_text(json.dumps(results, indent=1))
                print(key, results[key], flush=True)
    print_table(args, results)


def parse_row(row: str) -> tuple[str, int, set[str]]:
    """Sampler, evaluations and options of a row's text."""
    sampler, _, rest = row.partition(":")
    steps, _, options = rest.partition(":")
    chosen = set(filter(None, options.split(",")))
    if sampler not in SAMPLERS or not steps.isdecimal() or not chosen <= set(OPTIONS):
        raise UserError(
            f"--rows {row}: a row is SAMPLER:K[:OPTION,…] with samplers {', '.join(SAMPLERS)}"
            f" and options {', '.join(OPTIONS)}"
        )
    return sampler, int(steps), chosen


class Bench:
    """The network, the start images and the reference of the preset."""

    def __init__(self, count: int):
        preset = load_preset("emoji32")
        self.flags = read_sidecar(preset.checkpoint)["flags"]
        self.model, self.whole = create_model_and_diffusion(**self.flags)
        load_weights(self.model, preset.checkpoint, flag="--model_path")
        self.model.eval().requires_grad_(False)
        source = open_images(preset.generator_images, flag="--dataset_path")
        self.starts = source.read(0, count)
        reference = open_images(preset.reference_batch, flag="--reference_batch")
        with np.load(preset.reference_batch) as batch:
            self.reference = Gaussian(batch["mu"], batch["sigma"])
        self.engine = choose_engine(load_graph(preset.feature_graph), "torch")
        self.points = self.features(reference.read(0, len(reference)))

    def features(self, images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + 64] for i in range(0, len(images), 64)]
        return np.concatenate([flatten_outputs(*self.engine(part))[0] for part in parts])

    def measure(self, row: str, seed: int) -> dict[str, float]:
        started = time.process_time()
        batches = range(0, len(self.starts), BATCH)
        images = np.concatenate([self.sample(row, seed, start) for start in batches])
        seconds = time.process_time() - started
        features = self.features(images)
        precision, recall = precision_recall(self.points, features, 3)
        return {
            "frechet": frechet_distance(self.reference, gaussian_of(features)),
            "precision": float(np.mean(precision)),
            "recall": float(np.mean(recall)),
            "seconds": seconds,
        }

    @torch.inference_mode()
    def sample(self, row: str, seed: int, start: int) -> np.ndarray:
        sampler, steps, options = parse_row(row)
        clean = torch.from_numpy(self.starts[start : start + BATCH]).permute(0, 3, 1, 2)
        clean = clean.float() / 127.5 - 1
        randn = RandomStreams(seed, start, start + len(clean)).randn
        shared = {
            "noise": clean,
            "clip_denoised": "noclip" not in options,
            "device": "cpu",
            "randn": randn,
        }
        if "fractions" in options:
            return to_uint8(self.sample_at_fractions(clean, sampler, steps, options, randn))
        spacing = next((name for name in ("logsnr", "karras") if name in options), "uniform")
        if sampler in SOLVERS:
            run = self.whole.solver_sample_loop
            shared |= {"t_prime": T_PRIME, "steps": steps, "sampler": sampler, "spacing": spacing}
        else:
            process = self.respaced(sampler, steps, spacing)
            run = process.p_sample_loop
            if sampler.startswith("ddim"):
                run = process.ddim_sample_loop
                shared["eta"] = float(sampler == "ddim1")
            shared["denoise_steps"] = steps
        return to_uint8(run(self.model, tuple(clean.shape), **shared))

    def respaced(self, sampler: str, steps: int, spacing: str) -> SpacedDiffusion:
        if sampler == "respaced":
            times = sorted(space_timesteps(1000, str(1000 * steps // T_PRIME)))
        else:
            times = evaluation_timesteps(self.whole.alphas_cumprod, T_PRIME, steps, spacing)
        whole = self.whole
        return SpacedDiffusion(
            use_timesteps=times,
            betas=whole.original_betas,
            model_mean_type=whole.model_mean_type,
            model_var_type=whole.model_var_type,
            loss_type=whole.loss_type,
        )

    def sample_at_fractions(self, clean, sampler, steps, options, randn) -> torch.Tensor:
        """The solver at T' i / K - 1, not rounded; levels lie between those of whole timesteps."""
        times = T_PRIME * np.arange(steps, 0, -1) / steps - 1
        log_levels = np.log(self.whole.alphas_cumprod)
        levels = np.exp(np.interp(times, np.arange(len(log_levels)), log_levels))
        solver = make_solver(sampler, levels)
        x = levels[0] ** 0.5 * clean + (1 - levels[0]) ** 0.5 * randn(clean)
        for time_, level in zip(times, levels, strict=True):
            eps = self.model(x, torch.full((len(x),), time_))[:, :3]
            x_start = (x - (1 - level) ** 0.5 * eps) / level**0.5
            if "noclip" not in options:
                x_start = x_start.clamp(-1, 1)
            x = solver(x, x_start, randn(x))
        return x


def print_table(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    def values(row: str, name: str) -> dict[int, float]:
        keys = {seed: f"{row} seed {seed} of {args.num_samples}" for seed in args.seeds}
        return {seed: results[key][name] for seed, key in keys.items()}

    first = values(args.rows[0], "frechet")
    print(f"{args.num_samples} images, seeds {args.seeds}, T' = {T_PRIME}\n")
    print("| sampler | evaluations | Fréchet distance | difference | precision | recall |")
    print("|---|---|---|---|---|---|")
    for row in args.rows:
        sampler, steps, options = parse_row(row)
        distance = values(row, "frechet")
        spread = f"{min(distance.values()):.2f}–{max(distance.values()):.2f}"
        changes = [distance[seed] - first[seed] for seed in args.seeds]
        cells = [
            ", ".join([sampler, *sorted(options)]),
            str(steps),
            f"{np.mean(list(distance.values())):.2f} ({spread})",
            f"{np.mean(changes):+.2f} ({min(changes):+.2f} … {max(changes):+.2f})",
            f"{np.mean(list(values(row, 'precision').values())):.3f}",
            f"{np.mean(list(values(row, 'recall').values())):.3f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(main)
