"""Carry a generator's images to T' and back on all devices, gather the samples, evaluate them.

Prints the command of each sampling process; with --execute runs them. Run on several machines
with one shared folder by giving each --num_machines and its --machine_idx.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from esddpm_io.errors import UserError, run_main, terminate_cleanly
from esddpm_io.files import absolute, is_blob

SCRIPTS = Path(__file__).resolve().parent
GATHER = SCRIPTS / "gather_numpyz_and_compute_fid.py"
# A default stands for "what the preset says", or "what is there": these are compared by identity,
# so that the same text typed by the user is taken at its word.
DEFAULT_DEVICES = "0,1,2,3,4,5,6,7"
DEFAULT_DATASET_PATH = "../evaluations/precomputed/biggan_deep_imagenet64.npz"


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--execute", action="store_true", help="run the commands, not only print them")
    add("--machine_idx", type=int, default=0, help="this machine's place; machine 0 gathers")
    add("--num_machines", type=int, default=1)
    add("--batch_size", type=int, default=32, help="images a step")
    add("--reverse_steps", type=int, default=25, help="K, steps denoised of the respaced chain")
    add("--chain_length", default="250", help="steps of the chain; ddim25 and the like: DDIM")
    add("--start_from_scratch", action="store_true", help="plain DDPM: all steps from pure noise")
    add("--num_samples", type=int, default=50000, help="with --start_from_scratch")
    add("--dataset", default="imagenet64", help="name of a preset, or path of a preset file")
    add("--dataset_path", default=DEFAULT_DATASET_PATH, help="generator images: npz or folder")
    add("--limit", type=int, default=0, help="only the first N generator images (0: all)")
    add("--save_dir_suffix", default="", help="appended to the output folder with _")
    add("--classifier_guidance_scale", type=float, default=1.0)
    add("--not_eval_metrics", action="store_true", help="skip the evaluation")
    add("--devices", default=DEFAULT_DEVICES, help="GPU indices, none (as CUDA says), cpu, cpu,cpu")
    add("--seed", type=int, default=0, help="the same seed gives the same samples")
    add("--model_path", help="checkpoint instead of the preset's")
    add("--classifier_path", help="classifier instead of the preset's")
    add("--ref_batch", help="reference batch instead of the preset's")
    add("--output_dir", help="folder for samples, logs and metrics instead of exps/…")
    add("--inception_path", help="feature graph for the evaluator instead of the preset's")
    add("--save_png_files", action="store_true", help="also one PNG a sample")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    from guided_diffusion.presets import load_preset

    preset = load_preset(args.dataset)
    steps = check_numbers(args, preset)
    print(describe_steps(args, steps))
    output = typed(args.output_dir) or str(default_output(args, preset.name))
    print(f"output folder: {output}")
    if args.execute:
        check_files(args, preset)
    commands = worker_commands(args, preset, output)
    for command in commands:
        print(command, flush=True)
    if args.execute:
        execute(args, preset, commands, output, sys.argv[1:] if argv is None else argv)


def check_numbers(args: argparse.Namespace, preset) -> list[int]:
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
    if args.start_from_scratch:
        return f"{len(steps)} steps from pure noise at original timestep {steps[-1]}"
    start = steps[args.reverse_steps - 1]
    return f"{args.reverse_steps} of {len(steps)} steps, starting at original timestep {start}"


def default_output(args: argparse.Namespace, dataset: str) -> Path:
    kind = f"diffusion_and_reverse_{args.reverse_steps}_steps"
    if args.start_from_scratch:
        kind = "generate_from_scratch"
    suffix = f"_{args.save_dir_suffix}" if args.save_dir_suffix else ""
    return SCRIPTS / "exps" / dataset / f"ddpm_{args.chain_length}_steps" / f"{kind}{suffix}"


def choose_devices(text: str, execute: bool) -> list[str]:
    """The devices to use, one a process; UserError, naming the valid ones, if one is not there.

    Commands that are only printed may be for another machine: there, typed devices need not exist.
    """
    import torch

    there = [str(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if text is DEFAULT_DEVICES or text == "none":
        if not there:
            print("no CUDA device is there: using the CPU")
            return ["cpu"]
        return there if text == "none" else [d for d in text.split(",") if d in there]
    devices = [device.strip() for device in text.split(",")]
    absent = [device for device in devices if device not in (*there, "cpu")]
    if absent and (execute or "" in absent):
        raise UserError(
            f"--devices {text}: there is no device {absent[0] or '(empty)'}; valid on this "
            f"machine: {', '.join([*there, 'cpu', 'none'])}"
        )
    return devices


def worker_commands(args: argparse.Namespace, preset, output: str) -> list:
    """The command of every process of this machine."""
    from guided_diffusion.sampling.launcher import WorkerCommand

    devices = choose_devices(args.devices, args.execute)
    script, flags = sampler_and_flags(args, preset)
    beside_samples = args.output_dir and not is_blob(output)
    logs = Path(output if beside_samples else SCRIPTS) / "logs"
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
        argv = [sys.executable, str(SCRIPTS / script), *as_argv({**flags, **place})]
        log = logs / f"ddpm_{args.chain_length}_length{part}_global_rank_{rank}.log"
        commands.append(WorkerCommand(argv, device, log))
    return commands


def sampler_and_flags(args: argparse.Namespace, preset) -> tuple[str, dict]:
    """The sampling script for the preset, and the flags that all its processes share."""
    from guided_diffusion.presets import GUIDED_SAMPLER

    flags = {
        **preset.model_flags,
        **preset.diffusion_flags,
        "timestep_respacing": args.chain_length,
        "use_ddim": args.chain_length.startswith("ddim"),
        "model_path": typed(args.model_path) or preset.checkpoint,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "save_png_files": args.save_png_files,
    }
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


def generator_images(args: argparse.Namespace, preset) -> str:
    if args.dataset_path is DEFAULT_DATASET_PATH:
        return preset.generator_images or ""
    return typed(args.dataset_path) or ""


def typed(path: str | None) -> str | None:
    return absolute(path) if path else None


def as_argv(flags: dict) -> list[str]:
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]


def execute(args, preset, commands: list, output: str, typed_argv: list[str]) -> None:
    """Run the workers, and on machine 0 gather and evaluate."""
    from guided_diffusion.sampling.chunks import ChunkFolder
    from guided_diffusion.sampling.launcher import Launcher, WorkersFailed
    from guided_diffusion.sampling.settings import read_job

    terminate_cleanly()
    again = shlex.join([sys.executable, str(SCRIPTS / Path(__file__).name), *typed_argv])
    job = read_job(commands[0].argv[2:], guided="--classifier_scale" in commands[0].argv)
    folder = ChunkFolder.open(job.save_dir, job.settings, job.info, job.chunk_size)
    try:
        if folder.missing() or args.save_png_files:
            Launcher(commands, folder).run()
        else:
            print(f"all {folder.num_samples} samples are there already")
        if args.machine_idx == 0:
            gather(args, preset, output, len(commands) * args.num_machines)
    except WorkersFailed as error:
        print(f"error: {error}\nwhat is finished stays; continue with\n  {again}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished stays; continue with\n  {again}", file=sys.stderr)
        raise


def check_files(args: argparse.Namespace, preset) -> None:
    """UserError for files that are missing, all of them, with the command that fetches them."""
    needed = {"--model_path": typed(args.model_path) or preset.checkpoint}
    if not args.start_from_scratch:
        needed["--dataset_path"] = generator_images(args, preset)
    if preset.is_guided and args.classifier_guidance_scale:
        needed["--classifier_path"] = typed(args.classifier_path) or preset.classifier
    evaluates = not args.not_eval_metrics and args.machine_idx == 0
    if evaluates:
        needed["--ref_batch"] = typed(args.ref_batch) or preset.reference_batch
        if args.inception_path or preset.feature_graph:
            needed["--inception_path"] = typed(args.inception_path) or preset.feature_graph
    for flag, path in needed.items():
        if not path:
            raise UserError(f"{flag}: the preset {preset.name} names no such file: give one")
    missing = {f: p for f, p in needed.items() if not (is_blob(p) or os.path.exists(p))}
    if missing:
        what = "; ".join(f"{flag}: there is no file or folder {p}" for flag, p in missing.items())
        fetch = shlex.join(["python", str(SCRIPTS / "download.py"), args.dataset])
        shipped = {file.path for file in preset.download} & set(missing.values())
        raise UserError(f"{what}; fetch with: {fetch}" if shipped else what)
    if evaluates and "--inception_path" not in needed:
        fetch_inception_graph()


def fetch_inception_graph() -> None:
    """Have the graph before hours of sampling, not miss it after them."""
    from evaluations.features import find_graph

    try:
        find_graph()
    except UserError as error:
        raise UserError(f"{error}; --not_eval_metrics samples without evaluating") from error


def preset_argument(text: str) -> str:
    return absolute(text) if text.endswith(".toml") else text


def gather(args: argparse.Namespace, preset, output: str, world_size: int) -> None:
    """Run the gathering script, which evaluates too; its failure is ours."""
    argv = [sys.executable, str(GATHER), "--dir", output, "--num_file", str(world_size)]
    argv += ["--dataset", preset_argument(args.dataset)]
    for flag in ("ref_batch", "inception_path"):
        if getattr(args, flag):
            argv += [f"--{flag}", typed(getattr(args, flag))]
    if args.not_eval_metrics:
        argv.append("--not_eval_metrics")
    code = subprocess.run(argv).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
