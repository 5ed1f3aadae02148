"""The flags of a network, from everything that says something of them.

`defaults < preset < shapes and published names < sidecar of the checkpoint < typed`: a later layer
wins, and every value keeps where it came from. What two sources that both mean it say differently
is an error, unless --override_checkpoint_flags lets the user's value win; what none says and
shapes do not show is told, or refused where a preset could have said it.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch

from esddpm_io.errors import UserError
from esddpm_io.files import exists
from esddpm_io.hub import fetched
from guided_diffusion.checkpoints import check_fit, read_checkpoint, read_sidecar
from guided_diffusion.diffusers_folder import KIND as DIFFUSERS
from guided_diffusion.flags import diffusion_defaults, flag_defaults
from guided_diffusion.settings.layers import Layer, check_flags, require, resolve
from guided_diffusion.settings.presets import Preset
from guided_diffusion.settings.recognition import (
    TRACELESS,
    Recognised,
    identify,
    outline_of,
    own_classes,
)
from guided_diffusion.settings.record import Value

# Flags that say how a network is used and not what it is: typed ones differ from the sidecar's in
# peace, and typing them does not mean that the rest are to be the defaults.
FLAGS_OF_USE = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "classifier_use_fp16",
    "timestep_respacing",
    "rescale_learned_sigmas",
    "use_kl",
}
# Flags of the diffusion process; the last two are known of diffusers' schedulers alone.
_PROCESS = {*diffusion_defaults(), "sigma_small", "v_prediction"}
# How the origins of layers begin that were written with the network.
_WRITTEN = ("sidecar", "config")
OVERRIDE_FLAG = "override_checkpoint_flags"
# Of the flags that leave no trace, those that networks are really trained with other values of.
_MUST_BE_SAID = ("noise_schedule", "num_heads", "num_head_channels", "use_new_attention_order")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Flags of a network with its diffusion process, their origins, and remarks for the user.

    early_stop_steps: T' if the network was trained on timesteps below it only, else None.
    """

    kind: str
    path: str
    flags: dict[str, Value]
    origins: dict[str, str]
    remarks: list[str]
    early_stop_steps: int | None

    @property
    def network_flags(self) -> dict[str, Value]:
        """Those that build the network."""
        built = {name: value for name, value in self.flags.items() if name not in _PROCESS}
        if self.kind != "classifier":
            built["learn_sigma"] = self.flags["learn_sigma"]
        return built

    @property
    def process(self) -> dict[str, Value]:
        """Those of the diffusion process; the chain is the sampler's."""
        names = _PROCESS - {"timestep_respacing"}
        return {name: value for name, value in self.flags.items() if name in names}


def resolve_network(
    kind: str,
    path: str,
    *,
    flag: str,
    typed: Mapping[str, Value],
    preset: Preset | None = None,
    override: bool = False,
    images_size: int | None = None,
) -> Resolved:
    """All flags of the network of a `kind` whose checkpoint is at `path`.

    typed: what the user typed, by name. preset: of the driver, which then refuses what a preset
    could have said (without one, published commands that mean the defaults go on, and are told).
    images_size: of the start images, a guess where nothing else says it. Raises UserError, naming
    `flag`, for a file that is missing, no checkpoint, or does not fit the flags, and for sources
    that contradict each other.
    """
    require(bool(path), f"{flag}: name the checkpoint file")
    path = fetched(path, flag=flag)
    require(exists(path), f"{flag}: there is no file {path}")
    state_dict, sidecar = read_checkpoint(path, flag=flag), read_sidecar(path)
    if kind == "model" and sidecar is not None and sidecar["kind"] == DIFFUSERS:
        kind = DIFFUSERS
        _check_in_place(path, typed)
    defaults = flag_defaults(kind)
    user = Layer("typed", {name: value for name, value in typed.items() if name in defaults})
    said = _preset_layer(preset, kind, defaults) if preset else None
    if sidecar is not None:
        require(
            sidecar["kind"] == kind,
            f"{flag}: the sidecar of {path} says it is a {sidecar['kind']}, not a {kind}",
        )
        what = "config" if kind == DIFFUSERS else "sidecar"
        # The number of classes is the tensors' to say; conversions write it beside.
        known_flags = {"num_classes": 0, **defaults}
        check_flags(f"{flag}: the {what} of {path}", sidecar["flags"], known_flags)
        found, remarks = None, [f"{flag}: flags from the {what} of {path}"]
        told = {name: value for name, value in sidecar["flags"].items() if name in defaults}
        known = Layer(f"{what} of {os.path.basename(path)}", told)
    else:
        guesses = [user.values, said.values if said else {}]
        found = _recognise(state_dict, kind, guesses, images_size)
        known, remarks = _shapes_layer(found, user, flag, path)
    source = _Source(kind, path, flag, preset, override)
    below = [layer for layer in (said, known) if layer]
    if override and said and preset and preset.is_own:
        below.reverse()
    layers = [Layer("default", defaults), *below, user]
    _check_contradictions(source, known, user, said if preset and preset.is_own else None)
    if kind != DIFFUSERS:
        layers.append(Layer("shapes", own_classes(state_dict)))
    flags, origins = resolve(layers)
    check_fit(_build(kind, flags, origins), state_dict, path, flag=flag)
    if sidecar is None and kind != "classifier":
        remarks += _unsaid(source, flags, origins, found)
    if sidecar is not None and said:
        remarks += _overruled(flag, said, known, flags)
    trained = sidecar["early_stop_steps"] if sidecar is not None else None
    return Resolved(kind, path, _values(flags), origins, remarks, trained)


def _check_in_place(path: str, typed: Mapping[str, Value]) -> None:
    """UserError for typed flags of our networks that a folder of diffusers says in its own way."""
    ours = flag_defaults("model").keys() - flag_defaults(DIFFUSERS).keys() - FLAGS_OF_USE
    surplus = [f"--{name}" for name in typed if name in ours]
    require(
        not surplus,
        f"{', '.join(surplus)}: the folder {path} says what its network is: leave it out",
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """A checkpoint and who asks for it, for messages."""

    kind: str
    path: str
    flag: str
    preset: Preset | None
    override: bool


def _values(flags: Mapping[str, object]) -> dict[str, Value]:
    return {n: value for n, value in flags.items() if isinstance(value, (bool, int, float, str))}


def _preset_layer(preset: Preset, kind: str, defaults: Mapping[str, object]) -> Layer:
    flags = {**preset.model_flags, **preset.diffusion_flags}
    if kind == "classifier":
        size = {k: v for k, v in preset.model_flags.items() if k == "image_size"}
        flags = {**size, **preset.classifier_flags}
    return Layer(f"preset {preset.name}", {n: v for n, v in flags.items() if n in defaults})


def _recognise(
    state_dict: Mapping[str, torch.Tensor],
    kind: str,
    guesses: Sequence[Mapping[str, object]],
    images_size: int | None,
) -> Recognised | None:
    """What names and shapes tell; the size, where they leave it open, is the first guess that fits.

    A published file of these shapes goes before all guesses.
    """
    size_flag = "large_size" if kind == "sr" else "image_size"
    sizes = [guess.get(size_flag) for guess in guesses]
    sizes += [images_size, flag_defaults(kind)[size_flag]]
    found = identify(state_dict)
    if found is not None and not found.published:
        by_size = (identify(state_dict, size) for size in sizes if isinstance(size, int))
        found = next((sized for sized in by_size if sized is not None), found)
    return found if found is not None and found.kind == kind else None


def _shapes_layer(
    found: Recognised | None, user: Layer, flag: str, path: str
) -> tuple[Layer, list[str]]:
    """The layer of a bare file.

    A command that types what the network is means the defaults for the rest, as guided-diffusion's
    do: then a published checkpoint of the same shapes tells no more than shapes do.
    """
    if found is None:  # check_fit says what is wrong
        return Layer("", {}), []
    if not found.published:
        return Layer(f"shapes of {os.path.basename(path)}", found.shown), []
    like = " or ".join(found.published)
    if user.values.keys() <= FLAGS_OF_USE | {"image_size", "large_size", "small_size"}:
        remark = f"{flag}: {path} has the names and shapes of {like}: its flags"
        return Layer(f"published {found.published[0]}", found.flags), [remark]
    return Layer(f"shapes of {os.path.basename(path)}", found.shown), []


def _build(kind: str, flags: Mapping[str, object], origins: Mapping[str, str]) -> torch.nn.Module:
    """The network without memory for its weights; UserError for flags that none can have."""
    try:
        return outline_of(kind, flags)
    except ValueError as error:
        name = str(error).split()[0]
        dashes = "--" if origins.get(name) == "typed" else ""
        raise UserError(f"{dashes}{error} ({origins.get(name, 'of the network')})") from error


def _check_contradictions(source: _Source, known: Layer, user: Layer, own: Layer | None) -> None:
    """UserError where a checkpoint is known to be of other flags than the user says.

    A typed flag against the sidecar; a user's preset against a published file, in what leaves no
    trace. (A preset gives way to a sidecar, and what does not fit the shapes, check_fit names.)
    """
    said: dict[str, object] = {}
    if known.origin.startswith(_WRITTEN):
        said = {n: value for n, value in user.values.items() if n not in FLAGS_OF_USE}
    elif known.origin.startswith("published") and own:
        said = {n: value for n, value in own.values.items() if n in TRACELESS[source.kind]}
    for name, value in said.items():
        there = known.values.get(name, value)
        if not source.override and not _same(name, there, value):
            who = user.origin if known.origin.startswith(_WRITTEN) or own is None else own.origin
            dashes = "--" if who == user.origin else ""
            raise UserError(
                f"{dashes}{name} is {value} ({who}) but {there} ({known.origin}), for "
                f"{source.flag} {source.path}: leave it out, or say --{OVERRIDE_FLAG} True"
            )


def _same(name: str, one: object, other: object) -> bool:
    """Whether two values of a flag mean the same; sizes with attention may be in any order."""
    if name.endswith("attention_resolutions") and isinstance(one, str) and isinstance(other, str):
        return sorted(one.split(",")) == sorted(other.split(","))
    return one == other


def _overruled(flag: str, said: Layer, known: Layer, flags: Mapping[str, object]) -> list[str]:
    """Remarks on what a preset says otherwise than the sidecar that wins."""
    return [
        f"{flag}: {name} is {known.values[name]} ({known.origin}), not {value} ({said.origin})"
        for name, value in said.values.items()
        if name not in FLAGS_OF_USE
        and not _same(name, known.values.get(name, value), value)
        and flags[name] == known.values[name]
    ]


def _unsaid(
    source: _Source,
    flags: Mapping[str, object],
    origins: Mapping[str, str],
    found: Recognised | None,
) -> list[str]:
    """Remarks on flags that leave no trace in a bare file and that nobody has said.

    Of a driver's preset that is not the checkpoint's own they are asked for.
    """
    open_flags = [name for name in TRACELESS[source.kind] if origins.get(name) == "default"]
    if "num_heads" not in open_flags or "num_head_channels" not in open_flags:
        open_flags = [n for n in open_flags if n not in ("num_heads", "num_head_channels")]
    preset = source.preset
    if preset is not None and not preset.is_own and source.path != preset.checkpoint:
        # A shipped preset speaks of its own checkpoint, not of one that takes its place.
        open_flags = [n for n in _MUST_BE_SAID if not origins.get(n, "").startswith("published")]
    needed = [name for name in open_flags if name in _MUST_BE_SAID and name in flags]
    if preset is not None and needed and not (found and found.published):
        lines = "; ".join(f"{name} = {_toml(flags[name])}" for name in needed)
        raise UserError(
            f"{source.flag}: names and shapes of {source.path} do not tell {', '.join(needed)}. "
            f"Say what it was trained with, in a preset of your own (--dataset FILE.toml, tables "
            f"model_flags and diffusion_flags, for example {lines}) or in a sidecar .json beside "
            "it (docs/checkpoints.md)"
        )
    if not open_flags:
        return []
    assumed = ", ".join(f"{name} {flags[name]}" for name in open_flags)
    remark = (
        f"{source.flag}: names and shapes of {source.path} do not tell all flags; assumed by "
        f"default: {assumed}"
    )
    if found and found.published:
        remark += f" (it has the shapes of {' or '.join(found.published)})"
    return [remark]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def check_same_noise(model: Resolved, classifier: Resolved) -> None:
    """UserError for a classifier that is known to have been trained on other noise."""
    for name in ("noise_schedule", "diffusion_steps"):
        trained, origin = classifier.flags[name], classifier.origins[name]
        require(
            # A published classifier's own file does not tell; its sidecar, if there is one, does.
            not origin.startswith(_WRITTEN) or trained == model.flags[name],
            f"--classifier_path: {classifier.path} was trained with {name} {trained}, the "
            f"diffusion model has {name} {model.flags[name]}: guidance needs a classifier of the "
            "same noise",
        )
