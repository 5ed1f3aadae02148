"""Train a super-resolution diffusion model: from images of --small_size to --large_size.

    python scripts/super_res_train.py --data_dir FOLDER --large_size 256 --small_size 64 …

Started, stopped, resumed and logged like image_train.py.
"""

import argparse
import functools

from esddpm_io.errors import UserError
from guided_diffusion.flags import sr_model_and_diffusion_defaults
from guided_diffusion.train_options import diffusion_training_defaults, training_parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if not 1 <= args.small_size <= args.large_size:
        raise UserError(f"--small_size must be in 1 … large_size ({args.large_size})")

    from guided_diffusion.script_util import sr_create_model_and_diffusion
    from guided_diffusion.train_diffusion import train_diffusion
    from guided_diffusion.training.super_res import load_superres_data

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
