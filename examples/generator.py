"""A generator for --generator, here the VAE of emoji32: docs/bring_your_own.md."""

from pathlib import Path

import torch

from guided_diffusion.checkpoints import load_weights, read_sidecar
from guided_diffusion.vae import create_vae

CHECKPOINT = str(Path(__file__).parents[1] / "scripts" / "models" / "emoji32_vae.pt")


class EmojiVAE(torch.nn.Module):
    latent_shape, num_classes = (1 + 64,), 10

    def __init__(self, device):
        super().__init__()
        self.vae = create_vae(**read_sidecar(CHECKPOINT)["flags"])
        load_weights(self.vae, CHECKPOINT, flag="--generator")
        self.to(device).eval()

    def forward(self, latents, labels):
        component = torch.special.ndtr(latents[:, 0].double())  # of the prior, from N(0, 1)
        return self.vae.sample(labels, component, latents[:, 1:])
