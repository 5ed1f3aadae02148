"""Bits per dimension of images under a diffusion model: the whole variational bound.

    python scripts/image_nll.py --data_dir FOLDER_OR_NPZ --model_path MODEL.pt --num_samples 100

Every image takes one pass of the network for each step of the chain. Means by step are written to
vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz in OPENAI_LOGDIR. Flags of the network that are
not given are found as image_sample.py finds them. Also with torchrun, mpiexec, srun.
"""

import argparse

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.help import CommandLine
from guided_diffusion.flags import add_dict_to_argparser, model_and_diffusion_defaults
from guided_diffusion.settings.layers import parse
from guided_diffusion.train_options import check_seed, explained_flags


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    own = {
        "data_dir": "",
        "clip_denoised": True,
        "num_samples": 1000,
        "batch_size": 1,
        "model_path": "",
        "seed": 0,
        "override_checkpoint_flags": False,
    }
    add_dict_to_argparser(parser, {**own, **model_and_diffusion_defaults()})
    return parser


def main(argv: list[str] | None = None) -> None:
    args, typed = parse(create_argparser(), argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    check_seed(args.seed)

    import torch

    from guided_diffusion import dist_util, logger
    from guided_diffusion.commands.request import network_of
    from guided_diffusion.image_datasets import load_data
    from guided_diffusion.likelihood import evaluate
    from guided_diffusion.sampling.sampler import load_network
    from guided_diffusion.settings.record import diffusion_from
    from guided_diffusion.settings.resolver import resolve_network

    network = resolve_network(
        "model",
        args.model_path,
        flag="--model_path",
        typed={name: getattr(args, name) for name in typed},
        override=args.override_checkpoint_flags,
    )
    flags, trained = network.flags, network.early_stop_steps
    if trained is not None:
        raise UserError(
            f"--model_path: {args.model_path} was trained on timesteps below T' = {trained} only; "
            "the bound on the likelihood needs all of the chain"
        )

    terminate_cleanly()
    dist_util.setup_dist()
    logger.configure()
    for remark in network.remarks:
        logger.log(remark)
    with explained_flags(vars(args)):
        data = load_data(
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            image_size=flags["image_size"],
            class_cond=flags["class_cond"],
            deterministic=True,
            random_flip=False,
        )
        diffusion = diffusion_from(network.process, args.timestep_respacing)
    record = network_of(network, "--model_path")
    model = load_network(record, dist_util.dev(), flag="--model_path", log=logger.log)
    torch.manual_seed(args.seed + dist_util.rank())
    evaluate(model, diffusion, data, args.num_samples, args.clip_denoised)
