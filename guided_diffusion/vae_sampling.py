"""Samples of a trained VAE: codes from its fitted prior, labels as often as in its data."""

import sys

import numpy as np
import torch

from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import load_weights, read_sidecar
from guided_diffusion.flags import vae_defaults
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import RandomStreams
from guided_diffusion.settings.layers import check_flags
from guided_diffusion.vae import VAE, create_vae


def load_vae(path: str) -> VAE:
    """The VAE of a checkpoint written by vae_train.py, in evaluation mode on the CPU.

    Raises:
        UserError: no path, no such file, no sidecar, or another kind of network.
    """
    if not path:
        raise UserError("--model_path: name the checkpoint that vae_train.py wrote")
    sidecar = read_sidecar(path)
    if sidecar is None or sidecar["kind"] != "vae":
        raise UserError(
            f"--model_path: {path} is not a VAE's checkpoint: vae_train.py writes one, "
            "vaeNNNNNN.pt, with a .json of its flags beside it"
        )
    check_flags(f"--model_path: the sidecar of {path}", sidecar["flags"], vae_defaults())
    vae = create_vae(**sidecar["flags"])
    load_weights(vae, path, flag="--model_path")
    if not vae.prior.fitted:
        print(
            f"note: {path} is from the middle of a training; its prior is plain N(0, I). The "
            "vaeNNNNNN.pt that vae_train.py writes at its end has the fitted one",
            file=sys.stderr,
        )
    return vae.eval()


def sample_range(vae: VAE, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples start … stop-1 of a seed: uint8 [n, H, W, 3] and labels int64 [n]."""
    device = vae.label_counts.device
    streams = RandomStreams(seed, start, stop, purpose="latents")
    normal = streams.randn(torch.empty(stop - start, 2 + vae.latent_dim))
    # The normal distribution function makes uniform numbers of the first two: one picks the label,
    # one the component of its prior.
    uniform = torch.special.ndtr(normal[:, :2].double())
    labels = frequent_labels(vae.label_counts, uniform[:, 0].to(device))
    images = vae.sample(
        labels if vae.num_classes else None, uniform[:, 1].to(device), normal[:, 2:].to(device)
    )
    return to_uint8(images), labels.cpu().numpy()


def frequent_labels(counts: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels int64 [N] with the frequencies of `counts`, from uniform numbers [N] in [0, 1)."""
    cumulative = counts.double().cumsum(dim=0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
