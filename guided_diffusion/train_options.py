"""The flags that the training scripts share, how a run starts, and what the loop is told."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from esddpm_io.errors import UserError, check_at_least
from esddpm_io.help import CommandLine

from . import dist_util, logger
from .checkpoint_sets import find_set, newest_set, set_aside
from .checkpoints import read_sidecar
from .compiling import check_compiler
from .script_util import add_dict_to_argparser

# What the generators of torch and NumPy take.
HIGHEST_SEED = 2**64 - 1
# Workers beyond this only cost memory: one decodes some hundred images a second.
_MOST_WORKERS = 8

# Groups of flags and where they go.
_LOOP = (
    "batch_size",
    "microbatch",
    "lr",
    "weight_decay",
    "lr_warmup",
    "grad_clip",
    "power_ema",
    "log_interval",
    "save_interval",
    "resume_checkpoint",
    "iterations",
    "precision",
    "keep_checkpoints",
    "seed",
    "channels_last",
    "compile",
)
_DATA = ("data_dir", "batch_size", "random_crop", "random_flip", "label_from", "seed")


def loop_defaults() -> dict:
    """Flags of the loop that guided-diffusion does not have, for all training scripts."""
    return {
        "start_anew": False,
        "lr_warmup": 0,
        "grad_clip": 0.0,
        "power_ema": "",
        "precision": "",
        "keep_checkpoints": 0,
        "channels_last": False,
        "compile": False,
        "seed": 0,
        "random_crop": False,
        "random_flip": True,
        "label_from": "name",
        "num_workers": -1,
    }


def diffusion_training_defaults() -> dict:
    """Flags of image_train and super_res_train beside those of the model."""
    return dict(
        data_dir="",
        schedule_sampler="uniform",
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        batch_size=1,
        microbatch=-1,
        ema_rate="0.9999",
        log_interval=10,
        save_interval=10000,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
        early_stop_steps=0,
        iterations=0,
        sample_interval=0,
        **loop_defaults(),
    )


def training_parser(description: str, *defaults: dict) -> argparse.ArgumentParser:
    """A parser with these flags, the shared ones explained."""
    parser = CommandLine(description=description)
    merged: dict = {}
    for group in defaults:
        merged.update(group)
    add_dict_to_argparser(parser, merged)
    for action in parser._actions:
        if action.dest in ("compile", "start_anew"):
            action.nargs, action.const = "?", True
    if "early_stop_steps" in merged:
        parser.set_defaults(early_stop_steps=None)  # told from 0, see `settle_early_stop`
    return parser


def start_run(args: argparse.Namespace, fp16_flag: str) -> None:
    """Check the shared flags, join the other processes, open the log, settle precision, seed."""
    check_ranges(args)
    dist_util.setup_dist()
    if args.start_anew:
        dist_util.on_rank_zero(lambda: _clear_folder(args.resume_checkpoint))
    logger.configure(comm=dist_util.AllRanks())
    dist_util.on_rank_zero(lambda: _check_folder(args.resume_checkpoint))
    settle_device_options(args, fp16_flag)
    torch.manual_seed(args.seed)


def _check_folder(resume_checkpoint: str) -> None:
    """UserError if a run that starts at step 0 would mix its checkpoints with another's."""
    folder = logger.get_dir()
    there = newest_set(Path(folder))
    if there and resume_checkpoint != "auto" and not find_set(resume_checkpoint, folder):
        raise UserError(
            f"OPENAI_LOGDIR: {folder} holds the checkpoints of a run up to step {there.step}: go on"
            " with --resume_checkpoint auto, put them aside with --start_anew, or give this run"
            " another folder"
        )


def _clear_folder(resume_checkpoint: str) -> None:
    """Put what another run left in OPENAI_LOGDIR out of the way of a new one."""
    folder = os.path.expanduser(os.environ.get("OPENAI_LOGDIR", ""))
    if resume_checkpoint == "auto" or find_set(resume_checkpoint, folder):
        raise UserError(
            "--start_anew starts at step 0, but --resume_checkpoint goes on: leave one of them out"
        )
    moved = set_aside(Path(folder)) if folder else None
    if moved:
        print(f"--start_anew: the run that was in {folder} is in {moved} now", file=sys.stderr)


def check_ranges(args: argparse.Namespace) -> None:
    """UserError for numbers that no run can have."""
    lowest = {"batch_size": 1, "log_interval": 1, "save_interval": 1}
    lowest |= dict.fromkeys(
        (
            "iterations",
            "lr_anneal_steps",
            "lr_warmup",
            "early_stop_steps",
            "keep_checkpoints",
            "sample_interval",
            "eval_interval",
        ),
        0,
    )
    given = {name: least for name, least in lowest.items() if getattr(args, name, None) is not None}
    check_at_least(args, given)
    check_seed(args.seed)
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr is {args.lr}, it must be above 0")
    for name in ("weight_decay", "grad_clip", "fp16_scale_growth", "kl_weight"):
        value = getattr(args, name, 0.0)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} is {value}, it must be a number of at least 0")


def check_seed(seed: int) -> None:
    """UserError for a seed that the generators do not take."""
    if not 0 <= seed <= HIGHEST_SEED:
        raise UserError(f"--seed is {seed}, it must be in 0 … {HIGHEST_SEED}")


def settle_device_options(args: argparse.Namespace, fp16_flag: str) -> None:
    """Turn `fp16_flag` and --precision into a precision that this device has, and say so.

    float16 needs CUDA: on a CPU it becomes bfloat16 where the processor computes in it, else
    float32.
    """
    device = dist_util.dev()
    if args.compile:
        check_compiler(device.type)
    wanted = args.precision or ("float16" if getattr(args, fp16_flag) else "float32")
    if wanted == "float16" and device.type == "cpu":
        wanted = "bfloat16" if dist_util.cpu_has_bfloat16() else "float32"
        logger.log(f"float16 needs CUDA: training in {wanted} on this CPU")
    args.precision = wanted
    setattr(args, fp16_flag, wanted == "float16")


def settle_early_stop(args: argparse.Namespace) -> int | None:
    """T' of this run, None for all timesteps: --early_stop_steps, or else the resumed network's.

    A network goes on with the T' in its sidecar unless the flag says otherwise, 0 included, so
    that the sidecars of this run are true and no resume takes the guard of sampling away.
    """
    asked = args.early_stop_steps
    path, trained = dist_util.on_rank_zero(lambda: _resumed_early_stop(args))
    if trained is None or asked == trained:
        return asked or None
    if asked is None:
        logger.log(
            f"--early_stop_steps {trained}: {path} was trained on these timesteps (0 for all)"
        )
        return trained
    now = f"those below {asked}" if asked else "all of them"
    logger.warn(
        f"--early_stop_steps {asked}: {path} was trained on timesteps below {trained}, from here on"
        f" it learns {now}, and its new sidecars say so"
    )
    return asked or None


def _resumed_early_stop(args: argparse.Namespace) -> tuple[str, int | None]:
    """The checkpoint that this run goes on from ("" for none), and the T' in its sidecar."""
    found = find_set(args.resume_checkpoint, logger.get_dir())
    path = found.model if found else args.resume_checkpoint
    sidecar = read_sidecar(path) if path not in ("", "auto") else None
    return path, sidecar["early_stop_steps"] if sidecar else None


def loop_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of `Trainer` from parsed flags."""
    return {name: getattr(args, name) for name in _LOOP}


def data_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of `load_data` from parsed flags."""
    options = {name: getattr(args, name) for name in _DATA}
    return {**options, "num_workers": _worker_count(args.num_workers)}


def _worker_count(asked: int) -> int:
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) // dist_util.local_world_size()
    return max(1, min(_MOST_WORKERS, cores - 1))


@contextlib.contextmanager
def explained_flags(names: Iterable[str]) -> Iterator[None]:
    """Turn the ValueErrors of constructors into errors for the user.

    An error that begins with an argument's name gets its dashes if that is one of the flags
    `names`.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        first = re.match(r"\w*", str(error))[0]
        raise UserError(f"--{error}" if first in names else str(error)) from error
