"""The U-Net of guided-diffusion as one of diffusers and back: config, names and tensors.

diffusers' UNet2DModel has the same blocks under other names. What one has and the other has not
(see `unet_config` and `flags_of`) is refused; queries, keys and values are three layers there.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from esddpm_io.errors import UserError

from .flags import flag_defaults
from .gaussian_diffusion import MODEL_TIME_SPAN, get_named_beta_schedule
from .nn import NORM_GROUPS
from .script_util import NUM_CLASSES
from .settings.recognition import outline_of
from .unet import AttentionBlock, UNetModel

Tensors = dict[str, torch.Tensor]

# Arguments of UNet2DModel that stand for what guided-diffusion's U-Net always has.
_ALWAYS: dict[str, Any] = {
    "in_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": NORM_GROUPS,
    "attn_norm_num_groups": NORM_GROUPS,
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")


def unet_config(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the UNet2DModel that is equal to the U-Net of these flags.

    UserError with the reason if there is none.
    """
    model = outline_of("model", flags)
    assert isinstance(model, UNetModel)
    if model.widths[0] != model.model_channels:
        raise UserError(
            f"channel_mult begins with {model.channel_mult[0]}: diffusers embeds the time in as "
            "many numbers as the first level has channels, and this network in more"
        )
    attended = [2**i in model.attention_resolutions for i in range(len(model.widths))]
    updown = bool(flags["resblock_updown"])
    names = {True: ("AttnDownBlock2D", "AttnUpBlock2D")}
    names[False] = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    # The last level resamples nothing.
    plain = ("DownBlock2D", "UpBlock2D")
    types = [names[a] if a or updown else plain for a in attended]
    if not attended[-1]:
        types[-1] = (plain[0], types[-1][1])
    if not attended[0]:
        types[0] = (types[0][0], plain[1])
    resampling = "resnet" if updown else "conv"
    return {
        **_ALWAYS,
        "sample_size": flags["image_size"],
        "out_channels": model.out_channels,
        "block_out_channels": model.widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": [down for down, _ in types],
        "up_block_types": [up for _, up in reversed(types)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": _head_width(model),
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "num_class_embeds": model.num_classes,
        "dropout": float(flags["dropout"]),
    }


def _head_width(model: UNetModel) -> int | None:
    """Channels of every attention's heads; None for one head each, as diffusers has it."""
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    widths = {block.channels // block.num_heads for block in blocks}
    if len(widths) == 1:
        return widths.pop()
    heads = sorted({block.num_heads for block in blocks})
    if heads == [1]:
        return None
    raise UserError(
        f"its attentions have {' or '.join(map(str, heads))} heads of "
        f"{', '.join(map(str, sorted(widths)))} channels: diffusers gives all heads of a network "
        "the same width"
    )


def flags_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of the U-Net that is equal to the UNet2DModel of a config; UserError with the reason
    if there is none."""
    given = _with_defaults(config)
    widths, downs = given["block_out_channels"], given["down_block_types"]
    size, classes = given["sample_size"], given["num_class_embeds"]
    size = size if isinstance(size, int) else size[0]
    attended = [str(size // 2**i) for i, name in enumerate(downs) if name.startswith("Attn")]
    head = given["attention_head_dim"]
    flags = {
        **flag_defaults("model"),
        "image_size": size,
        "num_channels": widths[0],
        "num_res_blocks": given["layers_per_block"],
        "channel_mult": ",".join(f"{width / widths[0]:.12g}" for width in widths),
        "attention_resolutions": ",".join(attended),
        "num_heads": 1 if head is None else 4,
        "num_head_channels": -1 if head is None else head,
        "class_cond": classes is not None,
        "learn_sigma": given["out_channels"] == 6,
        "use_scale_shift_norm": given["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": given["downsample_type"] == "resnet",
        "dropout": given["dropout"],
    }
    if classes not in (None, NUM_CLASSES):
        flags["num_classes"] = classes
    try:
        expected = unet_config(flags)
    except ValueError as error:
        raise UserError(f"no network of guided-diffusion is like this: {error}") from error
    for name, value in expected.items():
        if given[name] != value and name != "sample_size":
            raise UserError(f"{name} is {given[name]}: only {value} is as in guided-diffusion")
    return flags


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with diffusers' defaults, in the words of `unet_config` where some mean the same."""
    from diffusers import UNet2DModel

    with torch.device("meta"):
        given = dict(UNet2DModel.from_config(dict(config)).config)
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    if given["act_fn"] == "swish":
        given["act_fn"] = "silu"
    if given["attn_norm_num_groups"] is None and given["resnet_time_scale_shift"] == "default":
        given["attn_norm_num_groups"] = given["norm_num_groups"]
    for names, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        if given[names][-1].startswith("Resnet"):
            given[names][-1] = plain
    return given


def scheduler_config(process: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the DDPMScheduler of these flags; UserError with the reason if there is none."""
    steps, schedule = int(process["diffusion_steps"]), str(process["noise_schedule"])
    if process["rescale_timesteps"] and steps != MODEL_TIME_SPAN:
        raise UserError(f"rescale_timesteps with {steps} steps: diffusers does not scale the time")
    name, *numbers = schedule.split()
    config: dict[str, Any] = {
        "num_train_timesteps": steps,
        "prediction_type": "sample" if process["predict_xstart"] else "epsilon",
        "variance_type": "fixed_small" if process.get("sigma_small") else "fixed_large",
    }
    if process["learn_sigma"]:
        config["variance_type"] = "learned_range"
    if name == "cosine":
        return {**config, "beta_schedule": "squaredcos_cap_v2"}
    betas = get_named_beta_schedule(schedule, steps)
    if name == "betas":
        return {**config, "trained_betas": betas.tolist()}
    first, last = map(float, numbers or betas[[0, -1]])
    return {**config, "beta_schedule": name, "beta_start": first, "beta_end": last}


def without_variance(tensors: Tensors) -> Tensors:
    """The state dict of a U-Net of ours without the channels of its learned variance."""
    last = {f"out.2.{part}": tensors[f"out.2.{part}"][:3] for part in ("weight", "bias")}
    return {**tensors, **last}


def to_diffusers(tensors: Tensors, flags: Mapping[str, Any]) -> Tensors:
    """Our state dict of a U-Net with these flags under the names of diffusers."""
    found: Tensors = {}
    for ours, theirs in _layers(unet_config(flags)):
        for part in ("weight", "bias"):
            tensor = tensors.get(f"{ours}.{part}")
            if tensor is None:
                continue
            if ours.endswith(".qkv"):
                block = theirs.removesuffix("qkv")
                split = _split_qkv(tensor, flags)
                found |= {f"{block}{n}.{part}": t for n, t in zip(_QKV, split, strict=True)}
            else:
                flat = ours.endswith(".proj_out") and part == "weight"
                found[f"{theirs}.{part}"] = tensor.squeeze(-1) if flat else tensor
    return found


def from_diffusers(tensors: Tensors, flags: Mapping[str, Any]) -> Tensors:
    """The inverse of `to_diffusers`."""
    found: Tensors = {}
    for ours, theirs in _layers(unet_config(flags)):
        for part in ("weight", "bias"):
            if ours.endswith(".qkv"):
                block = theirs.removesuffix("qkv")
                parts = [tensors[f"{block}{name}.{part}"] for name in _QKV]
                tensor = _join_qkv(parts, flags)
            elif f"{theirs}.{part}" in tensors:
                tensor = tensors[f"{theirs}.{part}"]
            else:
                continue
            is_layer = ours.endswith((".qkv", ".proj_out")) and part == "weight"
            found[f"{ours}.{part}"] = tensor.unsqueeze(-1) if is_layer else tensor
    return found


def _heads(channels: int, flags: Mapping[str, Any]) -> int:
    width = flags["num_head_channels"]
    return flags["num_heads"] if width == -1 else channels // width


def _split_qkv(tensor: torch.Tensor, flags: Mapping[str, Any]) -> list[torch.Tensor]:
    """Weights [3 C, C, 1] or biases [3 C] of our three in one layer, as those of three layers."""
    channels = len(tensor) // 3
    heads, rest = _heads(channels, flags), [channels] if tensor.ndim > 1 else []
    new_order = flags["use_new_attention_order"]
    shape = (3, heads, -1, *rest) if new_order else (heads, 3, -1, *rest)
    each = tensor.reshape(shape).unbind(0 if new_order else 1)
    return [part.reshape(channels, *rest) for part in each]


def _join_qkv(parts: list[torch.Tensor], flags: Mapping[str, Any]) -> torch.Tensor:
    channels, *rest = parts[0].shape
    by_head = [part.reshape(_heads(channels, flags), -1, *rest) for part in parts]
    order = 0 if flags["use_new_attention_order"] else 1
    return torch.stack(by_head, dim=order).reshape(3 * channels, *rest)


def _layers(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name of every layer that has tensors, ours and diffusers'; some may not be there."""
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "label_emb", "class_embedding"
    yield "input_blocks.0.0", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    for i in range(2):
        yield from _inside(f"middle_block.{2 * i}", f"mid_block.resnets.{i}", _RESIDUAL)
    yield from _inside("middle_block.1", "mid_block.attentions.0", _ATTENTION)
    depth, levels = config["layers_per_block"], len(config["block_out_channels"])
    counter = itertools.count(1)
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(depth):
            yield from _pair(f"input_blocks.{next(counter)}", block, i, config, level)
        if level + 1 < levels:
            yield from _resampling(f"input_blocks.{next(counter)}.0", block, "down", config)
    counter = itertools.count()
    for up, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{up}"
        for i in range(depth + 1):
            ours = f"output_blocks.{next(counter)}"
            yield from _pair(ours, block, i, config, level)
        if level:
            place = 2 if _is_attended(config, level) else 1
            yield from _resampling(f"{ours}.{place}", block, "up", config)


def _is_attended(config: Mapping[str, Any], level: int) -> bool:
    return config["down_block_types"][level].startswith("Attn")


def _pair(
    ours: str, block: str, index: int, config: Mapping[str, Any], level: int
) -> Iterator[tuple[str, str]]:
    """A residual block, and its attention if the level has one."""
    yield from _inside(f"{ours}.0", f"{block}.resnets.{index}", _RESIDUAL)
    if _is_attended(config, level):
        yield from _inside(f"{ours}.1", f"{block}.attentions.{index}", _ATTENTION)


def _resampling(
    ours: str, block: str, way: str, config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    theirs = f"{block}.{way}samplers.0"
    if config[f"{way}sample_type"] == "resnet":
        yield from _inside(ours, theirs, _RESIDUAL)
    else:
        yield f"{ours}.{'op' if way == 'down' else 'conv'}", f"{theirs}.conv"


def _inside(ours: str, theirs: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for one, other in table.items():
        yield f"{ours}.{one}", f"{theirs}.{other}"
