"""The record of a sampling run: all that its samples depend on, typed and frozen.

It is made once from a command line, written as `settings.json` and read by every process of the
run. What it holds is checked when it is made; nobody after that looks for another value.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping

from esddpm_io.errors import UserError
from guided_diffusion.solvers import SOLVERS

if typing.TYPE_CHECKING:
    from guided_diffusion.respace import SpacedDiffusion

Value = bool | int | float | str
SAMPLERS = ("ddpm", "ddim", *SOLVERS)
LARGEST_SEED = 2**64 - 1
VARIANCES = ("learned", "posterior")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Flags of a network that its samples do not depend on, and what they are while it samples.
WITHOUT_EFFECT: dict[str, Value] = {"use_checkpoint": False, "dropout": 0.0}
# Flags of the diffusion process that only training or the chain's choice of steps knows.
_OF_TRAINING = ("use_kl", "rescale_learned_sigmas")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its checkpoint.

    kind: "model", "sr" (super-resolution) or "classifier"; flags: all that build it, with its
    precision; sha256: of the tensors' names, shapes and bytes, so the same under any file name.
    """

    kind: str
    flags: dict[str, Value]
    path: str
    sha256: str

    @property
    def precision(self) -> str:
        """One of PRECISIONS: `flags` have it where the published flag cannot say it."""
        name = "classifier_use_fp16" if self.kind == "classifier" else "use_fp16"
        return str(self.flags.get("precision", "float16" if self.flags[name] else "float32"))


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier guidance: the classifier and the factor of its gradient (guidance, alg. 1)."""

    classifier: Network
    scale: float


@dataclasses.dataclass(frozen=True)
class StartSettings:
    """What samples start from.

    kind: "images" (a generator's, diffused to T'), "generator" (the same, made when needed),
    "noise", or "enlarge" (noise, with small images beside it). path, contents: where images are,
    and a hash of their pixels and labels; of a generator its target, and a hash of its code and
    tensors. count: how many images there are. num_classes: of the labels, None where none are used.
    shape: height and width where they differ.
    """

    kind: str
    path: str | None = None
    contents: str | None = None
    count: int | None = None
    num_classes: int | None = None
    shape: tuple[int, ...] | None = None

    @property
    def has_images(self) -> bool:
        """Whether sampling starts from images at T'."""
        return self.kind in ("images", "generator")


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """The reverse loop.

    name: one of SAMPLERS; timesteps: the original timesteps of all network evaluations, in their
    order; steps: their number, or None where sampling starts from pure noise. respacing: the chain
    whose last steps they are, as --timestep_respacing writes it; None where T' and their number
    were given by name. eta: share of DDPM's noise in DDIM, of the SDE's noise in dpmpp_2m_sde.
    variance: of a DDPM step, one of VARIANCES; "learned" is the network's own, if it has one.
    """

    name: str
    respacing: str | None
    steps: int | None
    timesteps: tuple[int, ...]
    eta: float
    clip_denoised: bool
    variance: str = "learned"


@dataclasses.dataclass(frozen=True)
class Run:
    """One sampling run. `process`: flags of the diffusion process, the chain left out.

    num_samples is how many are wanted: a sample depends on the rest of the record and its own
    index, so a run can be made longer. origins: where each flag's value came from. preset: the
    name or path of the data set's preset, if one was used.
    """

    network: Network
    process: dict[str, Value]
    guidance: Guidance | None
    start: StartSettings
    sampler: SamplerSettings
    seed: int
    num_samples: int
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    preset: str | None = None

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of a sample, pixels."""
        if self.start.shape is not None:
            height, width = self.start.shape
            return height, width
        name = "large_size" if self.network.kind == "sr" else "image_size"
        return (int(self.network.flags[name]),) * 2

    @property
    def takes_labels(self) -> bool:
        """Whether the network or the classifier is told a label."""
        return bool(self.network.flags["class_cond"]) or self.guidance is not None

    def dependences(self) -> dict[str, object]:
        """All that a sample depends on beside its index, under the names of the flags."""
        network = _with_effect(self.network.flags)
        values: dict[str, object] = {
            **network,
            **{k: v for k, v in self.process.items() if k not in _OF_TRAINING},
            "checkpoint": self.network.sha256,
            "start": self.start.kind,
            "start_images": self.start.contents,
            "classes": self.start.num_classes,
            "sampler": self.sampler.name,
            "timestep_respacing": self.sampler.respacing,
            "denoise_steps": self.sampler.steps,
            "timesteps": list(self.sampler.timesteps),
            "eta": self.sampler.eta,
            "clip_denoised": self.sampler.clip_denoised,
            "seed": self.seed,
            "classifier_scale": 0.0,
        }
        if self.guidance is not None:
            values |= _with_effect(self.guidance.classifier.flags)
            values["classifier"] = self.guidance.classifier.sha256
            values["classifier_scale"] = self.guidance.scale
        # Newer than folders of samples that are still of use: named only where it is chosen.
        if self.sampler.variance != "learned":
            values["variance"] = self.sampler.variance
        return values

    @property
    def identity(self) -> str:
        """A hash of `dependences`: samples with the same one may be put together."""
        text = json.dumps(self.dependences(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, there: "Run") -> list[str]:
        """What `there` has otherwise, a phrase for each flag."""
        ours, theirs = self.dependences(), there.dependences()
        return [
            f"{name} is {theirs.get(name)} there, {ours.get(name)} now"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]

    def to_json(self) -> dict[str, object]:
        """The record as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: object, *, where: str) -> "Run":
        """The record that `to_json` made; UserError, naming the file `where`, if it is none."""
        try:
            run = _build(cls, content)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is damaged or of another version: {error}") from error
        assert isinstance(run, Run)
        return run


def diffusion_of(run: Run) -> "SpacedDiffusion":
    """The respaced diffusion process of a run."""
    if run.sampler.respacing is not None:
        return diffusion_from(run.process, run.sampler.respacing)
    return diffusion_from(run.process, "").keeping(run.sampler.timesteps)


def diffusion_from(process: Mapping[str, Value], respacing: str) -> "SpacedDiffusion":
    """The diffusion process of these flags, of which `respacing` keeps some steps."""
    # Brings torch, which gathering and status do without.
    from guided_diffusion.script_util import create_gaussian_diffusion

    flags: dict[str, typing.Any] = {**process, "timestep_respacing": respacing}
    return create_gaussian_diffusion(steps=flags.pop("diffusion_steps"), **flags)


def _with_effect(flags: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in flags.items() if name not in WITHOUT_EFFECT}


def _build(kind: typing.Any, value: object) -> object:
    """`value`, plain from JSON, as the annotation `kind` says; TypeError if it does not fit."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} must be an object, not {value!r}")
        hints = typing.get_type_hints(kind)
        if missing := _needed(kind) - value.keys():
            raise TypeError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
        fields = {name: _build(hints[name], value[name]) for name in hints.keys() & value.keys()}
        return kind(**fields)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        plain = [option for option in arguments if option is not type(None)]
        return _build(plain[0], value) if len(plain) == 1 else _checked(value, tuple(plain))
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(name): _build(arguments[1], item) for name, item in value.items()}
    return _checked(value, (kind, int) if kind is float else (kind,))


def _needed(kind: typing.Any) -> set[str]:
    """Fields that have no default; the others are newer than some files."""
    none = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is none and field.default_factory is none
    }


def _checked(value: object, kinds: tuple[typing.Any, ...]) -> object:
    plain = tuple(kind for kind in kinds if isinstance(kind, type))
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        raise TypeError(f"{value!r} is not of type {' or '.join(kind.__name__ for kind in plain)}")
    return value
