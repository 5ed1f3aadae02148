"""What the driver is to run: its flags checked, and turned into the commands of this machine."""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from esddpm_io.errors import UserError
from esddpm_io.files import absolute, check_output_folder, is_blob
from esddpm_io.images import open_images
from guided_diffusion.presets import GUIDED_SAMPLER, SCRIPTS_FOLDER, Preset
from guided_diffusion.sampling.launcher import WorkerCommand

# Published defaults. Untyped, they stand for "what is there" and "what the preset says"; the same
# text typed by the user is taken at its word (`typed`, the names of typed flags, tells which).
DEFAULT_DEVICES = "0,1,2,3,4,5,6,7"
DEFAULT_DATASET_PATH = "../evaluations/precomputed/biggan_deep_imagenet64.npz"

EVALUATION_BACKENDS = ("auto", "tensorflow", "torch")  # the evaluator's, which is not imported
_FLAGS_OF_EVALUATION = (
    "ref_batch",
    "inception_path",
    "eval_backend",
    "eval_device",
    "eval_cache_dir",
)


def check_numbers(args: argparse.Namespace, preset: Preset) -> list[int]:
    """Check what needs no file; return the original timesteps of the chain."""
    from guided_diffusion.respace import space_timesteps

    if not 0 <= args.machine_idx < args.num_machines:
        raise UserError(
            f"--machine_idx must be in 0 … {args.num_machines - 1} (--num_machines "
            f"{args.num_machines}), not {args.machine_idx}"
        )
    try:
        total = preset.diffusion_flags.get("diffusion_steps", 1000)
        steps = sorted(space_timesteps(total, args.chain_length))
    except ValueError as error:
        raise UserError(f"--chain_length {args.chain_length}: {error}") from error
    if not (args.start_from_scratch or 1 <= args.reverse_steps <= len(steps)):
        raise UserError(
            f"--reverse_steps must be in 1 … {len(steps)}, the length of the chain "
            f"(--chain_length {args.chain_length}), not {args.reverse_steps}"
        )
    return steps


def describe_steps(args: argparse.Namespace, steps: list[int]) -> str:
    """One line on the chain, whose original timesteps are `steps`, and where sampling starts."""
    if args.start_from_scratch:
        return f"{len(steps)} steps from pure noise at original timestep {steps[-1]}"
    start = steps[args.reverse_steps - 1]
    return f"{args.reverse_steps} of {len(steps)} steps, starting at original timestep {start}"


def default_output(args: argparse.Namespace, dataset: str) -> Path:
    """The output folder that stands for what is sampled and how."""
    kind = f"diffusion_and_reverse_{args.reverse_steps}_steps"
    if args.start_from_scratch:
        kind = "generate_from_scratch"
    suffix = f"_{args.save_dir_suffix}" if args.save_dir_suffix else ""
    return SCRIPTS_FOLDER / "exps" / dataset / f"ddpm_{args.chain_length}_steps" / f"{kind}{suffix}"


def ignored_flags(args: argparse.Namespace, preset: Preset) -> list[str]:
    """A remark for each flag that the user typed in vain."""
    from guided_diffusion.sampling.settings import without_effect

    scratch = args.start_from_scratch
    unguided = not (preset.is_guided or args.classifier_path)
    unevaluated = "with --not_eval_metrics" if args.not_eval_metrics else "but on machine 0"
    return without_effect(
        args.typed,
        {
            "num_samples": (not scratch, "without --start_from_scratch"),
            "reverse_steps": (scratch, "with --start_from_scratch"),
            "dataset_path": (scratch, "with --start_from_scratch"),
            "limit": (scratch, "with --start_from_scratch"),
            "eta": (not uses_ddim(args), "without DDIM (--chain_length ddim250, say)"),
            "classifier_guidance_scale": (
                unguided,
                f"with the data set {preset.name}: it has no classifier (see --classifier_path)",
            ),
            "classifier_path": (
                args.classifier_guidance_scale == 0,
                "with --classifier_guidance_scale 0",
            ),
            "save_dir_suffix": (bool(args.output_dir), "with --output_dir"),
            **dict.fromkeys(_FLAGS_OF_EVALUATION, (not evaluates(args), unevaluated)),
        },
    )


def uses_ddim(args: argparse.Namespace) -> bool:
    return args.chain_length.startswith("ddim")


def choose_devices(args: argparse.Namespace) -> list[str]:
    """The devices to use, one a process; UserError, naming the valid ones, if one is not there.

    Commands that are only printed may be for another machine: there, typed devices need not exist.
    """
    import torch

    there = [str(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    text = args.devices
    if "devices" not in args.typed or text == "none":
        if not there:
            print("no CUDA device is there: using the CPU")
            return ["cpu"]
        return there if text == "none" else [d for d in text.split(",") if d in there]
    devices = [device.strip() for device in text.split(",")]
    absent = [device for device in devices if device not in (*there, "cpu")]
    if absent and (args.execute or "" in absent):
        raise UserError(
            f"--devices {text}: there is no device {absent[0] or '(empty)'}; valid on this "
            f"machine: {', '.join([*there, 'cpu', 'none'])}"
        )
    return devices


def worker_commands(args: argparse.Namespace, preset: Preset, output: str) -> list[WorkerCommand]:
    """The command of every process of this machine."""
    devices = choose_devices(args)
    script, flags = sampler_and_flags(args, preset)
    beside_samples = args.output_dir and not is_blob(output)
    logs = Path(output if beside_samples else SCRIPTS_FOLDER) / "logs"
    part = "" if args.start_from_scratch else f"_reverse_{args.reverse_steps}_steps"
    commands = []
    for local, device in enumerate(devices):
        rank = local + len(devices) * args.machine_idx
        place = {
            "device": device,
            "global_rank": rank,
            "world_size": len(devices) * args.num_machines,
            "any_chunk": True,
            "save_dir": output,
        }
        argv = [sys.executable, str(SCRIPTS_FOLDER / script), *as_argv({**flags, **place})]
        log = logs / f"ddpm_{args.chain_length}_length{part}_global_rank_{rank}.log"
        commands.append(WorkerCommand(argv, device, log))
    return commands


def sampler_and_flags(args: argparse.Namespace, preset: Preset) -> tuple[str, dict]:
    """The sampling script for the preset, and the flags that all its processes share."""
    flags = {
        **preset.model_flags,
        **preset.diffusion_flags,
        "timestep_respacing": args.chain_length,
        "use_ddim": uses_ddim(args),
        "model_path": typed(args.model_path) or preset.checkpoint,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "save_png_files": args.save_png_files,
    }
    if args.use_fp16 is not None:
        flags["use_fp16"] = args.use_fp16
    if uses_ddim(args):
        flags["eta"] = args.eta
    if args.start_from_scratch:
        flags |= {"start_from_scratch": True, "num_samples": args.num_samples}
    else:
        flags |= {
            "denoise_steps": args.reverse_steps,
            "dataset_path": generator_images(args, preset),
            "limit": args.limit,
        }
    if not (preset.is_guided or args.classifier_path):
        return preset.sampler_script, flags
    flags |= preset.classifier_flags
    flags["classifier_scale"] = args.classifier_guidance_scale
    flags["classifier_path"] = typed(args.classifier_path) or preset.classifier or ""
    return GUIDED_SAMPLER, flags


def generator_images(args: argparse.Namespace, preset: Preset) -> str:
    """The generator's images: what the user typed, else the preset's, else nothing."""
    if "dataset_path" not in args.typed:
        return preset.generator_images or ""
    return typed(args.dataset_path) or ""


def typed(path: str | None) -> str | None:
    """A path from the command line as an absolute one, None where none was given."""
    return absolute(path) if path else None


def as_argv(flags: dict) -> list[str]:
    """Flags as a command line has them."""
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def check_files(args: argparse.Namespace, preset: Preset, output: str) -> None:
    """UserError for files that are missing, all of them, with the command that fetches them.

    And for start images that cannot be read, or an output folder that cannot be written.
    """
    check_output_folder(output, flag="--output_dir")
    needed = {"--model_path": typed(args.model_path) or preset.checkpoint}
    if not args.start_from_scratch:
        needed["--dataset_path"] = generator_images(args, preset)
    if preset.is_guided and args.classifier_guidance_scale:
        needed["--classifier_path"] = typed(args.classifier_path) or preset.classifier
    if evaluates(args):
        needed["--ref_batch"] = typed(args.ref_batch) or preset.reference_batch
        if args.inception_path or preset.feature_graph:
            needed["--inception_path"] = typed(args.inception_path) or preset.feature_graph
    for flag, path in needed.items():
        if not path:
            raise UserError(f"{flag}: the preset {preset.name} names no such file: give one")
    missing = {f: p for f, p in needed.items() if not (is_blob(p) or os.path.exists(p))}
    if missing:
        what = "; ".join(f"{flag}: there is no file or folder {p}" for flag, p in missing.items())
        fetch = shlex.join(["python", str(SCRIPTS_FOLDER / "download.py"), args.dataset])
        shipped = {file.path for file in preset.download} & set(missing.values())
        raise UserError(f"{what}; fetch with: {fetch}" if shipped else what)
    if not args.start_from_scratch:
        open_images(needed["--dataset_path"], flag="--dataset_path")


def count_samples(args: argparse.Namespace, preset: Preset) -> int:
    """How many samples there will be."""
    if args.start_from_scratch:
        return args.num_samples
    count = len(open_images(generator_images(args, preset), flag="--dataset_path"))
    return min(args.limit, count) if args.limit > 0 else count


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What samples are scored with. graph None: the 2015 Inception graph."""

    dataset: str
    reference: str
    graph: str | None
    metric_name: str | None
    engine: dict[str, str]  # the evaluator's flags backend, device, cache_dir, as far as given


def add_evaluation_flags(add: Callable) -> None:
    """The flags that `evaluation` reads, for the driver and for the gathering script."""
    add("--ref_batch", help="reference batch instead of the preset's")
    add("--inception_path", help="feature graph for the evaluator instead of the preset's")
    add("--eval_backend", choices=EVALUATION_BACKENDS, help="engine of the evaluator")
    add("--eval_device", help="the evaluator's device, for torch: cpu, cuda, cuda:1 …")
    add("--eval_cache_dir", help="folder where the evaluator keeps features")


def evaluation(args: argparse.Namespace, preset: Preset) -> Evaluation:
    """What the flags and the preset say of it; UserError if there is no reference."""
    reference = typed(args.ref_batch) or preset.reference_batch
    if not reference:
        raise UserError(f"--ref_batch: the preset {preset.name} names no reference batch: give one")
    graph = typed(args.inception_path) or preset.feature_graph
    # The preset's name is for the features of its own graph.
    name = preset.metric_name if graph and graph == preset.feature_graph else None
    engine = {"backend": args.eval_backend, "device": args.eval_device}
    engine["cache_dir"] = typed(args.eval_cache_dir)
    given = {flag: value for flag, value in engine.items() if value}
    return Evaluation(preset.name, reference, graph, name, given)


def as_our_flags(error: UserError) -> str:
    """What the evaluator says of its flags, under the names that they have here."""
    return re.sub(r"--(backend|device|cache_dir)\b", r"--eval_\1", str(error))


def evaluates(args: argparse.Namespace) -> bool:
    """Whether this machine evaluates the samples."""
    return not args.not_eval_metrics and args.machine_idx == 0


def preset_argument(text: str) -> str:
    """`--dataset` for another process, which may stand elsewhere."""
    return absolute(text) if text.endswith(".toml") else text
