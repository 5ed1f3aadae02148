"""The names that code written for guided-diffusion imports; the code is in `training`."""

import os

from esddpm_io.files import exists

from . import logger
from .checkpoint_sets import CheckpointSet, step_of_model
from .fp16_util import INITIAL_LOG_LOSS_SCALE
from .rng import Draws
from .training.diffusion import TrainLoop, log_loss_dict
from .training.loop import MAX_NON_FINITE_STEPS, PRECISIONS, StopSignals, Trainer, parse_rates

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "MAX_NON_FINITE_STEPS",
    "PRECISIONS",
    "Draws",
    "StopSignals",
    "TrainLoop",
    "Trainer",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_rates",
    "parse_resume_step_from_filename",
]


def find_resume_checkpoint() -> str | None:
    """None: guided-diffusion's place for a search of one's own (`resume_checkpoint="auto"`)."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The average of `rate` and this step beside a checkpoint, None if it is not there."""
    if not main_checkpoint:
        return None
    path = CheckpointSet(os.path.dirname(main_checkpoint) or ".", step).ema(rate)
    return path if exists(path) else None


def get_blob_logdir() -> str | None:
    """The folder of checkpoints: the log's, a local one; None before `logger.configure`."""
    return logger.get_dir()


def parse_resume_step_from_filename(filename: str) -> int:
    """NNNNNN of a path …/modelNNNNNN.pt, 0 for another name."""
    return step_of_model(filename) or 0
