"""The flags that the training scripts share, and how they become keyword arguments."""

import argparse
import contextlib
import os
from collections.abc import Iterator

from esddpm_io.errors import UserError, check_at_least

from . import dist_util, logger
from .script_util import add_dict_to_argparser

# Workers beyond this only cost memory: one decodes some hundred images a second.
_MOST_WORKERS = 8

# Groups of flags and where they go.
_LOOP = (
    "batch_size",
    "microbatch",
    "lr",
    "weight_decay",
    "log_interval",
    "save_interval",
    "resume_checkpoint",
    "iterations",
    "precision",
    "keep_checkpoints",
    "seed",
    "channels_last",
)
_DATA = ("data_dir", "batch_size", "random_crop", "random_flip", "label_from", "seed")

_HELP = {
    "data_dir": "folder of images (any depth) or .npz with arr_0 (and arr_1: labels)",
    "schedule_sampler": "uniform, or loss-second-moment",
    "lr_anneal_steps": "lr falls linearly to 0 at this step and training ends (0: constant lr)",
    "iterations": "steps in all (0: lr_anneal_steps, or no end)",
    "microbatch": "images that go through the model at once (-1: the batch)",
    "ema_rate": "rate of the averaged weights, or a comma list of rates",
    "resume_checkpoint": "a modelNNNNNN.pt, or auto: the newest complete set in OPENAI_LOGDIR",
    "early_stop_steps": "train on timesteps below this one only (0: all)",
    "precision": "float32, bfloat16 or float16 (default: float16 with use_fp16, else float32)",
    "keep_checkpoints": "remove all but this many checkpoints (0: keep all)",
    "channels_last": "NHWC memory: faster convolutions in half precision on GPUs",
    "label_from": "name: label is the file name up to _; folder: the folder's name",
    "num_workers": "processes that decode images (-1: as many as cores, at most 8)",
    "sample_interval": "draw samples of the averaged weights every so many steps (0: never)",
}


def loop_defaults() -> dict:
    """Flags of the loop that guided-diffusion does not have, for all training scripts."""
    return {
        "precision": "",
        "keep_checkpoints": 0,
        "channels_last": False,
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
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    merged: dict = {}
    for group in defaults:
        merged.update(group)
    add_dict_to_argparser(parser, merged)
    for action in parser._actions:
        if action.dest in _HELP:
            action.help = _HELP[action.dest]
    return parser


def check_ranges(args: argparse.Namespace) -> None:
    """UserError for numbers that no run can have."""
    lowest = {"batch_size": 1, "log_interval": 1, "save_interval": 1, "seed": 0}
    lowest |= dict.fromkeys(
        (
            "iterations",
            "lr_anneal_steps",
            "early_stop_steps",
            "keep_checkpoints",
            "sample_interval",
        ),
        0,
    )
    check_at_least(args, lowest)
    if args.lr <= 0:
        raise UserError(f"--lr is {args.lr}, it must be above 0")


def settle_device_options(args: argparse.Namespace, fp16_flag: str) -> None:
    """Turn `fp16_flag` and --precision into a precision that this device has, and say so.

    float16 needs CUDA: on a CPU it becomes bfloat16 where the processor computes in it, else
    float32.
    """
    device = dist_util.dev()
    wanted = args.precision or ("float16" if getattr(args, fp16_flag) else "float32")
    if wanted == "float16" and device.type == "cpu":
        wanted = "bfloat16" if dist_util.cpu_has_bfloat16() else "float32"
        logger.log(f"float16 needs CUDA: training in {wanted} on this CPU")
    args.precision = wanted
    setattr(args, fp16_flag, wanted == "float16")


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
def explained_flags() -> Iterator[None]:
    """Turn the ValueErrors of constructors, which name the argument, into errors for the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--{error}") from error
