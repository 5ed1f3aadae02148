"""Gather finished samples into samples_all.npz, draw samples_grid.png, evaluate into metrics.json.

    python scripts/gather_numpyz_and_compute_fid.py --dir FOLDER --dataset imagenet64

--dir is a folder that sampling processes write to, finished or not yet, or one with the
samples_…_rank_R.npz files that they write with --save_numpy_array.
"""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from esddpm_io.errors import UserError, check_at_least, terminate_cleanly
from esddpm_io.files import check_output_folder, exists, is_blob, join
from esddpm_io.help import CommandLine
from guided_diffusion.commands import scoring
from guided_diffusion.settings.layers import check_not_empty, parse
from guided_diffusion.settings.presets import Preset, load_preset

if TYPE_CHECKING:
    from guided_diffusion.sampling.chunks import ChunkFolder

DEFAULT_DATASET = "imagenet64"
_POLL_S = 1.0
_TELL_EVERY_S = 30.0


def create_argparser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("--dir", required=True, help="folder with the samples")
    add("--num_file", type=int, default=1, help="number of samples_…_rank_R.npz files to wait for")
    add("--wait_time", type=float, default=600.0, help="seconds without a sign of life to wait")
    dataset = "name of a preset, or path of a preset file; default: the one of the samples"
    add("--dataset", default=DEFAULT_DATASET, help=dataset)
    add("--not_eval_metrics", action="store_true", help="only gather")
    scoring.add_flags(add)
    return parser


def main(argv: list[str] | None = None) -> None:
    from guided_diffusion.sampling import gathering, outputs
    from guided_diffusion.sampling.chunks import SETTINGS_FILE, ChunkFolder

    terminate_cleanly()
    args, typed = parse(create_argparser(), argv)
    check_not_empty(args, typed)
    check_at_least(args, {"num_file": 1, "wait_time": 0})
    if not (is_blob(args.dir) or os.path.isdir(args.dir)):
        raise UserError(f"--dir: there is no folder {args.dir}")
    check_output_folder(args.dir, flag="--dir")
    there = exists(join(args.dir, SETTINGS_FILE))
    folder = ChunkFolder.load(args.dir) if there else None
    preset, evaluation = None, None
    if not args.not_eval_metrics:
        preset = _preset(args, typed, folder.run.preset if folder else DEFAULT_DATASET)
        evaluation = scoring.read_flags(args, preset)
        evaluation.check()
    if folder:
        _wait_for_chunks(folder, args.wait_time)
        while not gathering.gather(folder):
            _wait_for_chunks(folder, args.wait_time)
    else:
        ranks = _wait_for_files(args.dir, args.num_file, args.wait_time)
        parts = outputs.parts_of_files([ranks[rank] for rank in sorted(ranks)])
        outputs.join_parts(parts, join(args.dir, gathering.SAMPLES_FILE))
        gathering.draw_grid(args.dir, None)
    if evaluation:
        scoring.evaluate([args.dir], evaluation, preset.name if preset else None)


def _preset(args: argparse.Namespace, typed: set[str], recorded: str | None) -> Preset | None:
    """The preset that was typed, else the one that the samples were made with."""
    if "dataset" in typed:
        return load_preset(args.dataset)
    if recorded is None:
        return None
    print(f"--dataset: {recorded}")
    return load_preset(recorded)


def _wait_for_chunks(folder: "ChunkFolder", patience: float) -> None:
    """Return when all samples are there; UserError after `patience` seconds without life.

    A live worker, however slow, is life; so is a sample that was missing before.
    """
    from guided_diffusion.sampling.status import Monitor, Screen

    monitor, screen = Monitor(folder), Screen()
    overview = monitor.look()
    last_life, done = time.monotonic(), overview.done
    while not overview.complete:
        if screen.is_due():
            screen.show(overview)
        time.sleep(_POLL_S)
        overview = monitor.look()
        if overview.done > done or any(worker["alive"] for worker in overview.workers):
            last_life, done = time.monotonic(), overview.done
        if time.monotonic() - last_life > patience:
            raise UserError(
                f"--wait_time: {overview.total - overview.done} of {overview.total} samples are "
                f"missing in {folder.folder}, and no process has worked on them for {patience:g} s"
            )


def _wait_for_files(folder: str, number: int, patience: float) -> dict[int, str]:
    """The files of ranks 0 … number-1; UserError after `patience` seconds without a new one."""
    from guided_diffusion.sampling import outputs

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
