"""Train a classifier of noisy images, for guidance.

    python scripts/classifier_train.py --data_dir FOLDER_OR_NPZ --val_data_dir … --batch_size 256 …

Started, stopped, resumed and logged like image_train.py, with the same loop.
"""

import argparse

from guided_diffusion.flags import args_to_dict, classifier_and_diffusion_defaults
from guided_diffusion.train_options import (
    data_options,
    explained_flags,
    loop_defaults,
    loop_options,
    training_parser,
)


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)

    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.resample import create_named_schedule_sampler
    from guided_diffusion.script_util import create_classifier_and_diffusion
    from guided_diffusion.training.classifier import ClassifierTrainer
    from guided_diffusion.training.start import resolve_resumed, start_run

    start_run(args, "classifier_use_fp16")
    flags = args_to_dict(args, classifier_and_diffusion_defaults())
    with explained_flags(vars(args)):
        stop = resolve_resumed(args, flags)
        model, diffusion = create_classifier_and_diffusion(**flags)
        common = {"image_size": args.image_size, "class_cond": True}
        options = data_options(args)
        data = load_data(**common, **options)
        val_data = None
        if args.val_data_dir and args.eval_interval:
            options |= {"data_dir": args.val_data_dir, "random_crop": False}
            val_data = load_data(**common, **options)
        loop = ClassifierTrainer(
            model=model,
            diffusion=diffusion,
            sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion, stop),
            noised=args.noised,
            data=data,
            val_data=val_data,
            eval_interval=args.eval_interval,
            ema_rate="",
            lr_anneal_steps=args.iterations if args.anneal_lr else 0,
            initial_lg_loss_scale=16.0,  # gradients of a cross entropy are larger than of an MSE
            sidecar={"flags": flags, "kind": "classifier", "early_stop_steps": stop},
            **loop_options(args),
        )
    loop.run_loop()


def create_argparser() -> argparse.ArgumentParser:
    defaults = {
        "data_dir": "",
        "val_data_dir": "",
        "noised": True,
        "iterations": 150000,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "anneal_lr": False,
        "batch_size": 4,
        "microbatch": -1,
        "schedule_sampler": "uniform",
        "resume_checkpoint": "",
        "log_interval": 10,
        "eval_interval": 5,
        "save_interval": 10000,
        "early_stop_steps": 0,
        **loop_defaults(),
        "random_crop": True,
    }
    return training_parser(__doc__, defaults, classifier_and_diffusion_defaults())
