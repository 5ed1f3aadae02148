"""Defaults, constructors and the argparse bridge that all command lines share."""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping

from . import gaussian_diffusion as gd
from .diffusers_network import DiffusersNetwork, create_diffusers
from .flag_help import FLAG_HELP
from .network_flags import check_classifier, check_unet, plan_levels
from .respace import SpacedDiffusion, space_timesteps
from .unet import POOLS, EncoderUNetModel, SuperResModel, UNetModel

# Classes of ImageNet: the width of the label table of every class-conditional checkpoint.
NUM_CLASSES = 1000

# Width multipliers of the levels when --channel_mult is empty, by image size. 64 and above are
# those of the published checkpoints.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2),
    16: (1, 2),
    8: (1, 2),
}
# The published 512 upsampler has the levels of the 256 models.
SUPER_RES_CHANNEL_MULT = {**CHANNEL_MULT, 512: CHANNEL_MULT[256]}
# Channels of an attention head of the classifier, as published.
CLASSIFIER_HEAD_CHANNELS = 64
# The linear schedule of N steps ends at beta = 20 / N, which must stay below 1.
FEWEST_LINEAR_STEPS = 21


def diffusion_defaults() -> dict:
    """Flags of the diffusion process and their defaults."""
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def classifier_defaults() -> dict:
    """Flags of the classifier and their defaults."""
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }


def model_and_diffusion_defaults() -> dict:
    """Flags of an image model with its diffusion process, and their defaults."""
    return dict(
        image_size=64,
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        num_head_channels=-1,
        attention_resolutions="16,8",
        channel_mult="",
        dropout=0.0,
        class_cond=False,
        use_checkpoint=False,
        use_scale_shift_norm=True,
        resblock_updown=False,
        use_fp16=False,
        use_new_attention_order=False,
        **diffusion_defaults(),
    )


def classifier_and_diffusion_defaults() -> dict:
    """Flags of a classifier with its diffusion process, and their defaults."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict:
    """Flags of a super-resolution model with its diffusion process, and their defaults."""
    absent = ("image_size", "channel_mult", "use_new_attention_order")
    flags = {k: v for k, v in model_and_diffusion_defaults().items() if k not in absent}
    return {"large_size": 256, "small_size": 64, **flags}


def create_model_and_diffusion(**flags) -> tuple[UNetModel, SpacedDiffusion]:
    """An image model and its diffusion process; `flags` are all of model_and_diffusion_defaults.

    The other `create_*_and_diffusion` likewise take all flags of their defaults by name, and
    raise TypeError for a missing or unknown one.
    """
    model_flags, diffusion = _split_flags(flags, model_and_diffusion_defaults())
    return create_model(**model_flags, learn_sigma=flags["learn_sigma"]), diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """A U-Net for RGB images; `attention_resolutions` is a comma list of image sizes.

    This and the other constructors raise ValueError, beginning with the argument's name, for
    values that no network can have.
    """
    levels = plan_levels(
        size=("image_size", image_size),
        width=("num_channels", num_channels),
        attention=("attention_resolutions", attention_resolutions),
        table=CHANNEL_MULT,
        channel_mult=channel_mult,
    )
    check_unet(
        levels,
        num_res_blocks=num_res_blocks,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        dropout=dropout,
    )
    return UNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=levels.attention_factors,
        dropout=dropout,
        channel_mult=levels.mult,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        use_fp16=use_fp16,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )


def create_classifier_and_diffusion(**flags) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier of noisy images and the diffusion process whose noise it learns."""
    classifier_flags, diffusion = _split_flags(flags, classifier_and_diffusion_defaults())
    return create_classifier(**classifier_flags), diffusion


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
) -> EncoderUNetModel:
    """The encoder that gives logits of NUM_CLASSES classes for a noisy RGB image."""
    levels = plan_levels(
        size=("image_size", image_size),
        width=("classifier_width", classifier_width),
        attention=("classifier_attention_resolutions", classifier_attention_resolutions),
        table=CHANNEL_MULT,
    )
    check_classifier(
        levels,
        width=classifier_width,
        depth=classifier_depth,
        head_channels=CLASSIFIER_HEAD_CHANNELS,
        pool=classifier_pool,
        pools=POOLS,
    )
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=NUM_CLASSES,
        num_res_blocks=classifier_depth,
        attention_resolutions=levels.attention_factors,
        channel_mult=levels.mult,
        use_fp16=classifier_use_fp16,
        num_head_channels=CLASSIFIER_HEAD_CHANNELS,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def sr_create_model_and_diffusion(**flags) -> tuple[SuperResModel, SpacedDiffusion]:
    """A super-resolution model and its process, from `sr_model_and_diffusion_defaults`."""
    model_flags, diffusion = _split_flags(flags, sr_model_and_diffusion_defaults())
    return sr_create_model(**model_flags, learn_sigma=flags["learn_sigma"]), diffusion


def _split_flags(flags: dict, defaults: dict) -> tuple[dict, SpacedDiffusion]:
    """Check `flags` against `defaults`; return those of the network, and the diffusion process."""
    missing, unknown = defaults.keys() - flags.keys(), flags.keys() - defaults.keys()
    if missing or unknown:
        raise TypeError(f"missing flags: {sorted(missing)}; unknown flags: {sorted(unknown)}")
    diffusion_flags = args_to_dict(argparse.Namespace(**flags), diffusion_defaults())
    steps = diffusion_flags.pop("diffusion_steps")
    network_flags = {k: v for k, v in flags.items() if k not in diffusion_defaults()}
    return network_flags, create_gaussian_diffusion(steps=steps, **diffusion_flags)


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
) -> SuperResModel:
    """A U-Net that enlarges RGB images from `small_size` to `large_size`.

    `small_size` does not change the network: its low-resolution input is resized in `forward`.
    """
    levels = plan_levels(
        size=("large_size", large_size),
        width=("num_channels", num_channels),
        attention=("attention_resolutions", attention_resolutions),
        table=SUPER_RES_CHANNEL_MULT,
    )
    check_unet(
        levels,
        num_res_blocks=num_res_blocks,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        dropout=dropout,
    )
    return SuperResModel(
        image_size=large_size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=levels.attention_factors,
        dropout=dropout,
        channel_mult=levels.mult,
        num_classes=NUM_CLASSES if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
    )


def diffusers_defaults() -> dict:
    """Flags of a network of diffusers with its process, and their defaults.

    unet: its config as JSON; num_classes: 0 for none; v_prediction: what `predict_xstart` is then
    made of; sigma_small: DDPM's steps have the posterior's variance.
    """
    return {
        "image_size": 64,
        "class_cond": False,
        "use_fp16": False,
        "unet": "",
        "num_classes": 0,
        "v_prediction": False,
        "sigma_small": False,
        **diffusion_defaults(),
    }


def flag_defaults(kind: str) -> dict:
    """All flags of a kind of network, its diffusion process included, and their defaults."""
    return {
        "diffusers": diffusers_defaults,
        "model": model_and_diffusion_defaults,
        "classifier": classifier_and_diffusion_defaults,
        "sr": sr_model_and_diffusion_defaults,
    }[kind]()


def create_network(
    kind: str, flags: Mapping[str, object]
) -> UNetModel | EncoderUNetModel | DiffusersNetwork:
    """A new network of a `kind`; of the `flags` those that its constructor takes are used.

    ValueError, beginning with the flag's name, for values that no network can have.
    """
    constructors: dict[str, Callable[..., UNetModel | EncoderUNetModel | DiffusersNetwork]] = {
        "diffusers": create_diffusers,
        "model": create_model,
        "classifier": create_classifier,
        "sr": sr_create_model,
    }
    create, known = constructors[kind], {**flag_defaults(kind), **flags}
    return create(**{name: known[name] for name in inspect.signature(create).parameters})


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """A diffusion process of `steps` steps, respaced if `timestep_respacing` is not empty.

    ValueError, beginning with the flag's name (diffusion_steps for `steps`), for what cannot be.
    """
    fewest = FEWEST_LINEAR_STEPS if noise_schedule == "linear" else 1
    if steps < fewest:
        raise ValueError(
            f"diffusion_steps is {steps}, it must be at least {fewest} with noise_schedule"
            f" {noise_schedule}"
        )
    betas = gd.get_named_beta_schedule(noise_schedule, steps)
    try:
        kept = space_timesteps(steps, timestep_respacing or [steps])
    except ValueError as error:
        raise ValueError(f"timestep_respacing {timestep_respacing}: {error}") from error
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        variance = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        variance = gd.ModelVarType.FIXED_SMALL
    else:
        variance = gd.ModelVarType.FIXED_LARGE
    mean = gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON
    return SpacedDiffusion(
        use_timesteps=kept,
        betas=betas,
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict) -> None:
    """Add a flag `--key value` for every entry, typed like its default (None means text)."""
    for key, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{key}", default=value, type=kind, help=FLAG_HELP.get(key))


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict:
    """The attributes `keys` of parsed arguments, as keyword arguments of a constructor."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """A boolean from the words that command lines use; argparse reports anything else."""
    if isinstance(v, bool):
        return v
    words = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    words |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    if v.lower() not in words:
        raise argparse.ArgumentTypeError(f'expected true or false (yes/no, 1/0), not "{v}"')
    return words[v.lower()]
