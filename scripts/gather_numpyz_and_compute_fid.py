"""Gather finished samples into samples_all.npz, draw samples_grid.png, evaluate into metrics.json.

--dir is a folder that sampling processes write to, finished or not yet, or one with the
samples_…_rank_R.npz files that they write with --save_numpy_array.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError, run_main
from esddpm_io.files import absolute, exists, join, read_json
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import SETTINGS_FILE, ChunkFolder
from guided_diffusion.sampling.progress import Overseer, Screen

EVALUATOR = Path(__file__).resolve().parents[1] / "evaluations" / "evaluator.py"
_POLL_S = 1.0


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", required=True, help="folder with the samples")
    add("--num_file", type=int, default=1, help="number of samples_…_rank_R.npz files to wait for")
    add("--wait_time", type=float, default=600.0, help="seconds without a sign of life to wait")
    add("--dataset", default="imagenet64", help="name of a preset, or path of a preset file")
    add("--ref_batch", help="reference batch instead of the preset's")
    add("--inception_path", help="feature graph instead of the preset's")
    add("--not_eval_metrics", action="store_true", help="only gather")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    folder = None
    if exists(join(args.dir, SETTINGS_FILE)):
        folder = ChunkFolder.load(args.dir)
        wait_for_chunks(folder, args.wait_time)
        parts = outputs.parts_of(folder, 0, folder.num_samples)
    else:
        parts = outputs.parts_of_files(wait_for_files(args.dir, args.num_file, args.wait_time))
    samples = join(args.dir, "samples_all.npz")
    outputs.join_parts(parts, samples)
    starts = folder.info["dataset_path"] if folder else None
    grid = join(args.dir, "samples_grid.png")
    outputs.save_grid(samples, starts, grid)
    print(f"samples: {absolute(samples)}\ngrid: {absolute(grid)}", flush=True)
    if not args.not_eval_metrics:
        evaluate(args, samples, folder)


def wait_for_chunks(folder: ChunkFolder, patience: float) -> None:
    """Return when all chunks are there; UserError after `patience` seconds without life.

    A live worker, however slow, is life; so is a chunk that was missing before.
    """
    overseer, screen = Overseer(folder), Screen()
    overview = overseer.look()
    last_life, done = time.monotonic(), overview.done
    while not overview.complete:
        if screen.is_due():
            screen.show(overview)
        time.sleep(_POLL_S)
        overview = overseer.look()
        if overview.done > done or any(worker["alive"] for worker in overview.workers):
            last_life, done = time.monotonic(), overview.done
        if time.monotonic() - last_life > patience:
            raise UserError(
                f"--wait_time: {overview.total - overview.done} of {overview.total} samples are "
                f"missing in {folder.folder}, and no process has worked on them for {patience:g} s"
            )


def wait_for_files(folder: str, number: int, patience: float) -> list[str]:
    """The rank files of `folder` when there are `number`; UserError after `patience` seconds."""
    started = time.monotonic()
    while len(files := outputs.rank_files(folder)) < number:
        if time.monotonic() - started > patience:
            raise UserError(
                f"--dir {folder}: {len(files)} of {number} files samples_…_rank_R.npz (--num_file) "
                f"are there after {patience:g} s (--wait_time)"
            )
        time.sleep(_POLL_S)
    return files


def evaluate(args: argparse.Namespace, samples: str, folder: ChunkFolder | None) -> None:
    """Run the evaluator, whose results go to stdout, and note them with all settings."""
    from guided_diffusion.presets import load_preset

    preset = load_preset(args.dataset)
    reference = args.ref_batch or preset.reference_batch
    if not reference:
        raise UserError(f"--ref_batch: the preset {preset.name} names no reference batch: give one")
    graph = args.inception_path or preset.feature_graph
    with tempfile.TemporaryDirectory() as scratch:
        result = join(scratch, "metrics.json")
        argv = [sys.executable, str(EVALUATOR), reference, samples, "--json", result]
        if graph:
            argv += ["--inception_path", graph]
        if preset.feature_graph:
            argv += ["--metric_name", preset.metric_name]
        code = subprocess.run(argv).returncode
        if code:
            print(f"error: the evaluation failed; the samples are in {samples}", file=sys.stderr)
            sys.exit(code)
        evaluation = read_json(result)
    record = {
        "dataset": preset.name,
        "evaluation": evaluation,
        "sampling": None if folder is None else {**folder.info, **folder.settings},
    }
    metrics = join(args.dir, "metrics.json")
    write_json(metrics, record)
    print(f"metrics and settings: {absolute(metrics)}")


if __name__ == "__main__":
    run_main(main)
