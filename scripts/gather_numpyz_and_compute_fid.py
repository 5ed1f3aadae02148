"""Gather finished samples into samples_all.npz, draw samples_grid.png, evaluate into metrics.json.

--dir is a folder that sampling processes write to, finished or not yet, or one with the
samples_…_rank_R.npz files that they write with --save_numpy_array.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError, check_at_least, run_main, terminate_cleanly
from esddpm_io.files import absolute, check_output_folder, exists, is_blob, join, read_json
from esddpm_io.processes import run_to_end
from guided_diffusion.presets import load_preset
from guided_diffusion.sampling import outputs, plan
from guided_diffusion.sampling.chunks import SETTINGS_FILE, ChunkFolder
from guided_diffusion.sampling.progress import Overseer, Screen

EVALUATOR = Path(__file__).resolve().parents[1] / "evaluations" / "evaluator.py"
_POLL_S = 1.0
_TELL_EVERY_S = 30.0


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dir", required=True, help="folder with the samples")
    add("--num_file", type=int, default=1, help="number of samples_…_rank_R.npz files to wait for")
    add("--wait_time", type=float, default=600.0, help="seconds without a sign of life to wait")
    add("--dataset", default="imagenet64", help="name of a preset, or path of a preset file")
    add("--not_eval_metrics", action="store_true", help="only gather")
    plan.add_evaluation_flags(add)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_at_least(args, {"num_file": 1, "wait_time": 0})
    if not (is_blob(args.dir) or os.path.isdir(args.dir)):
        raise UserError(f"--dir: there is no folder {args.dir}")
    check_output_folder(args.dir, flag="--dir")
    files = None if args.not_eval_metrics else checked_evaluation(args)
    folder = None
    if exists(join(args.dir, SETTINGS_FILE)):
        folder = ChunkFolder.load(args.dir)
        wait_for_chunks(folder, args.wait_time)
        parts = outputs.parts_of(folder, 0, folder.num_samples)
    else:
        ranks = wait_for_files(args.dir, args.num_file, args.wait_time)
        parts = outputs.parts_of_files([ranks[rank] for rank in sorted(ranks)])
    samples = join(args.dir, "samples_all.npz")
    outputs.join_parts(parts, samples)
    starts = folder.info["dataset_path"] if folder else None
    grid = join(args.dir, "samples_grid.png")
    outputs.save_grid(samples, starts, grid)
    print(f"samples: {absolute(samples)}\ngrid: {absolute(grid)}", flush=True)
    if files is not None:
        evaluate(args, files, samples, folder)


def checked_evaluation(args: argparse.Namespace) -> plan.Evaluation:
    """What to score with, found good before there is anything to score."""
    from evaluations.evaluation import check_inputs

    files = plan.evaluation(args, load_preset(args.dataset))
    try:
        check_inputs(files.reference, inception_path=files.graph, **files.engine)
    except UserError as error:
        raise UserError(plan.as_our_flags(error)) from error
    return files


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


def wait_for_files(folder: str, number: int, patience: float) -> dict[int, str]:
    """The files of ranks 0 … number-1; UserError after `patience` seconds without a new one."""
    last_life, told = time.monotonic(), float("-inf")
    files = outputs.rank_files(folder, number)
    while len(files) < number:
        now = time.monotonic()
        missing = ", ".join(str(rank) for rank in range(number) if rank not in files)
        state = f"{len(files)} of {number} files samples_…_rank_R.npz (--num_file) are there"
        if now - last_life >= patience:
            raise UserError(
                f"--dir {folder}: {state}, no new one for {patience:g} s (--wait_time); "
                f"missing: rank {missing}"
            )
        if now - told >= _TELL_EVERY_S:
            told = now
            print(f"{folder}: {state}; waiting for rank {missing}", file=sys.stderr, flush=True)
        time.sleep(_POLL_S)
        before, files = len(files), outputs.rank_files(folder, number)
        if len(files) > before:
            last_life = time.monotonic()
    return files


def evaluate(
    args: argparse.Namespace, files: plan.Evaluation, samples: str, folder: ChunkFolder | None
) -> None:
    """Run the evaluator, whose results go to stdout, and note them with all settings."""
    with tempfile.TemporaryDirectory() as scratch:
        result = join(scratch, "metrics.json")
        argv = [sys.executable, str(EVALUATOR), files.reference, samples, "--json", result]
        flags = {"inception_path": files.graph, "metric_name": files.metric_name, **files.engine}
        argv += plan.as_argv({flag: value for flag, value in flags.items() if value})
        code = run_to_end(argv)
        if code:
            print(f"error: the evaluation failed; the samples are in {samples}", file=sys.stderr)
            sys.exit(code)
        evaluation = read_json(result)
    record = {
        "dataset": files.dataset,
        "evaluation": evaluation,
        "sampling": None if folder is None else {**folder.info, **folder.settings},
    }
    metrics = join(args.dir, "metrics.json")
    write_json(metrics, record)
    print(f"metrics and settings: {absolute(metrics)}")


if __name__ == "__main__":
    terminate_cleanly()
    run_main(main)
