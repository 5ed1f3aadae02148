"""The variational bound of a set of images, by all processes that were started together."""

from collections.abc import Iterator

import numpy as np
import torch

from esddpm_io.atomic import atomic_path
from esddpm_io.files import join
from esddpm_io.progress import Progress
from guided_diffusion import dist_util, logger
from guided_diffusion.gaussian_diffusion import GaussianDiffusion

TERMS = ("vb", "mse", "xstart_mse")


def evaluate(
    model: torch.nn.Module,
    diffusion: GaussianDiffusion,
    data: Iterator,
    num_samples: int,
    clip_denoised: bool,
) -> float:
    """Mean bits per dimension of `num_samples` images, in equal shares of all processes."""
    share = -(-num_samples // dist_util.world_size())
    bits: list[float] = []
    terms: dict[str, list[np.ndarray]] = {name: [] for name in TERMS}
    with Progress(share, "images", "bits per dimension") as progress:
        while len(bits) < share:
            batch, cond = next(data)
            left = share - len(bits)
            metrics = measure(model, diffusion, batch[:left], cond, clip_denoised)
            bits += metrics["total_bpd"].tolist()
            for name in TERMS:
                terms[name] += list(metrics[name].cpu().numpy())
            progress.update(min(len(batch), left), f"{np.mean(bits):.4f} bits per dimension")
    gathered = dist_util.gather_objects((bits, terms))
    bits = [value for part, _ in gathered for value in part]
    logger.log(f"done {len(bits)} samples: bpd={np.mean(bits):.6f}")
    if dist_util.rank() == 0:
        save_terms({name: [row for _, part in gathered for row in part[name]] for name in TERMS})
    return float(np.mean(bits))


@torch.inference_mode()
def measure(model, diffusion, batch, cond, clip_denoised) -> dict[str, torch.Tensor]:
    """All terms of the bound for one batch, on the model's device."""
    device = dist_util.dev()
    return diffusion.calc_bpd_loop(
        model,
        batch.to(device).contiguous(),  # noise is drawn in the order of the memory
        clip_denoised=clip_denoised,
        model_kwargs={name: value[: len(batch)].to(device) for name, value in cond.items()},
    )


def save_terms(terms: dict[str, list[np.ndarray]]) -> None:
    """Write the mean of each term by step, `arr_0` float32 [T], step T-1 first."""
    for name, rows in terms.items():
        path = join(logger.get_dir(), f"{name}_terms.npz")
        with atomic_path(path) as temporary:
            np.savez(temporary, np.mean(np.stack(rows), axis=0))
        logger.log(f"wrote {path}")
