"""Train a diffusion model on images.

    python scripts/image_train.py --data_dir FOLDER_OR_NPZ --image_size 32 --batch_size 64 …
    torchrun --nproc_per_node 8 scripts/image_train.py …     (or mpiexec -n 8 python …, or srun)

Checkpoints and logs go to the folder in OPENAI_LOGDIR. With --early_stop_steps T' the model learns
only t < T', all that sampling from a generator's images diffused to T' needs.
"""

import argparse

import torch

from esddpm_io.errors import run_main
from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.train_options import (
    check_ranges,
    data_options,
    diffusion_training_defaults,
    explained_flags,
    loop_options,
    settle_device_options,
    training_parser,
)
from guided_diffusion.train_util import TrainLoop


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_ranges(args)
    dist_util.setup_dist()
    logger.configure()
    settle_device_options(args, "use_fp16")
    torch.manual_seed(args.seed)

    flags = args_to_dict(args, model_and_diffusion_defaults())
    early_stop_steps = args.early_stop_steps or None
    with explained_flags():
        model, diffusion = create_model_and_diffusion(**flags)
        sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion, early_stop_steps)
        data = load_data(
            image_size=args.image_size, class_cond=args.class_cond, **data_options(args)
        )
        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=data,
            schedule_sampler=sampler,
            ema_rate=args.ema_rate,
            lr_anneal_steps=args.lr_anneal_steps,
            fp16_scale_growth=args.fp16_scale_growth,
            sidecar={"flags": flags, "kind": "model", "early_stop_steps": early_stop_steps},
            **loop_options(args),
        )
    loop.run_loop()


def create_argparser() -> argparse.ArgumentParser:
    return training_parser(__doc__, diffusion_training_defaults(), model_and_diffusion_defaults())


if __name__ == "__main__":
    run_main(main)
