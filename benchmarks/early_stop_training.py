"""Does it help to train on t < T' only? Two networks of emoji32, equal steps, one early-stopped.

    python benchmarks/early_stop_training.py [--iterations 2000] [--early_stop_steps 500]

Trains both with image_train.py (a second run goes on where the first stopped), lets both carry the
same VAE images to T' and back, scores them in one call of the evaluator, and prints a Markdown
table. Everything goes to --work_dir.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from esddpm_io.errors import UserError, run_main
from esddpm_io.images import open_images
from esddpm_io.npz import NpzWriter
from guided_diffusion.settings.presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "scripts" / "generate_processes_diffusion_and_reverse.py"
EVALUATOR = ROOT / "evaluations" / "evaluator.py"
TRAIN = ROOT / "scripts" / "image_train.py"


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    steps = args.chain_length * args.early_stop_steps // 1000
    if not 1 <= steps <= args.chain_length:
        raise UserError(
            f"--early_stop_steps {args.early_stop_steps} leaves {steps} steps of the chain of"
            f" {args.chain_length}: it must be in {-(-1000 // args.chain_length)} … 1000"
        )
    preset = load_preset("emoji32")
    source = args.dataset_path or preset.generator_images
    images = first_images(source, args.num_samples, args.work_dir / "vae.npz")
    batches, rows = [images], ["the VAE's images"]
    for name, stop in (("all t", 0), (f"t < {args.early_stop_steps}", args.early_stop_steps)):
        folder = args.work_dir / f"stop{stop}_steps{args.iterations}"
        network = train(preset, folder / "training", args, stop)
        flags = ["--chain_length", str(args.chain_length), "--reverse_steps", str(steps)]
        flags += ["--dataset_path", str(images), "--model_path", str(network)]
        batches.append(sample(flags, args.devices, folder / "samples"))
        rows.append(f"ES-DDPM, trained on {name}")
    results = score(preset, batches, args.work_dir / "metrics.json")
    print(
        f"{args.iterations} steps of {args.batch_size} images each, T' = {args.early_stop_steps},"
        f" {steps} sampling steps, {args.num_samples} images, seed {args.seed}\n"
    )
    print("| images of | Fréchet distance (emoji32 features) | precision | recall |")
    print("|---|---|---|---|")
    for row, metrics in zip(rows, results, strict=True):
        print(
            f"| {row} | {metrics['frechet_distance']:.2f} | {metrics['precision']:.3f} |"
            f" {metrics['recall']:.3f} |"
        )


def train(preset, folder: Path, args: argparse.Namespace, early_stop_steps: int) -> Path:
    """Train to the last step; returns the file of the averaged weights."""
    network = folder / f"ema_{args.ema_rate}_{args.iterations:06d}.pt"
    options = {
        "data_dir": preset.reference_batch,
        **preset.model_flags,
        **preset.diffusion_flags,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "lr_anneal_steps": args.iterations,
        "ema_rate": args.ema_rate,
        "random_flip": False,
        "early_stop_steps": early_stop_steps,
        "log_interval": 50,
        "save_interval": 200,
        "keep_checkpoints": 2,
        "resume_checkpoint": "auto",
        "seed": args.seed,
    }
    os.environ["OPENAI_LOGDIR"] = str(folder)
    words = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    run([sys.executable, str(TRAIN), *words])
    return network


def first_images(path: str, count: int, subset: Path) -> Path:
    """The first `count` images of a batch as an npz of their own."""
    source = open_images(path, flag="--dataset_path")
    if count > len(source):
        raise UserError(f"--num_samples must be at most {len(source)}, the images of {path}")
    subset.parent.mkdir(parents=True, exist_ok=True)
    images = source.read(0, count)
    with NpzWriter(subset, {"arr_0": (images.shape, images.dtype)}) as writer:
        writer.append("arr_0", images)
    return subset


def sample(flags: list[str], devices: str, folder: Path) -> Path:
    """Run the driver into `folder`; returns its samples."""
    command = [sys.executable, str(DRIVER), "--dataset", "emoji32", "--devices", devices]
    command += ["--output_dir", str(folder), "--batch_size", "50", "--not_eval_metrics"]
    run([*command, "--execute", *flags])
    return folder / "samples_all.npz"


def score(preset, batches: list[Path], json_path: Path) -> list[dict]:
    """The metrics of every batch, from one call of the evaluator."""
    command = [sys.executable, str(EVALUATOR), preset.reference_batch, *map(str, batches)]
    command += ["--inception_path", preset.feature_graph, "--metric_name", preset.metric_name]
    run([*command, "--json", str(json_path)])
    return [result["metrics"] for result in json.loads(json_path.read_text())["results"]]


def run(command: list[str]) -> None:
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        sys.exit(code)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=2000, help="optimiser steps of each")
    parser.add_argument("--early_stop_steps", type=int, default=500, help="T'")
    parser.add_argument("--chain_length", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema_rate", type=float, default=0.998)
    parser.add_argument("--dataset_path", default="", help="start images (default: the preset's)")
    parser.add_argument("--num_samples", type=int, default=1000, help="images of every row")
    parser.add_argument("--devices", default="cpu,cpu", help="as in the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", default="benchmarks/results/early_stop_training", type=Path)
    return parser


if __name__ == "__main__":
    run_main(main)
