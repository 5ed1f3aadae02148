"""Which flags a network was built with, told from the names and shapes of its tensors."""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from guided_diffusion import script_util
from guided_diffusion.diffusers_network import DiffusersNetwork
from guided_diffusion.flags import flag_defaults
from guided_diffusion.script_util import create_network
from guided_diffusion.unet import EncoderUNetModel, UNetModel

_PUBLISHED = Path(__file__).parent / "published_models.toml"

Shapes = dict[str, tuple[int, ...]]

# Flags that leave no trace in names and shapes, by kind of network: only a published checkpoint
# of the same shapes or a sidecar can tell them.
_TRACELESS_PROCESS = ("noise_schedule", "diffusion_steps", "rescale_timesteps", "predict_xstart")
TRACELESS = {
    "model": ("num_heads", "num_head_channels", "use_new_attention_order", *_TRACELESS_PROCESS),
    "sr": ("small_size", "num_heads", "num_head_channels", *_TRACELESS_PROCESS),
    "classifier": _TRACELESS_PROCESS,
}


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What a state dict is.

    `kind` is "model", "classifier" or "sr"; `shown` are flags that build these very names and
    shapes; `flags` are the same with, if a published checkpoint has these shapes, all flags of it;
    `published` names such checkpoints; `open_flags` are flags that matter and cannot be told.
    """

    kind: str
    shown: Mapping[str, object]
    flags: Mapping[str, object]
    published: tuple[str, ...] = ()
    open_flags: tuple[str, ...] = ()

    def command_line(self) -> str:
        """The flags that differ from the defaults, as a command line takes them."""
        defaults = flag_defaults(self.kind)
        return " ".join(
            f"--{name} {value}"
            for name, value in self.flags.items()
            if value != defaults.get(name, value)  # num_classes is no flag
        )


def identify(
    state_dict: Mapping[str, torch.Tensor], image_size: int | None = None
) -> Recognised | None:
    """Recognise a network from its state dict; None if no flags build it.

    Shapes do not always tell the image size (a U-Net with multipliers 1,2 is the default of both 8
    and 16): a published checkpoint of the same shapes decides, or `image_size` if it is given, or
    else image_size and attention_resolutions are among the open flags.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    classes = own_classes(state_dict)
    fitting = [
        (kind, flags | classes)
        for kind, flags in _candidates(shapes, image_size)
        if _builds(kind, flags | classes, shapes)
    ]
    if not fitting:
        return None
    for kind, flags in fitting:
        names = _published_like(kind, flags)
        if names:
            return Recognised(kind, flags, _published()[names[0]]["flags"], names)
    kind, flags = fitting[0]
    sized = ["large_size" if kind == "sr" else "image_size"]
    sized += [name for name in flags if name.endswith("attention_resolutions")]
    undecided = sized if len({f[sized[0]] for _, f in fitting}) > 1 else []
    shown = {name: value for name, value in flags.items() if name not in undecided}
    return Recognised(kind, shown, shown, open_flags=(*undecided, *TRACELESS[kind]))


def own_classes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """`num_classes` of a network of ours that knows others than NUM_CLASSES, else nothing.

    No flag of the published commands says it: people edit the constant.
    """
    # Of a U-Net, or of a classifier's last layer by its pool; other layers have lower numbers.
    names = ("label_emb.weight", "out.2.c_proj.bias", "out.3.bias", "out.2.bias")
    is_unet = any(name.startswith("output_blocks.") for name in state_dict)
    found = [state_dict[name] for name in names[: 1 if is_unet else None] if name in state_dict]
    count = len(found[0]) if found else script_util.NUM_CLASSES
    return {} if count == script_util.NUM_CLASSES else {"num_classes": count}


@functools.cache
def published_flags() -> dict[str, dict]:
    """By file name: `kind`, and the `flags` that its documentation gives it."""
    return tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))


@functools.cache
def _published() -> dict[str, dict]:
    """The same with the defaults filled in."""
    return {
        name: {**entry, "flags": {**flag_defaults(entry["kind"]), **entry["flags"]}}
        for name, entry in published_flags().items()
    }


def _published_like(kind: str, flags: Mapping[str, object]) -> tuple[str, ...]:
    """Published checkpoints that agree with `flags` in all that names and shapes show."""
    return tuple(
        name
        for name, entry in _published().items()
        if entry["kind"] == kind and all(entry["flags"].get(key) == flags[key] for key in flags)
    )


def _builds(kind: str, flags: Mapping[str, object], shapes: Shapes) -> bool:
    """Whether a network made with `flags` has exactly these names and shapes."""
    try:
        network = outline_of(kind, {**flag_defaults(kind), **flags})
    except ValueError:
        return False
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == shapes


_DRAWING = (
    *(torch.Tensor.uniform_, torch.Tensor.normal_),
    *(torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_),
)


class _Uninitialised(TorchFunctionMode):
    """Leaves out drawing weights: on tensors without memory that would load torch's compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _DRAWING:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def outline_of(
    kind: str, flags: Mapping[str, object]
) -> UNetModel | EncoderUNetModel | DiffusersNetwork:
    """The network of `create_network` without memory for its weights: names and shapes alone."""
    with torch.device("meta"), _Uninitialised():
        return create_network(kind, flags)


def _candidates(shapes: Shapes, image_size: int | None) -> Iterator[tuple[str, dict[str, object]]]:
    """Kinds and flags that may build `shapes`; `_builds` has the last word."""
    if not {"time_embed.0.weight", "input_blocks.0.0.weight"} <= shapes.keys():
        return
    if _count(shapes, "output_blocks"):
        if shapes["input_blocks.0.0.weight"][1] == 6:
            yield from _super_resolution(shapes, image_size)
        else:
            yield from _model(shapes, image_size)
    else:
        yield from _classifier(shapes, image_size)


def _model(shapes: Shapes, image_size: int | None) -> Iterator[tuple[str, dict[str, object]]]:
    encoder = _Encoder.of_unet(shapes)
    sizes = [size for size, mult in script_util.CHANNEL_MULT.items() if mult == encoder.mult]
    for size in [image_size] if image_size else sizes or list(script_util.CHANNEL_MULT):
        # The multipliers are named only where they are not the default of the size.
        text = "" if size in sizes else ",".join(f"{mult:g}" for mult in encoder.mult)
        yield (
            "model",
            {
                "image_size": size,
                **_unet_flags(shapes, encoder, size),
                "channel_mult": text,
            },
        )


def _super_resolution(
    shapes: Shapes, image_size: int | None
) -> Iterator[tuple[str, dict[str, object]]]:
    encoder = _Encoder.of_unet(shapes)
    for size, mult in script_util.SUPER_RES_CHANNEL_MULT.items():
        if mult == encoder.mult and image_size in (None, size):
            yield "sr", {"large_size": size, **_unet_flags(shapes, encoder, size)}


def _unet_flags(shapes: Shapes, encoder: "_Encoder", size: int) -> dict[str, object]:
    return {
        "num_channels": encoder.channels,
        "num_res_blocks": encoder.depth,
        "attention_resolutions": encoder.attention_resolutions(size),
        "class_cond": "label_emb.weight" in shapes,
        "learn_sigma": shapes.get("out.2.weight", (0,))[0] == 6,
        "use_scale_shift_norm": encoder.scale_shift,
        "resblock_updown": encoder.resblock_updown,
    }


def _classifier(shapes: Shapes, image_size: int | None) -> Iterator[tuple[str, dict[str, object]]]:
    if "out.2.positional_embedding" in shapes:
        pool = "attention"
    elif "out.2.weight" in shapes:
        pool = "spatial"
    else:
        pool = "adaptive" if len(shapes.get("out.3.weight", ())) == 4 else "spatial_v2"
    blocks = _count(shapes, "input_blocks")
    for size, mult in script_util.CHANNEL_MULT.items():
        # A level has `depth` blocks and, but for the last, a step down; then there is the stem.
        depth, rest = divmod(blocks - len(mult), len(mult))
        if rest or depth < 1 or image_size not in (None, size):
            continue
        encoder = _Encoder(shapes, len(mult), depth)
        yield (
            "classifier",
            {
                "image_size": size,
                "classifier_width": encoder.channels,
                "classifier_depth": depth,
                "classifier_attention_resolutions": encoder.attention_resolutions(size),
                "classifier_use_scale_shift_norm": encoder.scale_shift,
                "classifier_resblock_updown": encoder.resblock_updown,
                "classifier_pool": pool,
            },
        )


class _Encoder:
    """What the input blocks tell, given their number of levels and of residual blocks in each."""

    def __init__(self, shapes: Shapes, levels: int, depth: int):
        self.depth = depth
        self.channels = shapes["time_embed.0.weight"][1]
        # Block 0 is the stem; each level then has `depth` residual blocks and a step down.
        firsts = [1 + level * (depth + 1) for level in range(levels)]
        convolutions = [shapes.get(f"input_blocks.{i}.0.out_layers.3.weight", (0,)) for i in firsts]
        self.mult = tuple(shape[0] / self.channels for shape in convolutions)
        self._factors = [
            2**level for level, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in shapes
        ]
        # Scale and shift take two numbers a channel from the embedding.
        embedding = shapes.get("input_blocks.1.0.emb_layers.1.weight", (0,))
        self.scale_shift = embedding[0] == 2 * convolutions[0][0]
        # With one level nothing is resampled, and the flag's default is as good as the other value.
        self.resblock_updown = levels > 1 and f"input_blocks.{depth + 1}.0.op.weight" not in shapes

    @classmethod
    def of_unet(cls, shapes: Shapes) -> "_Encoder":
        """Levels and depth are told by where the decoder steps up: its last layer of a level."""
        blocks = _count(shapes, "output_blocks")
        ups = [
            i
            for i in range(blocks)
            for layer in (1, 2)
            if f"output_blocks.{i}.{layer}.conv.weight" in shapes
            or f"output_blocks.{i}.{layer}.in_layers.2.weight" in shapes
        ]
        per_level = ups[0] + 1 if ups else blocks
        return cls(shapes, blocks // per_level, per_level - 1)

    def attention_resolutions(self, size: int) -> str:
        """The image sizes that have attention, as the flag lists them."""
        return ",".join(str(size // factor) for factor in self._factors)


def _count(shapes: Shapes, blocks: str) -> int:
    """How many blocks there are called `blocks`.0, `blocks`.1, …"""
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})
