"""Small denoisers with random weights, saved by diffusers itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

SIZE = 8
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
TRAINED = {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}
PROCESSES = {
    "epsilon, linear": {},
    "epsilon, other linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "v, cosine": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "sample, scaled": {"prediction_type": "sample", **SCALED},
    "epsilon, trained": TRAINED,
    "learned variance": {"variance_type": "learned_range"},
}


def save(folder: Path, size: int = SIZE, classes: int | None = None, **process) -> str:
    """A DDPMPipeline of a small U-Net with random weights; one with classes has no pipeline."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        out_channels=6 if process.get("variance_type") == "learned_range" else 3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    scheduler = diffusers.DDPMScheduler(clip_sample=False, **process)
    if classes is None:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    else:
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")
    return str(folder)
