"""The published flags and defaults of every command: other people's command lines must go on."""

import argparse
import importlib
import pkgutil

import pytest

from esddpm_io.help import FEW, GROUPS
from guided_diffusion import commands
from guided_diffusion.commands import sample

MODEL = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
DIFFUSION = {
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}
CLASSIFIER = {
    "image_size": 64,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
WITHOUT_SUPER_RES = ("image_size", "channel_mult", "use_new_attention_order")
SUPER_RES = {
    "large_size": 256,
    "small_size": 64,
    **{name: value for name, value in MODEL.items() if name not in WITHOUT_SUPER_RES},
}
SAMPLER = {
    "clip_denoised": True,
    "num_samples": 10000,
    "batch_size": 16,
    "use_ddim": False,
    "model_path": "",
}
GUIDED = {"classifier_path": "", "classifier_scale": 1.0}
TRAINING = {
    "data_dir": "",
    "schedule_sampler": "uniform",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "batch_size": 1,
    "microbatch": -1,
    "ema_rate": "0.9999",
    "log_interval": 10,
    "save_interval": 10000,
    "resume_checkpoint": "",
    "use_fp16": False,
    "fp16_scale_growth": 1e-3,
}
CLASSIFIER_TRAINING = {
    "data_dir": "",
    "val_data_dir": "",
    "noised": True,
    "iterations": 150000,
    "lr": 3e-4,
    "weight_decay": 0.0,
    "anneal_lr": False,
    "batch_size": 4,
    "microbatch": -1,
    "schedule_sampler": "uniform",
    "resume_checkpoint": "",
    "log_interval": 10,
    "eval_interval": 5,
    "save_interval": 10000,
}
NLL = {
    "data_dir": "",
    "clip_denoised": True,
    "num_samples": 1000,
    "batch_size": 1,
    "model_path": "",
}
DRIVER = {
    "execute": False,
    "machine_idx": 0,
    "num_machines": 1,
    "batch_size": 32,
    "reverse_steps": 25,
    "chain_length": "250",
    "start_from_scratch": False,
    "num_samples": 50000,
    "dataset": "imagenet64",
    "dataset_path": "../evaluations/precomputed/biggan_deep_imagenet64.npz",
    "save_dir_suffix": "",
    "classifier_guidance_scale": 1.0,
    "not_eval_metrics": False,
    "devices": "0,1,2,3,4,5,6,7",
}
WORKER = {
    "device": ...,  # the published worker was always told these: any default will do
    "global_rank": ...,
    "world_size": ...,
    "save_dir": ...,
    "save_png_files": False,
    "save_numpy_array": False,
    "denoise_steps": 25,
    "dataset_path": ...,
    "start_from_scratch": False,
    **SAMPLER,
}
GATHER = {"dir": ..., "num_file": ..., "wait_time": ..., "dataset": "imagenet64"}

PUBLISHED = {
    "generate_processes_diffusion_and_reverse": DRIVER,
    "image_sample_diffusion_and_reverse": {**WORKER, **MODEL, **DIFFUSION},
    "classifier_sample_diffusion_and_reverse": {
        **WORKER,
        **GUIDED,
        **MODEL,
        **DIFFUSION,
        **CLASSIFIER,
    },
    "gather_numpyz_and_compute_fid": GATHER,
    "image_sample": {**SAMPLER, **MODEL, **DIFFUSION},
    "classifier_sample": {**SAMPLER, **GUIDED, **MODEL, **DIFFUSION, **CLASSIFIER},
    "super_res_sample": {**SAMPLER, "base_samples": "", **SUPER_RES, **DIFFUSION},
    "image_train": {**TRAINING, **MODEL, **DIFFUSION},
    "super_res_train": {**TRAINING, **SUPER_RES, **DIFFUSION},
    "classifier_train": {**CLASSIFIER_TRAINING, **DIFFUSION, **CLASSIFIER},
    "image_nll": {**NLL, **MODEL, **DIFFUSION},
    "imagenet_dataloader.imagefolder_to_npz": {"folder": ...},
    "imagenet_dataloader.npz_to_imagefolder": {"dataset": "imagenet64"},
}
# Flags that nothing can run without, so that parsing needs them.
REQUIRED = {
    "gather_numpyz_and_compute_fid": ["--dir", "d"],
    "imagenet_dataloader.imagefolder_to_npz": ["--folder", "d"],
}


def parser_of(script):
    if script.endswith("sample_diffusion_and_reverse"):
        return sample.build_parser(guided=script.startswith("classifier"))
    return importlib.import_module(f"scripts.{script}").create_argparser()


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_flags_and_defaults(script):
    published = PUBLISHED[script]
    parsed = vars(parser_of(script).parse_args(REQUIRED.get(script, [])))
    assert published.keys() <= parsed.keys()
    fixed = {name: value for name, value in published.items() if value is not ...}
    assert {name: parsed[name] for name in fixed} == fixed
    for name, value in fixed.items():
        assert type(parsed[name]) is type(value), name


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_flags_take_their_type(script):
    """A value of each flag's type is read back as such; booleans as any of the published words."""
    parser = parser_of(script)
    for name, default in PUBLISHED[script].items():
        if default is ... or name in REQUIRED.get(script, []):
            continue
        if isinstance(default, bool) and script == "generate_processes_diffusion_and_reverse":
            assert vars(parser.parse_args([f"--{name}"]))[name] is True
            continue
        words = {"3": 3, "-2": -2} if type(default) is int else {"3e-4": 3e-4, "2": 2.0}
        if isinstance(default, str):
            words = {"some/text": "some/text"}
        if isinstance(default, bool):
            words = dict.fromkeys(("True", "yes", "1"), True)
            words |= dict.fromkeys(("false", "no", "0"), False)
        for word, value in words.items():
            argv = [*REQUIRED.get(script, []), f"--{name}", word]
            assert vars(parser.parse_args(argv))[name] == value


@pytest.mark.parametrize("script", [name for name in PUBLISHED if "sample_diff" in name])
def test_workers_have_the_published_switches(script):
    argv = ["--start_from_scratch", "--save_png_files", "--save_numpy_array"]
    args = parser_of(script).parse_args(argv)
    assert args.start_from_scratch is args.save_png_files is args.save_numpy_array is True


# What a long help shows before its groups: what the command is about, or what is to be seen of it.
FIRST = {"help", "seed", "execute", "print_settings", "print_points", "drop_variance"}
FIRST |= {"dir", "num_file", "wait_time"}


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    names = [
        f"guided_diffusion.commands.{info.name}" for info in pkgutil.iter_modules(commands.__path__)
    ]
    modules = map(
        importlib.import_module, [*names, "evaluations.evaluator", "evaluations.make_reference"]
    )
    found = {m.__name__: m.create_argparser() for m in modules if hasattr(m, "create_argparser")}
    guided = {f"sample, guided {guided}": sample.build_parser(guided) for guided in (False, True)}
    return found | guided


def test_every_flag_has_its_place_in_the_help():
    parsers = all_parsers()
    assert len(parsers) > 20
    placed = FIRST | set(" ".join(GROUPS.values()).split())
    known = set()
    for name, parser in parsers.items():
        flags = {action.dest for action in parser._optionals._group_actions}
        known |= {action.dest for action in parser._actions}
        if len(flags) > FEW:
            assert flags <= placed, (name, flags - placed)
    assert placed <= known, placed - known
