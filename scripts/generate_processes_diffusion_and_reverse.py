"""Carry a generator's images to T' and back on all devices, gather the samples, evaluate them.

Prints the command of each sampling process; with --execute runs them. Run on several machines
with one shared folder by giving each --num_machines and its --machine_idx.
"""

import argparse
import shlex
import sys
from pathlib import Path

from esddpm_io.errors import UserError, run_main, terminate_cleanly
from esddpm_io.processes import run_to_end
from guided_diffusion.presets import Preset, load_preset
from guided_diffusion.sampling import plan

GATHER = Path(__file__).resolve().with_name("gather_numpyz_and_compute_fid.py")


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
    add("--dataset_path", default=plan.DEFAULT_DATASET_PATH, help="generator images: npz or folder")
    add("--limit", type=int, default=0, help="only the first N generator images (0: all)")
    add("--save_dir_suffix", default="", help="appended to the output folder with _")
    add("--classifier_guidance_scale", type=float, default=1.0)
    add("--not_eval_metrics", action="store_true", help="skip the evaluation")
    add(
        "--devices",
        default=plan.DEFAULT_DEVICES,
        help="GPU indices, none (as CUDA says), cpu, cpu,cpu",
    )
    add("--eta", type=float, default=0.0, help="with DDIM: 0 adds no noise, 1 as much as DDPM")
    add("--use_fp16", type=truth_value, help="True or False instead of what the preset says")
    add("--seed", type=int, default=0, help="the same seed gives the same samples")
    add("--model_path", help="checkpoint instead of the preset's")
    add("--classifier_path", help="classifier instead of the preset's")
    add("--output_dir", help="folder for samples, logs and metrics instead of exps/…")
    add("--save_png_files", action="store_true", help="also one PNG a sample")
    plan.add_evaluation_flags(add)
    return parser


def truth_value(text: str) -> bool:
    # Brings torch with it, which --help can do without.
    from guided_diffusion.script_util import str2bool

    return str2bool(text)


def typed_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """The names of the flags that the user typed."""
    from guided_diffusion.checkpoints import explicit_flags

    return explicit_flags(parser, argv)


def main(argv: list[str] | None = None) -> None:
    parser = create_argparser()
    args = parser.parse_args(argv)
    preset = load_preset(args.dataset)
    args.typed = typed_flags(parser, argv)
    for remark in plan.ignored_flags(args, preset):
        print(f"warning: {remark}", file=sys.stderr)
    steps = plan.check_numbers(args, preset)
    print(plan.describe_steps(args, steps))
    output = plan.typed(args.output_dir) or str(plan.default_output(args, preset.name))
    print(f"output folder: {output}")
    if args.execute:
        plan.check_files(args, preset, output)
        if plan.evaluates(args):
            check_evaluation(args, preset)
    commands = plan.worker_commands(args, preset, output)
    for command in commands:
        print(command, flush=True)
    if args.execute:
        execute(args, commands, output, sys.argv[1:] if argv is None else argv)


def execute(args: argparse.Namespace, commands: list, output: str, typed_argv: list[str]) -> None:
    """Run the workers, and on machine 0 gather and evaluate."""
    from guided_diffusion.sampling import outputs
    from guided_diffusion.sampling.chunks import ChunkFolder
    from guided_diffusion.sampling.launcher import Launcher, WorkersFailed
    from guided_diffusion.sampling.settings import read_job

    terminate_cleanly()
    again = shlex.join([sys.executable, str(Path(__file__).resolve()), *typed_argv])
    job = read_job(commands[0].argv[2:], guided="--classifier_scale" in commands[0].argv)
    folder = ChunkFolder.open(job.save_dir, job.settings, job.info, job.chunk_size)
    try:
        if folder.missing() or args.save_png_files:
            Launcher(commands, folder).run()
        else:
            print(f"all {folder.num_samples} samples are there already")
        if args.save_png_files:
            outputs.export_pngs(folder, 0, folder.num_samples)  # what no worker came to
        if args.machine_idx == 0:
            gather(args, output, len(commands) * args.num_machines)
    except WorkersFailed as error:
        print(f"error: {error}\nwhat is finished stays; continue with\n  {again}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished stays; continue with\n  {again}", file=sys.stderr)
        raise


def check_evaluation(args: argparse.Namespace, preset: Preset) -> None:
    """Fetch the graph if need be, and find what is wrong before hours of sampling, not after."""
    from evaluations.evaluation import check_inputs

    files = plan.evaluation(args, preset)
    count = plan.count_samples(args, preset)
    try:
        check_inputs(files.reference, count, inception_path=files.graph, **files.engine)
    except UserError as error:
        problem = plan.as_our_flags(error)
        raise UserError(f"{problem}; --not_eval_metrics samples without evaluating") from error


def gather(args: argparse.Namespace, output: str, world_size: int) -> None:
    """Run the gathering script, which evaluates too; its failure is ours."""
    argv = [sys.executable, str(GATHER), "--dir", output, "--num_file", str(world_size)]
    argv += ["--dataset", plan.preset_argument(args.dataset)]
    for flag in ("ref_batch", "inception_path", "eval_cache_dir"):
        if getattr(args, flag):
            argv += [f"--{flag}", plan.typed(getattr(args, flag))]
    for flag in ("eval_backend", "eval_device"):
        if getattr(args, flag):
            argv += [f"--{flag}", getattr(args, flag)]
    if args.not_eval_metrics:
        argv.append("--not_eval_metrics")
    code = run_to_end(argv)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
