"""Ways to find T' from data, against a fine sweep: how much worse is the T' that each proposes?

    python benchmarks/t_prime_proposals.py [--dataset emoji32] [--steps 5] [--seeds 0 1 2]
        [--priors vae blur1 …] [--num_samples 400] [--results FOLDER]

Every prior is carried to each T' of GRID and back with `dpmpp_2m_sde`, without clipping, with the
same noise; features of the samples stay in --results, so a run that was stopped goes on. Priors
made of real images take drawings of odd numbers, the reference is the drawings of even numbers.
(The network was trained on all of them: there is no other one.)

A way is judged on the mean curve of the seeds that it has not seen: the loss is how far, in
percent, the distance at its proposal is above the lowest of the curve. Ways: the measured search of
`guided_diffusion.proposal`; the ratio of the network's losses on start and real images; Jeffreys
divergence of Gaussians in PCA coordinates of diffused images; the best T' for all priors.
"""

import argparse
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from esddpm_io.errors import run_main
from esddpm_io.help import CommandLine
from esddpm_io.images import open_images
from evaluations.features import choose_engine, load_graph, pool_features
from evaluations.metrics import frechet_distance, gaussian_of
from guided_diffusion.checkpoints import load_weights, read_sidecar
from guided_diffusion.commands.request import Request, ResolvedRun, at_t_prime, resolve_run
from guided_diffusion.pixels import to_float, to_uint8
from guided_diffusion.proposal import propose
from guided_diffusion.rng import RandomStreams
from guided_diffusion.sampling.sampler import load_network
from guided_diffusion.sampling.trial import Trial
from guided_diffusion.settings.presets import SCRIPTS_FOLDER, load_preset
from guided_diffusion.settings.record import diffusion_from
from guided_diffusion.vae import create_vae

GRID = (100, 200, 300, 350, 400, 450, 500, 550, 600, 700, 800)
LOSS_TIMES = tuple(range(99, 900, 100))
# Thresholds of the ways that run no reverse chain, as they were found in trials on other curves.
LOSS_RATIO, DIVERGENCE = 1.0, 10.0
PCA_DIMENSIONS = 64
PRIORS = ("vae", "weak_vae", "blur0.5", "blur1", "blur2", "blocks", "jpeg", "real")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--dataset", default="emoji32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--num_samples", type=int, default=300)
    parser.add_argument("--grid", type=int, nargs="+", default=GRID)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/t_prime"))
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    study = Study(args)
    for seed in args.seeds:
        for prior in args.priors:
            for t_prime in (0, *args.grid):
                study.features(prior, seed, t_prime)
            print(f"seed {seed}: {prior} is there", flush=True)
    print_curves(study, args)
    print_losses(study, args)


class Study:
    """The preset's network and features, the priors, and all samples' features so far."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._preset = args, load_preset(args.dataset)
        self._engine = choose_engine(load_graph(self._preset.feature_graph), "torch")
        batch = open_images(self._preset.reference_batch, flag="--dataset")
        images, labels = batch.read(0, len(batch)), batch.labels(0, len(batch))
        order = np.random.default_rng(0).permutation(len(images))
        odd, even = order[order % 2 == 1], order[order % 2 == 0]
        self.real = images[odd[: args.num_samples]], labels[odd[: args.num_samples]]
        self.others = images[even[: args.num_samples]], labels[even[: args.num_samples]]
        self._reference = gaussian_of(pool_features(self._engine, images[even]))
        self._resolved: dict[tuple[str, int], ResolvedRun] = {}
        self._distances: dict[tuple[str, int, int], float] = {}

    def distance(self, features: np.ndarray) -> float:
        return frechet_distance(self._reference, gaussian_of(features))

    def distance_at(self, prior: str, seed: int, t_prime: int) -> float:
        """Of the samples from T'; each is computed once."""
        key = (prior, seed, t_prime)
        if key not in self._distances:
            self._distances[key] = self.distance(self.features(*key))
        return self._distances[key]

    def features(self, prior: str, seed: int, t_prime: int) -> np.ndarray:
        """Features of the samples from T', float32 [n, D], computed if they are not there."""
        args = self._args
        which = 0 if t_prime == 0 else args.steps
        name = f"{args.dataset}_{prior}_{args.num_samples}_seed{seed}_t{t_prime}_{which}.npy"
        path = args.results / name
        if path.exists():
            return np.load(path)
        resolved = self.resolved(prior, seed)
        trial = Trial(resolved.run, resolved.source, args.num_samples, device="cpu")
        if t_prime == 0:
            images = trial.start_images()[0]
        else:
            images = trial.sample(at_t_prime(resolved.run, t_prime, args.steps), name)
        found = pool_features(self._engine, images)
        np.save(path, found)
        return found

    def resolved(self, prior: str, seed: int) -> ResolvedRun:
        key = (prior, seed)
        if key not in self._resolved:
            path = self._args.results / f"{self._args.dataset}_{prior}_{self._args.num_samples}.npz"
            if not path.exists():
                images, labels = self.images(prior)
                np.savez(path, arr_0=images, arr_1=labels)
            request = Request(
                kind="model",
                model_path=self._preset.checkpoint,
                typed={},
                respacing="",
                steps=self._args.steps,
                sampler="dpmpp_2m_sde",
                t_prime=max(self._args.grid),
                clip_denoised=False,
                seed=seed,
                images=str(path),
                preset=self._preset,
            )
            self._resolved[key] = resolve_run(request, str(self._args.results))
        return self._resolved[key]

    def images(self, prior: str) -> tuple[np.ndarray, np.ndarray]:
        """Start images of a prior and their labels."""
        count = self._args.num_samples
        if prior == "vae":
            source = open_images(self._preset.generator_images, flag="--dataset")
            return source.read(0, count), source.labels(0, count)
        if prior == "weak_vae":
            return weak_vae(self.real[1])
        images, labels = self.real
        return np.stack([spoil(image, prior) for image in images]), labels


def weak_vae(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The VAE with codes from N(0, 1) in place of its fitted prior."""
    path = str(SCRIPTS_FOLDER / "models" / "emoji32_vae.pt")
    vae = create_vae(**read_sidecar(path)["flags"])
    load_weights(vae, path, flag="--priors")
    codes = torch.from_numpy(
        np.random.default_rng(1).standard_normal((len(labels), vae.latent_dim), np.float32)
    )
    with torch.inference_mode():
        return to_uint8(vae.eval().decode(codes, torch.from_numpy(labels))), labels


def spoil(image: np.ndarray, prior: str) -> np.ndarray:
    """A real image, uint8 [H, W, 3], as a bad generator might give it."""
    picture = Image.fromarray(image)
    if prior.startswith("blur"):
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(float(prior[4:]))))
    if prior == "blocks":
        small = image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        return small.repeat(2, axis=0).repeat(2, axis=1)
    if prior == "jpeg":
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=10)
        return np.asarray(Image.open(file))
    return image


# --- ways that run no reverse chain ---


def by_loss_ratio(study: Study, prior: str, seed: int) -> float:
    """T' where the network's noise-prediction loss on start images falls to that on real ones."""
    resolved = study.resolved(prior, seed)
    run = resolved.run
    model = load_network(run.network, torch.device("cpu"), flag="--model_path", log=lambda _: None)
    diffusion = diffusion_from(run.process, "")
    ratios = []
    for time in LOSS_TIMES:
        losses = [
            _loss(model, diffusion, *images, time, seed, bool(run.network.flags["class_cond"]))
            for images in (study.images(prior), study.others)
        ]
        ratios.append(losses[0] / losses[1])
    return _first_crossing(np.array(LOSS_TIMES) + 1, np.array(ratios), LOSS_RATIO)


@torch.inference_mode()
def _loss(model, diffusion, images, labels, time, seed, conditional) -> float:
    total = 0.0
    for start in range(0, len(images), 50):
        clean = to_float(images[start : start + 50])
        noise = RandomStreams(seed, start, start + len(clean)).randn(clean)
        t = torch.full((len(clean),), time)
        x = diffusion.q_sample(clean, t, noise)
        y = {"y": torch.from_numpy(labels[start : start + 50])} if conditional else {}
        total += float(((model(x, t, **y)[:, :3] - noise) ** 2).mean(dim=(1, 2, 3)).sum())
    return total / len(images)


def by_divergence(study: Study, prior: str, seed: int) -> float:
    """T' where Gaussians of diffused start and real images come as near as DIVERGENCE.

    Jeffreys divergence, in the leading principal components of real images; needs no network.
    """
    levels = diffusion_from(study.resolved(prior, seed).run.process, "").alphas_cumprod
    ours, real = (
        to_float(images).reshape(len(images), -1).double().numpy()
        for images in (study.images(prior)[0], study.others[0])
    )
    axes = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)[2][:PCA_DIMENSIONS]
    gaussians = [
        ((x @ axes.T).mean(axis=0), np.cov(x @ axes.T, rowvar=False)) for x in (ours, real)
    ]
    times = np.arange(9, 1000, 10)
    values = [_jeffreys(gaussians, levels[time]) for time in times]
    return _first_crossing(times + 1, np.array(values), DIVERGENCE)


def _jeffreys(gaussians, level: float) -> float:
    """KL(p || q) + KL(q || p) after both were diffused to this alphas_cumprod."""
    (mean_p, p), (mean_q, q) = (
        (level**0.5 * mean, level * cov + (1 - level) * np.eye(len(mean)))
        for mean, cov in gaussians
    )
    gap = mean_p - mean_q
    inverse_p, inverse_q = np.linalg.inv(p), np.linalg.inv(q)
    traces = np.trace(inverse_q @ p) + np.trace(inverse_p @ q) - 2 * len(gap)
    return 0.5 * float(traces + gap @ (inverse_p + inverse_q) @ gap)


def _first_crossing(times: np.ndarray, values: np.ndarray, threshold: float) -> float:
    """The first time at which values have fallen to the threshold, between points linearly."""
    below = np.flatnonzero(values <= threshold)
    if not len(below):
        return float(times[-1])
    i = int(below[0])
    if i == 0:
        return float(times[0])
    share = (values[i - 1] - threshold) / (values[i - 1] - values[i])
    return float(times[i - 1] + share * (times[i] - times[i - 1]))


# --- tables ---


@dataclasses.dataclass(frozen=True)
class Curve:
    """Mean distance over seeds at each T' of the grid, and at 0."""

    times: np.ndarray
    distances: np.ndarray

    @classmethod
    def of(cls, study: Study, prior: str, seeds: list[int], grid: list[int]) -> "Curve":
        times = np.array([0, *grid])
        table = [[study.distance_at(prior, s, t) for t in times] for s in seeds]
        return cls(times, np.mean(table, axis=0))

    def loss(self, t_prime: float) -> float:
        """Percent above the lowest point, between points of the grid linearly."""
        return 100 * (np.interp(t_prime, self.times, self.distances) / self.distances.min() - 1)


def print_curves(study: Study, args: argparse.Namespace) -> None:
    print(
        f"\n{args.dataset}: Fréchet distance, mean of seeds {args.seeds}, {args.steps} "
        f"evaluations, {args.num_samples} images\n"
    )
    print(f"| prior | T' = 0 | {' | '.join(map(str, args.grid))} |")
    print("|---" * (len(args.grid) + 2) + "|")
    for prior in args.priors:
        curve = Curve.of(study, prior, args.seeds, args.grid)
        print(f"| {prior} | {' | '.join(f'{d:.2f}' for d in curve.distances)} |")


def print_losses(study: Study, args: argparse.Namespace) -> None:
    """Each way's proposals, and their losses on the seeds that it has not seen."""

    def search(prior: str, seed: int) -> float:
        def there(t_prime: int) -> np.ndarray:
            return study.features(prior, seed, t_prime)

        return float(propose(there, study.distance).t_prime)

    ways: dict[str, Callable[[str, int], float]] = {
        "search": search,
        "loss ratio": functools.partial(by_loss_ratio, study),
        "divergence": functools.partial(by_divergence, study),
    }
    proposals: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in (*ways, "best constant")}
    for prior in args.priors:
        for name, way in ways.items():
            found = [way(prior, seed) for seed in args.seeds]
            proposals[name][prior] = found
            losses[name][prior] = [
                unseen_curve(study, args, prior, seed).loss(t_prime)
                for seed, t_prime in zip(args.seeds, found, strict=True)
            ]
    constant = best_constant(study, args)
    losses["best constant"] = {
        prior: [unseen_curve(study, args, prior, seed).loss(constant) for seed in args.seeds]
        for prior in args.priors
    }
    proposals["best constant"] = {prior: [constant] for prior in args.priors}
    print("\nProposed T' (lowest–highest over seeds), loss in % (mean; largest)\n")
    print(f"| prior | {' | '.join(losses)} |\n{'|---' * (len(losses) + 1)}|")
    for prior in args.priors:
        cells = []
        for name, found in losses.items():
            at = proposals[name][prior]
            cells.append(
                f"{min(at):.0f}–{max(at):.0f}: {np.mean(found[prior]):.1f}; {max(found[prior]):.1f}"
            )
        print(f"| {prior} | {' | '.join(cells)} |")
    all_losses = {
        name: [x for one in table.values() for x in one] for name, table in losses.items()
    }
    print(f"| median | {' | '.join(f'{np.median(x):.1f}' for x in all_losses.values())} |")
    print(f"| worst | {' | '.join(f'{max(x):.1f}' for x in all_losses.values())} |")


def unseen_curve(study: Study, args: argparse.Namespace, prior: str, seed: int) -> Curve:
    """The curve of all seeds but this one; of this one if there is no other."""
    others = [other for other in args.seeds if other != seed] or [seed]
    return Curve.of(study, prior, others, args.grid)


def best_constant(study: Study, args: argparse.Namespace) -> float:
    """The T' of the grid whose mean loss over all priors is smallest.

    Chosen with all curves in sight: better than any constant that one could have known.
    """
    curves = [Curve.of(study, prior, args.seeds, args.grid) for prior in args.priors]
    return float(min(args.grid, key=lambda t: np.mean([curve.loss(t) for curve in curves])))


if __name__ == "__main__":
    run_main(main)
