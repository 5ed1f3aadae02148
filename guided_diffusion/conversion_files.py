"""Checkpoints and folders of diffusers written as the other; `conversion` has the mathematics."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from esddpm_io.errors import UserError
from esddpm_io.files import read_json
from esddpm_io.optional import import_extra
from guided_diffusion import conversion
from guided_diffusion.checkpoints import (
    SAFETENSORS,
    fingerprint,
    read_checkpoint,
    read_sidecar,
    save_checkpoint,
    sidecar_path,
    write_sidecar,
)
from guided_diffusion.diffusers_network import DiffusersNetwork
from guided_diffusion.script_util import NUM_CLASSES, create_network
from guided_diffusion.settings.layers import require
from guided_diffusion.settings.recognition import identify
from guided_diffusion.settings.resolver import Resolved, resolve_network

TOLERANCE = 1e-5  # of the outputs, in units of the largest one or of 1
FILES = (".pt", ".pth", ".bin", SAFETENSORS)
_LARGEST_CHECK = 64  # pixels; the networks are convolutional
_WITHOUT = {
    "classifier": "classifier of noisy images: diffusers has none",
    "sr": "super-resolution network: a DDPMPipeline has no input for the small image",
    "vae": "VAE of this package: diffusers has other ones",
}
_VARIANCE = {
    False: "the learned variance is kept: 6 output channels, for DDPMScheduler (learned_range)",
    True: "the learned variance is dropped: 3 output channels, variance fixed_small",
}
# Of published sampling from noise: the images of a step are clipped, as `clip_denoised` says.
_SAMPLING = {"clip_sample": True}


def copy(source: str, target: str) -> None:
    """The same tensors and sidecar in another file."""
    tensors, sidecar = read_checkpoint(source, flag="A"), read_sidecar(source)
    _check_beside(target, sidecar)
    _save(tensors, sidecar, target)
    require(
        fingerprint(read_checkpoint(target, flag="B")) == fingerprint(tensors),
        f"B: {target} has other tensors than {source} after writing",
    )
    print(f"{target}: {len(tensors)} tensors" + (" and their flags" if sidecar else ""))


def _check_beside(target: str, sidecar: Mapping[str, Any] | None) -> None:
    """UserError for a .json beside the target that would be read as its flags, and says others."""
    beside = sidecar_path(target)
    written = sidecar is not None and not target.endswith(SAFETENSORS)
    require(
        written or not os.path.exists(beside) or read_json(beside) == sidecar,
        f"B: {beside} is there already and would be read as the flags of {target}: move it away",
    )


def _save(tensors: conversion.Tensors, sidecar: Mapping[str, Any] | None, target: str) -> None:
    save_checkpoint(tensors, target, sidecar)
    if sidecar is not None and not target.endswith(SAFETENSORS):
        write_sidecar(target, **sidecar)


def to_file(source: str, target: str) -> None:
    """A folder of diffusers as a checkpoint with its flags."""
    found = _resolved(source, {})
    require(not found.flags["v_prediction"], f"A: {source} predicts v: ours give noise or x_0")
    theirs = _load_folder(source, found)
    with _naming(source):
        flags = conversion.flags_of(theirs.unet.config)
    flags |= {name: value for name, value in found.process.items() if name in flags}
    sidecar = {"kind": "model", "flags": flags, "early_stop_steps": None}
    _check_beside(target, sidecar)
    ours = create_network("model", flags)
    ours.load_state_dict(conversion.from_diffusers(theirs.unet.state_dict(), flags))
    difference = _check_equal(ours, theirs, flags)
    _save(ours.state_dict(), sidecar, target)
    print(f"{target}: outputs differ by {difference:.1g}")
    if not flags["learn_sigma"] and found.process["sigma_small"]:
        print(
            "note: its scheduler had the posterior's variance (fixed_small); guided-diffusion's "
            "flags know beta's alone, so DDPM steps add more noise"
        )


def to_folder(source: str, target: str, typed: Mapping[str, Any], drop: bool) -> None:
    """A checkpoint of ours as a DDPMPipeline."""
    kind = _kind_of(source)
    require(kind not in _WITHOUT, f"A: {source} is a {_WITHOUT.get(kind)}")
    found = _resolved(source, typed)
    flags, tensors, process = dict(found.flags), read_checkpoint(source, flag="A"), found.process
    learned = bool(flags["learn_sigma"])
    require(learned or not drop, f"--drop_variance: {source} learned no variance")
    if drop:
        tensors, flags["learn_sigma"] = conversion.without_variance(tensors), False
        process |= {"learn_sigma": False, "sigma_small": True}
    with _naming(source):
        config = conversion.unet_config(flags)
        scheduler = {**conversion.scheduler_config(process), **_SAMPLING}
    ours = create_network("model", flags)
    ours.load_state_dict(tensors)
    diffusers = import_extra("diffusers", f"B: {target}")
    unet = diffusers.UNet2DModel(**config)
    unet.load_state_dict(conversion.to_diffusers(tensors, flags))
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**scheduler))
    part = Path(os.path.abspath(target)).with_name(f".tmp-{os.path.basename(target)}-{os.getpid()}")
    try:
        pipeline.save_pretrained(part)
        (part / "README.md").write_text(_card(source, found, drop), encoding="utf-8")
        difference = _check_equal(ours, _load_folder(str(part)), flags)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{target}: outputs differ by {difference:.1g}")
    if learned:
        print(_VARIANCE[drop])


def _resolved(source: str, typed: Mapping[str, Any]) -> Resolved:
    """The flags of A; prints where they are from and what is assumed."""
    found = resolve_network("model", source, flag="A", typed=typed)
    for remark in found.remarks:
        print(remark)
    return found


def _kind_of(source: str) -> str | None:
    sidecar = read_sidecar(source)
    if sidecar is not None:
        return sidecar["kind"]
    found = identify(read_checkpoint(source, flag="A"))
    return found.kind if found else None


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """The reason why a network has no equal, with the file that it is in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"A: {source} cannot be converted: {error}") from error


def _load_folder(folder: str, found: Resolved | None = None) -> DiffusersNetwork:
    found = found or resolve_network("model", folder, flag="B", typed={})
    network = create_network(found.kind, found.flags)
    assert isinstance(network, DiffusersNetwork)
    network.load_state_dict(read_checkpoint(folder, flag="B"))
    return network


@torch.inference_mode()
def _check_equal(ours: torch.nn.Module, theirs: torch.nn.Module, flags: Mapping[str, Any]) -> float:
    """Largest difference of outputs for random input, in units of the largest output or of 1.

    UserError if it is above TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(int(flags["image_size"]), _LARGEST_CHECK)
    x = torch.randn(2, 3, size, size, generator=generator)
    labels = {"y": torch.tensor([0, _classes(flags) - 1])} if flags["class_cond"] else {}
    times = torch.tensor([1, int(flags["diffusion_steps"]) - 1])
    one, other = (network.eval()(x, times, **labels) for network in (ours, theirs))
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=1))
    require(
        difference <= TOLERANCE,
        f"the converted network gives other outputs (by {difference:.1g}): nothing was written",
    )
    return difference


def _classes(flags: Mapping[str, Any]) -> int:
    """Of a class-conditional network."""
    return int(flags.get("num_classes", NUM_CLASSES))


def _card(source: str, found: Resolved, drop: bool) -> str:
    """The model card, README.md of the folder."""
    flags = found.flags
    facts = [
        f"converted from `{os.path.basename(source)}`, a U-Net of guided-diffusion, by ES-DDPM's "
        "`convert_checkpoint.py`, which found equal outputs",
        f"{flags['image_size']} × {flags['image_size']} RGB images in [-1, 1]"
        + (f", {_classes(flags)} classes (`class_labels`)" if flags["class_cond"] else ""),
        f"predicts {'the clean image' if flags['predict_xstart'] else 'the noise'}, schedule "
        f"{flags['noise_schedule']}, {flags['diffusion_steps']} timesteps",
    ]
    if flags["learn_sigma"]:
        facts.append(_VARIANCE[drop])
    if found.early_stop_steps:
        facts.append(
            f"trained on timesteps below T' = {found.early_stop_steps} only: start from images "
            "diffused to T', not from noise"
        )
    lines = "\n".join(f"- {fact}" for fact in facts)
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {Path(source).stem}

{lines}

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("FOLDER")
```
"""
