"""Flags of the networks and of the process, their defaults, and the argparse bridge (no torch).

`script_util` has the published names of these.
"""

import argparse
from collections.abc import Iterable

from .flag_help import FLAG_HELP


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


def vae_defaults() -> dict:
    """Flags of a VAE and their default values."""
    return {
        "image_size": 32,
        "num_channels": 24,
        "latent_dim": 64,
        "prior_components": 64,
        "num_classes": 0,
    }


def diffusers_defaults() -> dict:
    """Flags of a network of diffusers with its process, and their defaults.

    unet: its config as JSON; num_classes: 0 for none; v_prediction: it predicts the velocity;
    sigma_small: DDPM's steps have the posterior's variance.
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
