"""What training an image model and a super-resolution model have in common, flags to last step."""

import argparse
from collections.abc import Callable, Iterable

import numpy as np
import torch

from esddpm_io.images import image_grid

from .flags import args_to_dict
from .image_datasets import BatchStream
from .pixels import to_uint8
from .resample import create_named_schedule_sampler
from .respace import SpacedDiffusion
from .train_options import data_options, explained_flags, loop_options
from .train_util import TrainLoop
from .training.start import resolve_resumed, start_run

# Enough DDIM steps to judge a network by, few enough that training hardly waits for them.
_STEPS = 25
_COLUMNS = 8


def train_diffusion(
    args: argparse.Namespace,
    *,
    kind: str,
    flag_names: Iterable[str],
    create: Callable[..., tuple[torch.nn.Module, SpacedDiffusion]],
    load: Callable[..., BatchStream],
) -> None:
    """Train a network of diffusion_training_defaults and its own flags to the end.

    `create(**flags)` builds network and process from the flags called `flag_names`, `load(**data
    options)` opens the data, `kind` is that of the sidecar. Raises UserError as the parts do.
    """
    start_run(args, "use_fp16")
    flags = args_to_dict(args, flag_names)
    with explained_flags(vars(args)):
        stop = resolve_resumed(args, flags)
        model, diffusion = create(**flags)
        sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion, stop)
        data = load(class_cond=args.class_cond, **data_options(args))
        sampling = args.sample_interval > 0
        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=data,
            schedule_sampler=sampler,
            snr_gamma=args.snr_gamma,
            ema_rate=args.ema_rate,
            lr_anneal_steps=args.lr_anneal_steps,
            fp16_scale_growth=args.fp16_scale_growth,
            sidecar={"flags": flags, "kind": kind, "early_stop_steps": stop},
            sample_interval=args.sample_interval,
            draw_samples=sample_drawer(diffusion, data, stop, args.seed) if sampling else None,
            **loop_options(args),
        )
    loop.run_loop()


def sample_drawer(
    diffusion: SpacedDiffusion,
    data: BatchStream,
    early_stop_steps: int | None = None,
    seed: int = 0,
) -> Callable[[torch.nn.Module], np.ndarray]:
    """A function that draws DDIM samples of a network as one uint8 [H, W, 3] image.

    The start noise is the same each time, so that grids of one run compare. A network of
    early-stopped training starts from the first images of the data, diffused to T' - 1: they are
    the first row, what becomes of them the second. Conditions (labels, small images) are those of
    the first images, too.
    """
    batch, cond = next(data)
    data.seek(0)
    start = batch[:_COLUMNS]
    cond = {name: value[:_COLUMNS] for name, value in cond.items()}
    stop = early_stop_steps or diffusion.num_timesteps
    spaced = np.linspace(0, stop - 1, min(_STEPS, stop)).round().astype(int)
    chain = diffusion.keeping(diffusion.timestep_map[index] for index in spaced)

    @torch.no_grad()
    def draw(model: torch.nn.Module) -> np.ndarray:
        device = next(model.parameters()).device
        torch.manual_seed(seed)
        early = {"noise": start, "denoise_steps": chain.num_timesteps} if early_stop_steps else {}
        samples = chain.ddim_sample_loop(
            model,
            tuple(start.shape),
            model_kwargs={name: value.to(device) for name, value in cond.items()},
            device=device,
            **early,
        ).cpu()
        rows = torch.cat([start, samples]) if early_stop_steps else samples
        return image_grid(to_uint8(rows), len(start))

    return draw
