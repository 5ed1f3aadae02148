"""What a command asks for, held against its files: a `Request` in, the record of the run out."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esddpm_io.errors import UserError
from esddpm_io.files import absolute, is_blob, join
from esddpm_io.images import noted_fingerprint
from guided_diffusion.checkpoints import fingerprint, read_checkpoint
from guided_diffusion.commands.sampler_flags import OWN_ETA, WITH_ETA
from guided_diffusion.sampling.chunks import IMAGES_FILE
from guided_diffusion.sampling.generators import full_target
from guided_diffusion.sampling.sampler import choose_device
from guided_diffusion.sampling.sources import (
    GeneratorImages,
    ImagesToEnlarge,
    Source,
    open_generator,
    open_generator_images,
    open_images_to_enlarge,
    open_source,
)
from guided_diffusion.script_util import NUM_CLASSES, classifier_defaults
from guided_diffusion.settings.layers import require
from guided_diffusion.settings.presets import Preset
from guided_diffusion.settings.recognition import outline_of
from guided_diffusion.settings.record import (
    LARGEST_SEED,
    SAMPLERS,
    Guidance,
    Network,
    Run,
    SamplerSettings,
    StartSettings,
    Value,
    diffusion_from,
)
from guided_diffusion.settings.resolver import Resolved, check_same_noise, resolve_network
from guided_diffusion.solvers import SOLVERS, evaluation_timesteps


@dataclasses.dataclass(frozen=True)
class Request:
    """A run as flags say it; `names` are what the user calls the flags where that differs.

    kind: "model", or "sr" for super-resolution. typed: flags of networks and process that were
    typed. steps: how many steps of the chain are taken, None for all of them from noise. Or, with
    `sampler` (one of SAMPLERS), t_prime is where sampling starts (None: from noise), steps how many
    times the network is evaluated, and spacing where. images: the start images' path, or the images
    to enlarge; or generator: the target of what makes start images, on the device. num_samples: how
    many from noise or of the generator. limit: only the first of the start images (0: all). eta and
    clip_denoised None: the sampler's own (a solver that starts from T' does not clip:
    docs/samplers.md says why). variance: of DDPM's steps, one of VARIANCES. precision: one of
    PRECISIONS, None for what flags say.
    """

    kind: str
    model_path: str
    typed: Mapping[str, Value]
    respacing: str
    steps: int | None
    use_ddim: bool = False
    sampler: str | None = None
    t_prime: int | None = None
    spacing: str = "uniform"
    eta: float | None = None
    clip_denoised: bool | None = None
    variance: str = "learned"
    seed: int = 0
    images: str = ""
    generator: str = ""
    device: str = dataclasses.field(default="", repr=False)
    num_samples: int = 0
    limit: int = 0
    classifier_path: str = ""
    classifier_scale: float = 0.0
    preset: Preset | None = None
    override: bool = False
    precision: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def from_noise(self) -> bool:
        """Whether there are no images to start from."""
        return self.steps is None if self.sampler is None else self.t_prime is None

    def flag(self, name: str) -> str:
        """The flag of this name, as the user types it."""
        return f"--{self.names.get(name, name)}"


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """The record of a run, the images that it starts from, and remarks for the user.

    highest_t_prime: the largest T' that the networks were trained for.
    """

    run: Run
    source: Source
    remarks: list[str]
    highest_t_prime: int


class ReadNetworks:
    """Networks held against their files, each read once for all requests of one command."""

    def __init__(self) -> None:
        self._resolved: dict[tuple, Resolved] = {}
        self._hashes: dict[str, str] = {}

    def resolve(self, kind: str, path: str, **how: Any) -> Resolved:
        """`resolve_network`; the same keywords give the same answer."""
        key = (kind, path, how["images_size"], repr(sorted(how["typed"].items())))
        if key not in self._resolved:
            self._resolved[key] = resolve_network(kind, path, **how)
        return self._resolved[key]

    def record(self, network: Resolved, flag: str, precision: str | None) -> Network:
        """The record of a network; the hash of its tensors is taken once.

        precision: what flags have no value for, so that other runs keep the identity they had.
        """
        if network.path not in self._hashes:
            self._hashes[network.path] = fingerprint(read_checkpoint(network.path, flag=flag))
        flags = network.network_flags
        if precision in ("tf32", "bfloat16"):
            flags["precision"] = precision
        where, sha256 = absolute(network.path), self._hashes[network.path]
        return Network(network.kind, flags, where, sha256)


def resolve_run(
    request: Request, save_dir: str, networks: ReadNetworks | None = None
) -> ResolvedRun:
    """Check a request against its files; of the start images headers and labels are read.

    networks: those that earlier requests of the same command have read. What costs reading all
    start images is noted in `save_dir` for the next process. Raises UserError, naming the flag and
    the valid values, for all that could only fail later.
    """
    require(
        0 <= request.seed <= LARGEST_SEED,
        f"{request.flag('seed')} must be in 0 … {LARGEST_SEED}, not {request.seed}",
    )
    require(
        request.eta is None or 0 <= request.eta <= 1,
        f"{request.flag('eta')} must be in 0 … 1, not {request.eta}",
    )
    require(
        math.isfinite(request.classifier_scale),
        f"{request.flag('classifier_scale')} must be a finite number, not "
        f"{request.classifier_scale}",
    )
    require(
        request.limit >= 0,
        f"{request.flag('limit')} must be at least 1, or 0 for all generator images",
    )
    _check_apart(request, save_dir)
    read = networks or ReadNetworks()
    request = dataclasses.replace(request, typed=_with_precision(request))
    size = _size_of_images(request)
    model = read.resolve(
        request.kind,
        request.model_path,
        flag=request.flag("model_path"),
        typed=request.typed,
        preset=request.preset,
        override=request.override,
        images_size=size,
    )
    classifier = _resolve_classifier(request, model, read) if request.classifier_scale else None
    resolved = [network for network in (model, classifier) if network]
    sampler = sampler_of(request, resolved)
    start, source = _start(request, resolved, save_dir)
    run = Run(
        network=read.record(model, request.flag("model_path"), request.precision),
        process=model.process,
        guidance=_guidance(request, classifier, read),
        start=start,
        sampler=sampler,
        seed=request.seed,
        num_samples=len(source),
        origins=_origins(request, model, classifier),
        preset=request.preset.source if request.preset else None,
    )
    trained = [network.early_stop_steps for network in resolved if network.early_stop_steps]
    return ResolvedRun(
        run=run,
        source=source,
        remarks=[
            *(remark for network in resolved for remark in network.remarks),
            *_of_images(request, run),
        ],
        highest_t_prime=min([int(model.process["diffusion_steps"]), *trained]),
    )


def _check_apart(request: Request, save_dir: str) -> None:
    """UserError for an output folder in the one with the images: outputs would be images, too."""
    if request.images and os.path.isdir(request.images) and not is_blob(save_dir):
        images, output = Path(request.images).resolve(), Path(save_dir).resolve()
        flag = request.flag("base_samples" if request.kind == "sr" else "dataset_path")
        require(
            not output.is_relative_to(images),
            f"{flag}: the output folder {save_dir} is in {request.images}: "
            "what is written there would be taken for images; choose another",
        )


def _with_precision(request: Request) -> dict[str, Value]:
    """The typed flags, with --precision as the published flags say it; UserError if both differ."""
    typed = dict(request.typed)
    if request.precision is None:
        return typed
    for name in ("use_fp16", "classifier_use_fp16"):
        half = request.precision == "float16"
        require(
            typed.get(name, half) == half,
            f"--precision {request.precision} contradicts --{name} {typed.get(name)}: give one",
        )
        typed[name] = half
    return typed


def _origins(request: Request, model: Resolved, classifier: Resolved | None) -> dict[str, str]:
    """Of all flags; the chain is said beside those of the networks."""
    origins = {**(classifier.origins if classifier else {}), **model.origins}
    if request.precision is not None:
        origins["precision"] = "typed"
    return {name: origin for name, origin in origins.items() if name != "timestep_respacing"}


def _resolve_classifier(request: Request, model: Resolved, read: ReadNetworks) -> Resolved:
    known = classifier_defaults()
    typed = {name: value for name, value in request.typed.items() if name in known}
    classifier = read.resolve(
        "classifier",
        request.classifier_path,
        flag=request.flag("classifier_path"),
        typed={"image_size": model.flags["image_size"], **typed},
        preset=request.preset,
        override=request.override,
        images_size=None,
    )
    check_same_noise(model, classifier)
    return classifier


def classes_of(networks: Sequence[Resolved]) -> int | None:
    """How many labels all networks that take any know; None if none does."""
    told = [one for one in networks if one.kind == "classifier" or one.flags["class_cond"]]
    return min((int(one.flags.get("num_classes", NUM_CLASSES)) for one in told), default=None)


def network_of(network: Resolved, flag: str) -> Network:
    """The record of a network, with the hash of its tensors."""
    return ReadNetworks().record(network, flag, None)


def _guidance(request: Request, classifier: Resolved | None, read: ReadNetworks) -> Guidance | None:
    if classifier is None:
        return None
    record = read.record(classifier, request.flag("classifier_path"), request.precision)
    return Guidance(record, request.classifier_scale)


def sampler_of(request: Request, networks: list[Resolved]) -> SamplerSettings:
    """The chain, checked, with the original timesteps of its steps."""
    require(
        request.variance == "learned" or bool(networks[0].flags["learn_sigma"]),
        f"{request.flag('variance')} {request.variance}: the network learned no variance "
        "(learn_sigma is False); with --sigma_small True its steps have the posterior's",
    )
    if request.sampler is not None:
        return _sampler_by_name(request, networks)
    try:
        chain = diffusion_from(networks[0].process, request.respacing).timestep_map
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        origin = networks[0].origins.get(name, "typed")
        typed = origin == "typed" or name == "timestep_respacing"
        said = f"{request.flag(name)} {rest}" if typed else f"{name} {rest} ({origin})"
        raise UserError(said) from error
    steps_flag = request.flag("denoise_steps")
    steps = len(chain) if request.steps is None else request.steps
    require(
        1 <= steps <= len(chain),
        f"{steps_flag} must be in 1 … {len(chain)}, the length of the chain "
        f"({request.flag('timestep_respacing')} {request.respacing}), not {steps}",
    )
    timesteps = tuple(reversed(chain[:steps]))
    _check_trained(request, networks, timesteps, chain)
    eta = (request.eta or 0.0) if request.use_ddim else 1.0
    return SamplerSettings(
        name="ddim" if request.use_ddim else "ddpm",
        respacing=request.respacing,
        steps=request.steps,
        timesteps=timesteps,
        eta=eta,
        clip_denoised=request.clip_denoised is not False,
        variance="learned" if request.use_ddim else request.variance,
    )


def _sampler_by_name(request: Request, networks: list[Resolved]) -> SamplerSettings:
    """T', the number of evaluations and the sampler, checked, with the timesteps they mean."""
    assert request.sampler is not None
    require(
        request.sampler in SAMPLERS,
        f"{request.flag('sampler')} must be one of {', '.join(SAMPLERS)}, not {request.sampler}",
    )
    levels = diffusion_from(networks[0].process, "").alphas_cumprod
    t_prime = len(levels) if request.t_prime is None else request.t_prime
    require(request.steps is not None, f"{request.flag('steps')}: say how many evaluations")
    try:
        found = evaluation_timesteps(levels, t_prime, request.steps or 0, request.spacing)
    except ValueError as error:
        raise UserError(f"--{error}") from error  # begins with the flag's name
    timesteps = tuple(found)
    _check_trained(request, networks, timesteps, range(len(levels)))
    own, takes_eta = OWN_ETA[request.sampler], request.sampler in WITH_ETA
    own_clip = request.from_noise or request.sampler not in SOLVERS
    return SamplerSettings(
        name=request.sampler,
        respacing=None,
        steps=None if request.from_noise else len(timesteps),
        timesteps=timesteps,
        eta=request.eta if request.eta is not None and takes_eta else own,
        clip_denoised=own_clip if request.clip_denoised is None else request.clip_denoised,
        variance=request.variance if request.sampler == "ddpm" else "learned",
    )


def at_t_prime(run: Run, t_prime: int, steps: int, spacing: str = "uniform") -> SamplerSettings:
    """The run's sampler, started from another T' (see `evaluation_timesteps`)."""
    levels = diffusion_from(run.process, "").alphas_cumprod
    timesteps = tuple(evaluation_timesteps(levels, t_prime, steps, spacing))
    return dataclasses.replace(run.sampler, respacing=None, steps=steps, timesteps=timesteps)


def _check_trained(
    request: Request, networks: list[Resolved], timesteps: Sequence[int], chain: Sequence[int]
) -> None:
    """UserError if a network was trained on fewer timesteps than sampling starts from."""
    for network in networks:
        trained = network.early_stop_steps
        if trained is not None and timesteps[0] >= trained:
            most = sum(timestep < trained for timestep in chain)
            own = request.flag("denoise_steps" if request.sampler is None else "t_prime")
            flag = "--start_from_scratch" if request.from_noise else own
            raise UserError(
                f"{flag}: sampling would start at original timestep {timesteps[0]}, but "
                f"{network.path} was trained on timesteps below {trained} only; "
                f"{own} can be 1 … {most} here"
            )


def _size_of_images(request: Request) -> int | None:
    """Of square start images, a guess for the network's where nothing says it."""
    if request.kind == "sr" or request.from_noise:
        return None
    height, width = open_start(request).shape
    return height if height == width else None


def open_start(request: Request) -> GeneratorImages:
    """The start images of a request, of a file or made by its generator."""
    flag = request.flag("dataset_path")
    if not request.generator:
        return open_generator_images(request.images, request.limit, flag=flag)
    require(
        not request.images,
        f"--generator and {flag} exclude each other: give the function or the images",
    )
    target, count = full_target(request.generator), request.limit or request.num_samples
    return open_generator(target, count, request.seed, choose_device(request.device))


def least_side(networks: Sequence[Resolved]) -> int:
    """What height and width must be multiples of if they differ, or 0 if they may not.

    A U-Net of convolutions takes all that it can halve; attention as a classifier's last layer
    has weights for each place, and what halves diffusers' U-Nets is not known here.
    """
    multiples = []
    for network in networks:
        built = outline_of(network.kind, network.network_flags)
        fixed = getattr(built, "pool", None) == "attention"
        multiples.append(0 if fixed else getattr(built, "downsampling", 0))
    return max(multiples) if all(multiples) else 0


def _of_images(request: Request, run: Run) -> list[str]:
    """Remarks on images that are fewer than asked for, or of another shape than the network's."""
    remarks = []
    if run.num_samples < request.limit:
        flag = request.flag("limit")
        remarks.append(f"{flag} {request.limit}: there are only {run.num_samples} images")
    if run.start.shape is not None:
        height, width = run.image_shape
        size = run.network.flags["image_size"]
        remarks.append(f"the images are {width}x{height}; the network was made for {size}x{size}")
    return remarks


def _start(
    request: Request, networks: Sequence[Resolved], save_dir: str
) -> tuple[StartSettings, Source]:
    model = networks[0]
    num_classes = classes_of(networks)
    if request.kind != "sr" and request.from_noise:
        start = StartSettings("noise", num_classes=num_classes)
        return start, open_source(start, request.num_samples, request.seed)
    images: GeneratorImages | ImagesToEnlarge
    if request.kind == "sr":
        kind, size_flag, flag = "enlarge", "small_size", request.flag("base_samples")
        multiple = 0
        images = open_images_to_enlarge(request.images, request.num_samples, flag=flag)
    else:
        kind, size_flag = "generator" if request.generator else "images", "image_size"
        images = open_start(request)
        multiple = least_side(networks) if len({*images.shape}) > 1 else 0
    images.check(int(model.flags[size_flag]), size_flag, num_classes, multiple)
    contents = noted_fingerprint(images, join(save_dir, IMAGES_FILE))
    path = images.path if request.generator else absolute(images.path)
    shape = images.shape if multiple else None
    return StartSettings(kind, path, contents, images.available, num_classes, shape), images
