"""Early stop as a Python call: the engine's sampler on images in memory, without folders."""

import dataclasses
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, get_args

import numpy as np
import torch

from esddpm_io.errors import of_type, speaking_of_arguments
from esddpm_io.hub import fetched
from guided_diffusion.checkpoints import read_checkpoint, read_sidecar
from guided_diffusion.commands.request import (
    Request,
    classes_of,
    least_side,
    network_of,
    sampler_of,
)
from guided_diffusion.commands.sampler_flags import WITH_ETA
from guided_diffusion.denoiser import Denoiser
from guided_diffusion.diffusers_folder import KIND as DIFFUSERS
from guided_diffusion.flags import flag_defaults
from guided_diffusion.pixels import to_float
from guided_diffusion.sampling.generators import GeneratedImages, generator_of
from guided_diffusion.sampling.job import Job
from guided_diffusion.sampling.sampler import LoadedNetworks, Sampler, choose_device
from guided_diffusion.sampling.sources import GeneratorImages, Source, Start
from guided_diffusion.script_util import NUM_CLASSES
from guided_diffusion.settings.layers import check_flags, require, without_effect
from guided_diffusion.settings.record import (
    LARGEST_SEED,
    Guidance,
    Network,
    Run,
    StartSettings,
    diffusion_from,
)
from guided_diffusion.settings.resolver import Resolved, check_same_noise, resolve_network

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class LoadedNetwork:
    """A checkpoint's network on a device; call `module` as `module(x, timesteps, y=labels)`.

    x: NCHW float in [-1, 1]; timesteps: int64 [N]. A U-Net gives the noise in x (and with
    learn_sigma its variance in as many channels more), a classifier logits.
    """

    record: Network
    resolved: Resolved
    device: torch.device
    module: Callable
    kept: LoadedNetworks

    def denoiser(self) -> Denoiser:
        """D(x, σ) for samplers in the convention of k-diffusion and EDM, of a U-Net."""
        require(self.record.kind != "classifier", "denoiser: a classifier has none")
        return Denoiser(self.module, diffusion_from(self.resolved.process, ""))


def _checked(call: Callable[P, R]) -> Callable[P, R]:
    """Plain arguments are of the types that the signature has; errors speak of arguments."""
    signature = inspect.signature(call)
    plain = {int, float, str, bool, os.PathLike, type(None)}
    kinds = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
        and {*(get_args(parameter.annotation) or [parameter.annotation])} <= plain
    }

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs)
        with speaking_of_arguments():
            for name in kinds.keys() & given.arguments.keys():
                given.arguments[name] = of_type(name, given.arguments[name], kinds[name])
            return call(*given.args, **given.kwargs)

    return checked


@_checked
def load_network(
    path: str | os.PathLike,
    device: str | torch.device = "",
    **flags: bool | int | float | str,
) -> LoadedNetwork:
    """Load a U-Net or a classifier of noisy images; its flags are found as the commands find them.

    path: of a checkpoint, or a folder or hf://owner/name[@revision] of diffusers. device: "cpu", an
    index or "cuda:INDEX"; empty: a GPU if there is one. flags: of the network and the process
    (`noise_schedule`, `num_heads`, …), for bare files whose shapes do not tell them; what had to be
    assumed is in the `remarks` of `resolved`. ValueError for a file that is missing, is no
    checkpoint, or does not fit its flags, and for a flag that there is not.
    """
    path = fetched(str(path), flag="path")
    kind = _kind_of(path)
    known = flag_defaults(kind)
    del known["timestep_respacing"]  # of the sampler
    check_flags("flags", flags, known)
    resolved = resolve_network(kind, path, flag="path", typed=flags)
    record, where = network_of(resolved, "path"), choose_device(str(device))
    kept = LoadedNetworks()
    module = kept.load(record, where, flag="path", log=print)
    return LoadedNetwork(record, resolved, where, module, kept)


@_checked
def early_stop(
    network: LoadedNetwork,
    images: np.ndarray | Callable[..., torch.Tensor],
    t_prime: int = 400,
    steps: int = 8,
    sampler: str = "dpmpp_2m_sde",
    seed: int = 0,
    labels: np.ndarray | None = None,
    classifier: LoadedNetwork | None = None,
    guidance_scale: float = 0.0,
    batch_size: int = 32,
    *,
    spacing: str = "uniform",
    eta: float | None = None,
    clip_denoised: bool | None = None,
    num_samples: int = 0,
) -> np.ndarray:
    """Diffuse images to T' and denoise them in `steps` network evaluations (arXiv 2205.12524).

    images: uint8 [N, H, W, 3]; returns the same. Sample i depends on image i, its label, i and
    `seed` alone; the sampling commands make the same of the same images, to the bit where batches
    have the same size. labels: integers [N], for class-conditional networks and for guidance by
    `classifier` with the factor `guidance_scale`. Or `images` is a generator, as the factory of
    --generator gives it (docs/bring_your_own.md), which makes `num_samples` of them, and their
    labels if it has classes. The other arguments are the flags of that name;
    None is the sampler's own. On CUDA it sets this process's switches for tf32 to what the
    network's precision is. ValueError, naming the argument, for all that cannot be; what has no
    effect is warned of.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
    require(0 <= seed <= LARGEST_SEED, f"seed must be in 0 … {LARGEST_SEED}, not {seed}")
    networks, guidance = _networks(network, classifier, guidance_scale)
    classes, size = classes_of(networks), int(network.record.flags["image_size"])
    source: _Arrays | GeneratorImages
    if isinstance(images, np.ndarray) or not callable(images):
        require(not num_samples, "num_samples: leave it out with an array of images")
        _check_images(images, size, networks)
        _check_labels(labels, len(images), classes)
        source = _Arrays(images, labels)
    else:
        require(labels is None, "labels: leave them out with a generator, which has its own")
        source = _generated(images, num_samples, seed, network.device)
        source.check(size, "image_size", classes, least_side(networks))
    height, width = source.shape
    request = Request(
        kind="model",
        model_path=network.record.path,
        typed={},
        respacing="",
        steps=steps,
        sampler=sampler,
        t_prime=t_prime,
        spacing=spacing,
        eta=eta,
        clip_denoised=clip_denoised,
    )
    shape = None if height == width else (height, width)
    run = Run(
        network=network.record,
        process=network.resolved.process,
        guidance=guidance,
        start=StartSettings("images", num_classes=classes, shape=shape),
        sampler=sampler_of(request, networks),
        seed=seed,
        num_samples=len(source),
    )
    in_vain = {
        "classifier": (classifier is not None and guidance is None, "with guidance_scale 0"),
        "labels": (labels is not None and classes is None, "with a network that takes none"),
        "eta": (eta is not None and sampler not in WITH_ETA, f"with the sampler {sampler}"),
    }
    for remark in without_effect({*in_vain}, in_vain):
        warnings.warn(remark.removeprefix("--"), stacklevel=3)
    device = "cpu" if network.device.type == "cpu" else str(network.device)
    kept = network.kept if classifier is None else network.kept.joined(classifier.kept)
    engine = Sampler(Job(run, source, save_dir="", device=device), networks=kept)
    starts = range(0, len(source), batch_size)
    return np.concatenate([engine.sample(i, min(i + batch_size, len(source)))[0] for i in starts])


def _networks(
    network: LoadedNetwork, classifier: LoadedNetwork | None, scale: float
) -> tuple[list[Resolved], Guidance | None]:
    """The U-Net and, where the scale is not 0, the classifier; `ValueError` for any others."""
    fits = isinstance(network, LoadedNetwork) and network.record.kind != "classifier"
    require(fits, "network must be a U-Net that load_network gives")
    fits = isinstance(classifier, LoadedNetwork) and classifier.record.kind == "classifier"
    require(fits or classifier is None, "classifier must be a classifier that load_network gives")
    require(math.isfinite(scale), f"guidance_scale must be a finite number, not {scale}")
    if not scale:
        return [network.resolved], None
    require(classifier is not None, "classifier: guidance_scale needs one")
    assert classifier is not None
    check_same_noise(network.resolved, classifier.resolved)
    return [network.resolved, classifier.resolved], Guidance(classifier.record, scale)


class _Arrays(Source):
    """Images uint8 [N, H, W, 3] and labels [N] in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None):
        self._images, self._labels = images, labels
        self.shape = images.shape[1:3]

    def __len__(self) -> int:
        return len(self._images)

    def start(self, start: int, stop: int) -> Start:
        labels = None if self._labels is None else np.asarray(self._labels[start:stop], np.int64)
        return Start(to_float(np.ascontiguousarray(self._images[start:stop])), labels)


def _generated(function: Callable, count: int, seed: int, device: torch.device) -> GeneratorImages:
    require(count >= 1, f"num_samples must be at least 1 with a generator, not {count}")
    images = GeneratedImages(generator_of(function, device, "images"), count, seed)
    return GeneratorImages(images, "the generator", "images")


def _kind_of(path: str) -> str:
    """What the sidecar says; without one, a classifier is a U-Net's first half."""
    sidecar = read_sidecar(path)
    if sidecar is not None:
        return "model" if sidecar["kind"] == DIFFUSERS else sidecar["kind"]
    names = read_checkpoint(path, flag="path")
    return "model" if any(name.startswith("output_blocks.") for name in names) else "classifier"


def _check_images(images: np.ndarray, size: int, networks: Sequence[Resolved]) -> None:
    is_uint8 = isinstance(images, np.ndarray) and images.dtype == np.uint8
    require(is_uint8, "images must be a NumPy array of uint8 [N, H, W, 3]")
    right = images.ndim == 4 and images.shape[3] == 3 and images.size > 0
    if right and images.shape[1] != images.shape[2] and (multiple := least_side(networks)):
        right = images.shape[1] % multiple == images.shape[2] % multiple == 0
    else:
        right = right and images.shape[1:3] == (size, size)
    require(
        right,
        f"images must have shape [N, {size}, {size}, 3] for this network, or other sides that it "
        f"can halve and that differ, N at least 1, not {list(images.shape)}",
    )


def _check_labels(labels: np.ndarray | None, count: int, classes: int | None) -> None:
    if labels is None:
        require(classes is None, "labels: the network or the classifier needs one for each image")
        return
    found = np.asarray(labels)
    are_integers = found.shape == (count,) and found.dtype.kind in "iu"
    require(are_integers, f"labels must be {count} integers, one for each image")
    classes = NUM_CLASSES if classes is None else classes
    known = bool(((found >= 0) & (found < classes)).all())
    require(known, f"labels must be in 0 … {classes - 1}")
