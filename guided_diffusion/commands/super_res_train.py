"""Train a super-resolution diffusion model: from images of --small_size to --large_size.

    python scripts/super_res_train.py --data_dir FOLDER --large_size 256 --small_size 64 …

Started, stopped, resumed and logged like image_train.py.
"""

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from esddpm_io.errors import UserError
from guided_diffusion.image_datasets import load_data
from guided_diffusion.script_util import (
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.train_diffusion import train_diffusion
from guided_diffusion.train_options import diffusion_training_defaults, training_parser


class SmallImages:
    """Batches of `load_data` with cond["low_res"], the images reduced by area averages."""

    def __init__(self, data, small_size: int):
        self._data, self._small_size = data, small_size
        self.seek, self.figures = data.seek, data.figures
        self.end_workers = data.end_workers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch, cond = next(self._data)
        return batch, {**cond, "low_res": F.interpolate(batch, self._small_size, mode="area")}


def load_superres_data(
    data_dir: str,
    batch_size: int,
    large_size: int,
    small_size: int,
    class_cond: bool = False,
    **more,
) -> SmallImages:
    """Endless (images, {"low_res": small images, ["y": labels]}); `more` goes to `load_data`."""
    data = load_data(
        data_dir=data_dir,
        batch_size=batch_size,
        image_size=large_size,
        class_cond=class_cond,
        **more,
    )
    return SmallImages(data, small_size)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if not 1 <= args.small_size <= args.large_size:
        raise UserError(f"--small_size must be in 1 … large_size ({args.large_size})")
    train_diffusion(
        args,
        kind="sr",
        flag_names=sr_model_and_diffusion_defaults(),
        create=sr_create_model_and_diffusion,
        load=functools.partial(
            load_superres_data, large_size=args.large_size, small_size=args.small_size
        ),
    )


def create_argparser() -> argparse.ArgumentParser:
    return training_parser(
        __doc__, diffusion_training_defaults(), sr_model_and_diffusion_defaults()
    )
