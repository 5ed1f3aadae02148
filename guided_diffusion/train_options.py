"""The flags that the training scripts share, and what the loop is told (no torch)."""

import argparse
import contextlib
import math
import re
from collections.abc import Iterable, Iterator

from esddpm_io.errors import UserError, check_at_least
from esddpm_io.help import CommandLine
from esddpm_io.processes import available_cores

from .flags import add_dict_to_argparser
from .settings.record import LARGEST_SEED

# What the generators of torch and NumPy take.
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
    "shard",
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
        "shard": False,
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
        snr_gamma=0.0,
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
    merged = {name: value for group in defaults for name, value in group.items()}
    add_dict_to_argparser(parser, merged)
    for action in parser._actions:
        if action.dest in ("compile", "shard", "start_anew"):
            action.nargs, action.const = "?", True
    if "early_stop_steps" in merged:
        parser.set_defaults(early_stop_steps=None)  # told from 0, see `resolve_resumed`
    return parser


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
    for name in ("weight_decay", "grad_clip", "snr_gamma", "fp16_scale_growth", "kl_weight"):
        value = getattr(args, name, 0.0)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} is {value}, it must be a number of at least 0")


def check_seed(seed: int) -> None:
    """UserError for a seed that the generators do not take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed is {seed}, it must be in 0 … {LARGEST_SEED}")


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
    from .dist_util import local_world_size

    cores = available_cores() // local_world_size()
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
        text = f"--{error}" if first in names else str(error)
        choices = re.search(r'must be one of (.+), not "(.*)"$', text)
        valid, got = (choices[1].split(", "), choices[2]) if choices else ((), ())
        raise UserError(text, got=got, valid=valid) from error
