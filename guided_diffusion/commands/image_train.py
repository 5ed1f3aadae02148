"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir FOLDER_OR_NPZ --image_size 32 --batch_size 64 …
    torchrun --nproc_per_node 8 scripts/image_train.py …     (or mpiexec -n 8 python …, or srun)

Checkpoints and logs go to the folder in OPENAI_LOGDIR. With --early_stop_steps T' the model learns
only t < T', all that sampling from a generator's images diffused to T' needs.
"""

import argparse
import functools

from guided_diffusion.flags import model_and_diffusion_defaults
from guided_diffusion.train_options import diffusion_training_defaults, training_parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)

    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.script_util import create_model_and_diffusion
    from guided_diffusion.train_diffusion import train_diffusion

    train_diffusion(
        args,
        kind="model",
        flag_names=model_and_diffusion_defaults(),
        create=create_model_and_diffusion,
        load=functools.partial(load_data, image_size=args.image_size),
    )


def create_argparser() -> argparse.ArgumentParser:
    return training_parser(__doc__, diffusion_training_defaults(), model_and_diffusion_defaults())
