"""How a training run starts: the other processes, the log, the precision, T'."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from esddpm_io.errors import UserError
from esddpm_io.processes import cpu_has_bfloat16
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoint_sets import find_set, newest_set, set_aside
from guided_diffusion.checkpoints import read_sidecar
from guided_diffusion.compiling import check_compiler
from guided_diffusion.train_options import check_ranges

# Flags that a network's weights do not show, and that change what they mean
_MEANING = (
    *("num_heads", "num_head_channels", "use_new_attention_order", "diffusion_steps"),
    *("noise_schedule", "predict_xstart", "rescale_timesteps"),
)


def start_run(args: argparse.Namespace, fp16_flag: str) -> None:
    """Check the shared flags, join the other processes, open the log, resolve precision, seed."""
    check_ranges(args)
    dist_util.setup_dist()
    if args.start_anew:
        dist_util.on_rank_zero(lambda: _clear_folder(args.resume_checkpoint))
    logger.configure(comm=dist_util.AllRanks())
    dist_util.on_rank_zero(lambda: _check_folder(args.resume_checkpoint))
    resolve_device_options(args, fp16_flag)
    torch.manual_seed(args.seed)


def _check_folder(resume_checkpoint: str) -> None:
    """UserError if a run that starts at step 0 would mix its checkpoints with another's."""
    folder = logger.get_dir()
    there = newest_set(Path(folder))
    found = find_set(resume_checkpoint, folder)
    own = found is not None and Path(found.model).parent.resolve() == Path(folder).resolve()
    if there and resume_checkpoint != "auto" and not own:
        raise UserError(
            f"OPENAI_LOGDIR: {folder} holds the checkpoints of a run up to step {there.step}: go on"
            " with --resume_checkpoint auto, put them aside with --start_anew, or give this run"
            " another folder"
        )


def _clear_folder(resume_checkpoint: str) -> None:
    """Put what another run left in OPENAI_LOGDIR out of the way of a new one."""
    folder = os.path.expanduser(os.environ.get("OPENAI_LOGDIR", ""))
    inside = bool(folder) and Path(resume_checkpoint).parent.resolve() == Path(folder).resolve()
    if resume_checkpoint == "auto" or find_set(resume_checkpoint, folder) or inside:
        raise UserError(
            "--start_anew moves away what --resume_checkpoint is to start from: leave one of them "
            "out, or name a file of weights elsewhere"
        )
    moved = set_aside(Path(folder)) if folder else None
    if moved:
        print(f"--start_anew: the run that was in {folder} is in {moved} now", file=sys.stderr)


def resolve_device_options(args: argparse.Namespace, fp16_flag: str) -> None:
    """Turn `fp16_flag` and --precision into a precision that this device has, and say so.

    float16 needs CUDA: on a CPU it becomes bfloat16 where the processor computes in it, else
    float32.
    """
    device = dist_util.dev()
    if args.compile:
        check_compiler(device.type)
    wanted = args.precision or ("float16" if getattr(args, fp16_flag) else "float32")
    if wanted == "float16" and device.type == "cpu":
        wanted = "bfloat16" if cpu_has_bfloat16() else "float32"
        logger.log(f"float16 needs CUDA: training in {wanted} on this CPU")
    args.precision = wanted
    setattr(args, fp16_flag, wanted == "float16")


def resolve_resumed(args: argparse.Namespace, flags: Mapping[str, object]) -> int | None:
    """T' of this run, None for all timesteps: --early_stop_steps, or else the resumed network's.

    UserError where that network was trained with other `flags` than this run's, in what its weights
    do not show. It goes on with the T' in its sidecar unless the flag says otherwise, 0 included.
    So the sidecars of this run are true, and no resume takes the guard of sampling away.
    """
    asked = args.early_stop_steps
    path, sidecar = dist_util.on_rank_zero(lambda: _resumed(args))
    if sidecar:
        _check_flags(path, sidecar["flags"], flags)
    trained = sidecar["early_stop_steps"] if sidecar else None
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


def _check_flags(path: str, trained: Mapping, flags: Mapping[str, object]) -> None:
    names = [name for name in _MEANING if name in flags and name in trained]
    if {flags.get("num_head_channels", -1), trained.get("num_head_channels", -1)} != {-1}:
        names = [name for name in names if name != "num_heads"]  # which has no effect then
    other = {name: trained[name] for name in names if trained[name] != flags[name]}
    if other:
        wanted = " ".join(f"--{name} {value}" for name, value in other.items())
        raise UserError(
            f"--resume_checkpoint: {path} was trained with {wanted}: add that, or put its .json "
            "aside to train with your flags all the same"
        )


def _resumed(args: argparse.Namespace) -> tuple[str, dict | None]:
    """The checkpoint that this run goes on from ("" for none), and its sidecar, if it has one."""
    found = find_set(args.resume_checkpoint, logger.get_dir())
    path = found.model if found else args.resume_checkpoint
    sidecar = read_sidecar(path) if path not in ("", "auto") else None
    return path, sidecar
