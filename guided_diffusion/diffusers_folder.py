"""Denoisers of diffusers: a folder or Hub address of a DDPMPipeline or UNet2DModel as a checkpoint.

A folder has `unet/config.json` with weights beside it and `scheduler/scheduler_config.json`, or
`config.json` and `scheduler_config.json` where there is no pipeline. Its sidecar is what
these files say; its state dict is the U-Net's, as `diffusers_network` takes it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.optional import import_extra

from .gaussian_diffusion import get_named_beta_schedule

KIND = "diffusers"
_UNET, _CONDITIONAL = "UNet2DModel", ("vae", "vqvae", "text_encoder", "tokenizer")
# Of an old scheduler's config that lacks them: the arguments' defaults in diffusers.
_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}


def is_diffusers(path: str) -> bool:
    """Whether `path` is a folder that diffusers may have written."""
    return os.path.isdir(path) and _unet_folder(path) is not None


def _unet_folder(path: str) -> Path | None:
    return next(
        (p for p in (Path(path, "unet"), Path(path)) if (p / "config.json").is_file()), None
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_folder(path: str) -> dict[str, Any]:
    """The sidecar of a folder: kind, flags and early_stop_steps, as `checkpoints.read_sidecar`.

    UserError, naming the file, for what the samplers cannot use.
    """
    folder = _unet_folder(path)
    assert folder is not None
    config = _read(folder / "config.json")
    index = _read(Path(path, "model_index.json")) if Path(path, "model_index.json").exists() else {}
    if surplus := [name for name in _CONDITIONAL if index.get(name)]:
        raise UserError(
            f"{path} is a {index.get('_class_name')} with {', '.join(surplus)}: only denoisers of "
            "images without a text or latents can be used (a DDPMPipeline)"
        )
    _check_unet(config, folder / "config.json")
    size, classes = config.get("sample_size"), config.get("num_class_embeds")
    flags: dict[str, Any] = {
        "unet": json.dumps(plain_config(config), sort_keys=True),
        "class_cond": classes is not None,
        "num_classes": classes or 0,
        "image_size": size if isinstance(size, int) else size[0],
        "learn_sigma": config.get("out_channels", 3) == 6,
    }
    schedulers = Path(path, "scheduler"), Path(path), folder
    files = [p / "scheduler_config.json" for p in schedulers]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"{path} has no scheduler_config.json, which says the betas and what the network "
            "predicts: put the one of its pipeline beside config.json"
        )
    flags |= _process(_read(found), found, flags["learn_sigma"])
    return {"kind": KIND, "flags": flags, "early_stop_steps": None}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without who wrote it, and where."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _check_unet(config: Mapping[str, Any], path: Path) -> None:
    size = config.get("sample_size")
    problems = {
        f"is of a {config.get('_class_name')}": config.get("_class_name") != _UNET,
        "has no sample_size": not size,
        "is for images that are not square": isinstance(size, list) and len({*size}) > 1,
        "is not for 3 channels": config.get("in_channels", 3) != 3,
        "gives neither 3 nor 6 channels": config.get("out_channels", 3) not in (3, 6),
        "takes classes in another form than numbers": bool(config.get("class_embed_type")),
    }
    for problem, is_one in problems.items():
        if is_one:
            raise UserError(f"{path} {problem}: only a {_UNET} of square RGB images can be used")


def _process(scheduler: Mapping[str, Any], path: Path, learn_sigma: bool) -> dict[str, Any]:
    """The flags of the diffusion process, from the config of any scheduler that has betas."""
    if "beta_schedule" not in scheduler and scheduler.get("trained_betas") is None:
        raise UserError(f"{path}: a {scheduler.get('_class_name')} has no betas, as DDPM's has")
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"{path}: rescale_betas_zero_snr is not supported")
    told = {**_SCHEDULER_DEFAULTS, **scheduler}
    variance = str(told.get("variance_type") or "fixed_small")
    if variance == "learned" or learn_sigma != variance.startswith("learned"):
        raise UserError(
            f"{path}: variance_type {variance} does not go with the U-Net's output: it is "
            "learned_range for 6 channels, fixed_small or fixed_large for 3"
        )
    # Configs of before 2023 say it in this way.
    older = "sample" if told.get("predict_epsilon") is False else "epsilon"
    predicts = told.get("prediction_type", older)
    if predicts not in ("epsilon", "sample", "v_prediction"):
        raise UserError(
            f"{path}: prediction_type must be epsilon, sample or v_prediction, not {predicts}"
        )
    schedule, steps = _schedule(told, path)
    return {
        "diffusion_steps": steps,
        "noise_schedule": schedule,
        "predict_xstart": predicts == "sample",
        "rescale_timesteps": False,
        "v_prediction": predicts == "v_prediction",
        "sigma_small": variance.startswith("fixed_small"),
    }


def _schedule(scheduler: Mapping[str, Any], path: Path) -> tuple[str, int]:
    """The betas as --noise_schedule names them, and their number."""
    name, betas = scheduler["beta_schedule"], scheduler.get("trained_betas")
    steps = len(betas) if betas is not None else int(scheduler["num_train_timesteps"])
    if betas is not None:
        return " ".join(["betas", *map(repr, map(float, betas))]), steps
    if name == "squaredcos_cap_v2":
        return "cosine", steps
    if name not in ("linear", "scaled_linear"):
        raise UserError(
            f"{path}: beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, or "
            f"trained_betas must be there, not {name}"
        )
    text = f"{name} {float(scheduler['beta_start'])!r} {float(scheduler['beta_end'])!r}"
    as_ours = np.allclose(
        *(get_named_beta_schedule(t, steps) for t in (text, "linear")), rtol=1e-12, atol=0
    )
    return "linear" if as_ours else text, steps


def read_tensors(path: str, *, flag: str) -> dict[str, torch.Tensor]:
    """The state dict of the folder's `DiffusersNetwork`; UserError if tensors are missing."""
    diffusers = import_extra("diffusers", f"{flag}: {path}")
    read_folder(path)  # says in our words what else the reader would say in its own
    folder = _unet_folder(path)
    try:
        unet, info = diffusers.UNet2DModel.from_pretrained(
            folder, output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag}: cannot read {folder}: {_one_line(error)}") from error
    for what in ("missing", "unexpected", "mismatched"):
        if names := [str(name) for name in info[f"{what}_keys"]]:
            raise UserError(f"{flag}: {folder}: tensors {what}: {', '.join(names[:3])}, …")
    return {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}


def _one_line(error: Exception, most: int = 200) -> str:
    """Of an error that names tensors in the lines that follow."""
    return " ".join(str(error).split())[:most]
