"""Constructors of networks and processes by their flags; the published names of `flags`, too."""

import inspect
from collections.abc import Callable, Mapping

from . import gaussian_diffusion as gd
from .diffusers_network import DiffusersNetwork, create_diffusers
from .flags import (  # noqa: F401 -- their published names are here
    add_dict_to_argparser,
    args_to_dict,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    diffusion_defaults,
    flag_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
    str2bool,
)
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
    num_classes: int = NUM_CLASSES,
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
        num_classes=num_classes if class_cond else None,
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
    num_classes: int = NUM_CLASSES,
) -> EncoderUNetModel:
    """The encoder that gives logits of `num_classes` classes for a noisy RGB image."""
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
        out_channels=num_classes,
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
    diffusion_flags = {name: flags[name] for name in diffusion_defaults()}
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
    num_classes: int = NUM_CLASSES,
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
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_fp16=use_fp16,
    )


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
    create = constructors[kind]
    known = {"num_classes": NUM_CLASSES, **flag_defaults(kind), **flags}
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
    v_prediction: bool = False,
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
    if v_prediction:
        mean = gd.ModelMeanType.VELOCITY
    else:
        mean = gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON
    return SpacedDiffusion(
        use_timesteps=kept,
        betas=betas,
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )
