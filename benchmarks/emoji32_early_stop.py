"""What early stop is worth, on emoji32: the generator alone, the plain DDPM, and the two together.

    python benchmarks/emoji32_early_stop.py [--num_samples 500] [--devices cpu,cpu]

Samples with the driver, one network for all rows, scores all batches in one call of the evaluator,
and prints a Markdown table; finished samples stay in --work_dir, so a second run only evaluates.
Draws the first images of the generator, and under each what early stop makes of it, to --figure.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from esddpm_io.errors import UserError, run_main
from esddpm_io.images import image_grid, open_images, save_png
from esddpm_io.npz import NpzWriter
from guided_diffusion.settings.presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "scripts" / "generate_processes_diffusion_and_reverse.py"
EVALUATOR = ROOT / "evaluations" / "evaluator.py"
FIGURE_COLUMNS, FIGURE_ROWS, FIGURE_ZOOM = 16, 2, 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_samples", type=int, default=500, help="images of every row")
    parser.add_argument("--devices", default="cpu,cpu", help="as in the driver")
    parser.add_argument("--steps", type=int, default=25, help="steps of the short chains")
    parser.add_argument("--chain_length", type=int, default=50, help="early stop's chain")
    parser.add_argument("--full_length", type=int, default=250, help="steps of the long chain")
    parser.add_argument("--work_dir", default="benchmarks/results/emoji32", type=Path)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    args = parser.parse_args(argv)
    preset = load_preset("emoji32")
    images = first_images(preset.generator_images, args.num_samples, args.work_dir / "vae.npz")

    scratch = ["--start_from_scratch", "--num_samples", str(args.num_samples)]
    stopped_at = 1000 * args.steps // args.chain_length
    short, full = str(args.steps), str(args.full_length)
    rows = {
        "VAE": (0, None),
        f"DDPM from noise, {full} steps": (full, ["--chain_length", full, *scratch]),
        f"DDPM from noise, {short} steps": (short, ["--chain_length", short, *scratch]),
        f"ES-DDPM, T' = {stopped_at}, {short} steps": (
            short,
            [
                *("--chain_length", str(args.chain_length), "--reverse_steps", short),
                *("--dataset_path", str(images)),
            ],
        ),
    }
    batches = [images]
    for number, (_, flags) in enumerate(rows.values()):
        if flags is not None:
            batches.append(sample(flags, args.devices, args.work_dir / f"row{number}"))
    if args.figure:
        save_png(args.figure, draw_pairs(batches[0], batches[-1]))
    print_table(rows, score(preset, batches, args.work_dir / "metrics.json"), args.num_samples)


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


def draw_pairs(above: Path, below: Path) -> np.ndarray:
    """The first images of two batches in rows of pairs, enlarged, uint8 [H, W, 3]."""
    count = FIGURE_COLUMNS * FIGURE_ROWS
    batches = [open_images(path, flag="--figure").read(0, count) for path in (above, below)]
    rows = np.stack([b.reshape(FIGURE_ROWS, FIGURE_COLUMNS, *b.shape[1:]) for b in batches], axis=1)
    grid = image_grid(rows.reshape(-1, *batches[0].shape[1:]), FIGURE_COLUMNS)
    return grid.repeat(FIGURE_ZOOM, axis=0).repeat(FIGURE_ZOOM, axis=1)


def print_table(rows: dict, results: list[dict], count: int) -> None:
    print(f"{count} images each; distances in emoji32 features, which are no FID\n")
    print("| images of | steps | Fréchet distance | spatial | precision | recall |")
    print("|---|---|---|---|---|---|")
    for (name, (steps, _)), metrics in zip(rows.items(), results, strict=True):
        figures = [
            f"{metrics['frechet_distance']:.2f}",
            f"{metrics['spatial_frechet_distance']:.2f}",
            f"{metrics['precision']:.3f}",
            f"{metrics['recall']:.3f}",
        ]
        print(f"| {name} | {steps} | {' | '.join(figures)} |")


if __name__ == "__main__":
    run_main(main)
