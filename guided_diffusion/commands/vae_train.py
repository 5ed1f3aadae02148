"""Train a VAE on your own images: the generator that early-stopped diffusion starts from.

    OPENAI_LOGDIR=exps/my_vae python scripts/vae_train.py --data_dir my_images --image_size 64

Checkpoints and logs go to the folder in OPENAI_LOGDIR. At the end it gets vaeNNNNNN.pt, all that
vae_sample.py needs: the averaged weights, and the prior fitted to the codes of the training images.
Averaged are those of the first --ema_rate; with --ema_rate "" of the first --power_ema, or, without
that, the last weights. With --resume_checkpoint auto, a run that was stopped goes on; one that was
through fits the prior anew. Starts alone, or under torchrun, mpiexec or srun, as image_train.py.
"""

import argparse
from typing import TYPE_CHECKING

from esddpm_io.errors import UserError, check_at_least
from guided_diffusion.flags import args_to_dict, vae_defaults
from guided_diffusion.train_options import (
    data_options,
    explained_flags,
    loop_defaults,
    loop_options,
    training_parser,
)

if TYPE_CHECKING:
    from guided_diffusion.image_datasets import BatchStream

_MOST_CLASSES = 2**31  # labels are numbered by the data here, not by a published model


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_vae_ranges(args)

    import numpy as np
    import torch

    from guided_diffusion.training.loop import Trainer
    from guided_diffusion.training.start import start_run
    from guided_diffusion.training.vae import finish, reconstructions
    from guided_diffusion.vae import create_vae, vae_loss

    start_run(args, "use_fp16")
    data = training_data(args)
    classes = data.images.classes
    flags = args_to_dict(args, model_flags())
    flags["num_classes"] = 0 if classes is None else int(classes.max()) + 1
    # The prior comes last, so its size may still be changed when a finished run is resumed.
    training_flags = {**flags, "prior_components": 1}
    with explained_flags(vars(args)):
        create_vae(**flags)
        vae = create_vae(**training_flags)
        if classes is not None:
            vae.label_counts.copy_(torch.from_numpy(np.bincount(classes)))
        trainer = Trainer(
            model=vae,
            data=data,
            loss=vae_loss(args.latent_dim, args.kl_weight),
            ema_rate=args.ema_rate,
            lr_anneal_steps=args.iterations if args.anneal_lr else 0,
            sidecar={"flags": training_flags, "kind": "vae"},
            sample_interval=args.sample_interval,
            draw_samples=reconstructions(data) if args.sample_interval else None,
            **loop_options(args),
        )
    trainer.run_loop()
    if trainer.global_step >= args.iterations:
        finish(trainer, flags, training_data(args), args.prior_images, args.seed)


def model_flags() -> dict:
    """Flags of the network that the user sets; the number of classes comes from the data."""
    return {name: value for name, value in vae_defaults().items() if name != "num_classes"}


def training_data(args: argparse.Namespace) -> "BatchStream":
    """The data from its start, labels included with --class_cond."""
    from guided_diffusion.image_datasets import load_data

    return load_data(
        image_size=args.image_size,
        class_cond=args.class_cond,
        num_classes=_MOST_CLASSES,
        **data_options(args),
    )


def check_vae_ranges(args: argparse.Namespace) -> None:
    """UserError for numbers that no VAE can be trained with."""
    check_at_least(args, {"iterations": 1, "prior_images": 1})
    if args.precision == "float16":
        raise UserError("--precision float16: a VAE trains in float32 or bfloat16")


def create_argparser() -> argparse.ArgumentParser:
    defaults = dict(
        data_dir="",
        class_cond=False,
        kl_weight=1.0,
        prior_images=50000,
        iterations=20000,
        lr=1e-3,
        anneal_lr=True,
        weight_decay=0.0,
        batch_size=32,
        microbatch=-1,
        ema_rate="0.999",
        log_interval=100,
        save_interval=1000,
        sample_interval=0,
        resume_checkpoint="",
        **loop_defaults(),
    )
    parser = training_parser(__doc__, defaults, model_flags())
    parser.set_defaults(use_fp16=False)  # never: `start_run` asks
    return parser
