"""What a VAE's training has beside the loop: pictures, and the fit of the prior at its end."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from esddpm_io.images import image_grid

from .. import dist_util, logger
from ..checkpoints import save_checkpoint, write_sidecar
from ..image_datasets import BatchStream
from ..pixels import to_uint8
from ..vae import VAE, create_vae
from .loop import Trainer

_GRID_COLUMNS = 16


def reconstructions(data: BatchStream) -> Callable[[VAE], np.ndarray]:
    """A function that draws the first images of the data, and below them what the VAE makes of
    them, as one uint8 [H, W, 3] image."""
    batch, cond = next(data)
    data.seek(0)
    batch = batch[:_GRID_COLUMNS]
    labels = cond["y"][:_GRID_COLUMNS] if cond else None

    @torch.no_grad()
    def draw(vae: VAE) -> np.ndarray:
        device = vae.label_counts.device
        y = None if labels is None else labels.to(device)
        decoded = vae.decode(vae.encode(batch.to(device), y)[0], y).cpu()
        return image_grid(to_uint8(torch.cat([batch, decoded])), len(batch))

    return draw


def finish(trainer: Trainer, flags: dict, data: BatchStream, prior_images: int, seed: int) -> None:
    """Fit the prior of the averaged weights and write vaeNNNNNN.pt with its sidecar."""
    vae = create_vae(**flags).to(trainer.device).eval()
    trained = trainer.mp_trainer.master_params_to_state_dict(trainer.averaged_params)
    own_prior = {k: v for k, v in vae.state_dict().items() if k.startswith("prior.")}
    vae.load_state_dict({**trained, **own_prior})
    shares = dist_util.gather_objects(encode_share(vae, data, prior_images))
    if dist_util.rank() == 0:
        position, *codes = (torch.cat(parts) for parts in zip(*shares, strict=True))
        # In the data's order, so that the start of the fit does not depend on who encoded what.
        labels, mean, variance = (part[position.argsort()] for part in codes)
        logger.log(f"fitting the prior to the codes of {len(mean)} images")
        vae.fit_prior(labels if vae.num_classes else None, mean, variance, seed)
        path = str(Path(logger.get_dir()) / f"vae{trainer.global_step:06d}.pt")
        write_sidecar(path, flags, kind="vae")
        save_checkpoint(vae.cpu().state_dict(), path)
        logger.log(f"the VAE is in {path}")


@torch.no_grad()
def encode_share(vae: VAE, data: BatchStream, most: int) -> tuple[torch.Tensor, ...]:
    """Positions in the shuffled data, labels (0 without), means and variances of q for this
    process's share of the first `most` images, each image at most once."""
    n = min(len(data.images), most)
    rows = torch.arange(data.batch_size) + data.batch_size * dist_util.rank()
    step_rows = data.batch_size * dist_util.world_size()
    device, parts = vae.label_counts.device, []
    for first in range(0, n, step_rows):
        batch, cond = next(data)
        labels = cond.get("y")
        mean, log_sigma = vae.encode(
            batch.to(device), labels.to(device) if labels is not None else None
        )
        if labels is None:
            labels = torch.zeros(len(batch), dtype=torch.int64)
        positions = first + rows
        wanted = positions < n  # the stream goes on into its next round
        codes = (positions, labels, mean.cpu(), torch.exp(2 * log_sigma).cpu())
        parts.append([code[wanted] for code in codes])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
