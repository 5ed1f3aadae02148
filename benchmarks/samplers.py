"""Samplers at few network evaluations, on a shipped preset, by Fréchet distance.

    python benchmarks/samplers.py [--dataset emoji32] [--rows ROW ROW …] [--seeds 0 1 2]
        [--num_samples 500] [--results FILE.json] [--figure PNG]

A row is SAMPLER:K[:OPTION,…]. Options: tN (T', 500 by default), clip (off by default), logsnr or
karras, posterior (DDPM's variance), etaX, gX (the factor of classifier guidance); for solvers also
fractions (T' is divided without rounding to whole timesteps) and dynamic (Imagen's thresholding,
arXiv 2205.11487, section 2.3, at 99.5 %), and noise (from pure noise, with clipping). The sampler
"respaced" is DDPM in the chain of the published options --chain_length 2K --reverse_steps K, with
clipping; "start" are the start images themselves.

All rows start from the same images with the same noise, so two rows of a seed are a pair. Finished
pairs of row and seed stay in --results: a run that was stopped goes on, and one with other rows or
seeds adds to the table. Prints a Markdown table: mean over the seeds, lowest to highest, the 95 %
interval of the mean (Student's), the difference from the first row on the same seeds, and CPU
seconds a seed. --figure draws the first images as each row makes them with the first seed.
"""

import argparse
import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from esddpm_io.errors import UserError, run_main
from esddpm_io.help import CommandLine
from esddpm_io.images import image_grid, open_images, save_png
from evaluations.features import choose_engine, load_graph, pool_features
from evaluations.metrics import Gaussian, frechet_distance, gaussian_of, precision_recall
from guided_diffusion.commands.request import Request, resolve_run
from guided_diffusion.pixels import to_float, to_uint8
from guided_diffusion.rng import RandomStreams
from guided_diffusion.sampling.sampler import load_network
from guided_diffusion.sampling.trial import Trial
from guided_diffusion.settings.presets import load_preset
from guided_diffusion.settings.record import SAMPLERS, diffusion_from
from guided_diffusion.solvers import make_solver

T_PRIME, BATCH = 500, 50
FIGURE_COLUMNS, FIGURE_ZOOM = 16, 2
ROWS = (
    *("respaced:25", "dpmpp_2m_sde:4", "dpmpp_2m_sde:5", "dpmpp_2m_sde:8", "dpmpp_2m_sde:16"),
    *("dpmpp_2m_sde:4:clip", "dpmpp_2m_sde:8:clip"),
    *("ddpm:8", "ddpm:8:posterior", "ddim:8", "dpmpp_2m:8"),
    *("dpmpp_2m_sde:8:logsnr", "dpmpp_2m_sde:8:karras"),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row's text says."""

    sampler: str
    steps: int
    t_prime: int
    noise: bool
    clip: bool
    spacing: str
    variance: str
    eta: float | None
    guidance: float
    fractions: bool
    dynamic: bool

    @classmethod
    def of(cls, text: str) -> "Row":
        sampler, _, rest = text.partition(":")
        steps, _, names = rest.partition(":")
        options = set(filter(None, names.split(",")))
        numbers = {
            match[1]: float(match[2])
            for match in (re.fullmatch(r"(t|eta|g)(\d+\.?\d*)", option) for option in options)
            if match
        }
        plain = {o for o in options if not re.fullmatch(r"(t|eta|g)\d+\.?\d*", o)}
        known = {"clip", "logsnr", "karras", "posterior", "fractions", "dynamic", "noise"}
        if (
            sampler not in ("start", "respaced", *SAMPLERS)
            or not steps.isdecimal()
            or plain - known
        ):
            raise UserError(
                f"--rows {text}: a row is SAMPLER:K[:OPTION,…] with samplers start, respaced, "
                f"{', '.join(SAMPLERS)} and options tN, etaX, gX, {', '.join(sorted(known))}"
            )
        return cls(
            sampler=sampler,
            steps=int(steps),
            t_prime=int(numbers.get("t", T_PRIME)),
            noise="noise" in plain,
            clip=bool({"clip", "noise"} & plain) or sampler == "respaced",
            spacing=next((name for name in ("logsnr", "karras") if name in plain), "uniform"),
            variance="posterior" if "posterior" in plain else "learned",
            eta=numbers.get("eta"),
            guidance=numbers.get("g", 0.0),
            fractions="fractions" in plain,
            dynamic="dynamic" in plain,
        )


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--dataset", default="emoji32")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SAMPLER:K[:OPTION,…]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/solvers.json"))
    parser.add_argument("--figure", type=Path, help="PNG of the first images in all rows")
    args = parser.parse_args(argv)
    rows = {text: Row.of(text) for text in args.rows}
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.dataset, args.num_samples)
    for seed in args.seeds:
        for text, row in rows.items():
            key = key_of(args, text, seed)
            if key not in results:
                results[key] = bench.measure(row, seed)
                args.results.write_text(json.dumps(results, indent=1))
                print(key, results[key], flush=True)
    print_table(args, rows, results)
    if args.figure:
        few = Bench(args.dataset, FIGURE_COLUMNS)
        batches = [few.sample(row, args.seeds[0]) for row in rows.values()]
        grid = image_grid(np.concatenate(batches), FIGURE_COLUMNS)
        save_png(args.figure, grid.repeat(FIGURE_ZOOM, axis=0).repeat(FIGURE_ZOOM, axis=1))


def key_of(args: argparse.Namespace, row: str, seed: int) -> str:
    return f"{args.dataset} {row} seed {seed} of {args.num_samples}"


class Bench:
    """The start images of a preset, and the reference that samples are compared with."""

    def __init__(self, dataset: str, count: int):
        self._preset, self._count = load_preset(dataset), count
        source = open_images(self._preset.generator_images, flag="--dataset")
        self.starts = source.read(0, count)
        self._labels = source.labels(0, count)
        self._graph = load_graph(self._preset.feature_graph)
        self._engine = choose_engine(self._graph, "torch")
        reference = open_images(self._preset.reference_batch, flag="--dataset")
        with np.load(self._preset.reference_batch) as batch:
            self._reference = Gaussian(batch["mu"], batch["sigma"])
        self._points = pool_features(self._engine, reference.read(0, len(reference)))

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        started = time.process_time()
        images = self.sample(row, seed)
        seconds = time.process_time() - started
        features = pool_features(self._engine, images)
        precision, recall = precision_recall(self._points, features, 3)
        given = (features @ self._graph.softmax_weights).argmax(axis=1)
        return {
            "frechet": frechet_distance(self._reference, gaussian_of(features)),
            "precision": float(np.mean(precision)),
            "recall": float(np.mean(recall)),
            "seconds": seconds,
            # Share of images that the feature network gives the label of their start image.
            "labels": float(np.mean(given == self._labels)),
        }

    def sample(self, row: Row, seed: int) -> np.ndarray:
        """What a row makes of the start images, uint8 [n, H, W, 3]."""
        if row.sampler == "start":
            return self.starts
        with tempfile.TemporaryDirectory() as scratch:
            resolved = resolve_run(self._request(row, seed), scratch)
        if row.fractions or row.dynamic:
            return self._by_hand(resolved.run, row, seed)
        trial = Trial(resolved.run, resolved.source, self._count, device="cpu", batch_size=BATCH)
        return trial.sample(resolved.run.sampler, f"{row.sampler}, {row.steps} evaluations")

    def _request(self, row: Row, seed: int) -> Request:
        named = {"sampler": row.sampler, "spacing": row.spacing}
        named["t_prime"] = None if row.noise else row.t_prime
        respaced = row.sampler == "respaced"
        return Request(
            kind="model",
            model_path=self._preset.checkpoint,
            typed={},
            respacing=str(1000 * row.steps // row.t_prime) if respaced else "",
            steps=row.steps,
            **({} if respaced else named),
            eta=row.eta,
            clip_denoised=row.clip,
            variance=row.variance,
            seed=seed,
            images=self._preset.generator_images,
            limit=self._count,
            num_samples=self._count,
            classifier_path=self._preset.classifier or "",
            classifier_scale=row.guidance,
            preset=self._preset,
        )

    @torch.inference_mode()
    def _by_hand(self, run, row: Row, seed: int) -> np.ndarray:
        """What the engine does not offer, for a network without labels.

        Times that are not rounded: T' i / K - 1, at levels between those of whole timesteps.
        """
        model = load_network(run.network, torch.device("cpu"), flag="--dataset")
        times = np.array(run.sampler.timesteps, float)
        if row.fractions:
            times = row.t_prime * np.arange(row.steps, 0, -1) / row.steps - 1
        whole = np.log(diffusion_from(run.process, "").alphas_cumprod)
        levels = np.exp(np.interp(times, np.arange(len(whole)), whole))
        parts = []
        for start in range(0, self._count, BATCH):
            clean = to_float(self.starts[start : start + BATCH])
            randn = RandomStreams(seed, start, start + len(clean)).randn
            solver = make_solver(row.sampler, levels, row.eta)
            x = levels[0] ** 0.5 * clean + (1 - levels[0]) ** 0.5 * randn(clean)
            for time_, level in zip(times, levels, strict=True):
                eps = model(x, torch.full((len(x),), time_))[:, :3]
                x_start = (x - (1 - level) ** 0.5 * eps) / level**0.5
                if row.clip:
                    x_start = x_start.clamp(-1, 1)
                if row.dynamic:
                    largest = x_start.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)
                    largest = largest.view(-1, 1, 1, 1)
                    x_start = x_start.clamp(-largest, largest) / largest
                x = solver(x, x_start, randn(x))
            parts.append(to_uint8(x))
        return np.concatenate(parts)


def print_table(args: argparse.Namespace, rows: dict[str, Row], results: dict) -> None:
    def values(text: str, name: str) -> np.ndarray:
        return np.array([results[key_of(args, text, seed)][name] for seed in args.seeds])

    first = values(args.rows[0], "frechet")
    names = ["sampler", "evaluations", "Fréchet distance", "95 % interval", "difference"]
    names += ["precision", "recall", "labels", "seconds"]
    print(f"\n{args.dataset}, {args.num_samples} images, seeds {args.seeds}, T' = {T_PRIME}\n")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for text, row in rows.items():
        distance = values(text, "frechet")
        changes = 100 * (distance / first - 1)
        options = text.split(":")[2:]
        cells = [
            ", ".join([row.sampler, *options]),
            str(row.steps),
            f"{distance.mean():.2f} ({distance.min():.2f}–{distance.max():.2f})",
            interval(distance),
            f"{changes.mean():+.0f} % ({changes.min():+.0f} … {changes.max():+.0f})",
            *(f"{values(text, name).mean():.3f}" for name in ("precision", "recall", "labels")),
            f"{values(text, 'seconds').mean():.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def interval(distances: np.ndarray) -> str:
    """Of the mean over seeds, by Student's distribution."""
    count = len(distances)
    if count < 2:
        return ""
    half = stdtrit(count - 1, 0.975) * distances.std(ddof=1) / count**0.5
    return f"{distances.mean() - half:.2f} … {distances.mean() + half:.2f}"


if __name__ == "__main__":
    run_main(main)
