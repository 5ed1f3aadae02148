"""A pipeline of diffusers as a generator of start images."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.hub import HUB, fetched
from esddpm_io.optional import import_extra
from guided_diffusion.diffusers_folder import plain_config

MODEL_INDEX = "model_index.json"  # what makes a folder a pipeline


def is_pipeline(target: str) -> bool:
    """Whether --generator names a folder, or a repository of the Hub."""
    return target.startswith(HUB) or os.path.isdir(target)


def load_pipeline(
    target: str, device: torch.device, flag: str
) -> tuple[Callable[..., torch.Tensor], str]:
    """The pipeline as a function of labels, and the settings of its parts.

    Its steps are the ones it takes by itself (a consistency model: one); what it draws comes from
    torch, so the latents that it is given say nothing. It gives float [n, 3, H, W] in [-1, 1].
    UserError, naming `flag`, for a folder that is none, and for one that needs more than a number
    of images, such as a text.
    """
    folder = fetched(target, flag=flag)
    if not os.path.isfile(os.path.join(folder, MODEL_INDEX)):
        raise UserError(f"{flag}: {folder} is no pipeline of diffusers: it has no {MODEL_INDEX}")
    pipeline = import_extra("diffusers", f"{flag} {target}").DiffusionPipeline.from_pretrained(
        folder, local_files_only=True
    )
    takes = inspect.signature(pipeline.__call__).parameters
    if "batch_size" not in takes:
        raise UserError(
            f"{flag}: a {type(pipeline).__name__} needs more than a number of images: call it in a "
            "function of your own, MODULE:FACTORY"
        )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    classes = getattr(getattr(pipeline, "unet", None), "config", {}).get("num_class_embeds")

    def generate(latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        options = {} if labels is None else {"class_labels": labels}
        made = pipeline(batch_size=len(latents), output_type="np", **options).images
        return torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2) * 2 - 1

    about = {
        "latent_shape": (1,),
        "num_classes": classes if "class_labels" in takes else None,
    }
    vars(generate).update(about)
    return generate, _settings(pipeline)


def _settings(pipeline: Any) -> str:
    """The settings of all parts, whatever folder and version of diffusers they are from."""
    parts = [
        f"{name} {type(part).__name__} {sorted(plain_config(getattr(part, 'config', {})).items())}"
        for name, part in sorted(pipeline.components.items())
    ]
    return "\n".join(parts)
