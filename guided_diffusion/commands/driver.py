"""Carry a generator's images to T' and back on all devices, gather the samples, evaluate them.

    python scripts/generate_processes_diffusion_and_reverse.py --dataset emoji32 --devices cpu \\
        --t_prime 500 --steps 5 --sampler dpmpp_2m_sde --execute

Prints the command of each sampling process; with --execute runs them. Run on several machines
with one shared folder by giving each --num_machines and its --machine_idx.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esddpm_io.atomic import write_json
from esddpm_io.errors import EXIT_USER_ERROR, UserError, check_at_least, terminate_cleanly
from esddpm_io.files import absolute, check_output_folder, is_blob, join, read_json, sha256
from esddpm_io.help import CommandLine
from esddpm_io.hub import fetched
from guided_diffusion.commands import scoring, slurm
from guided_diffusion.commands.sampler_flags import (
    AUTO,
    COMPILE_HELP,
    add_precision_flag,
    add_sampler_flags,
    by_name,
    unused_flags,
)
from guided_diffusion.flag_help import GENERATOR_HELP
from guided_diffusion.flags import str2bool
from guided_diffusion.sampling.gathering import METRICS_FILE
from guided_diffusion.settings.layers import check_not_empty, parse, require, without_effect
from guided_diffusion.settings.presets import (
    GUIDED_SAMPLER,
    PLAIN_SAMPLER,
    RESULTS_FOLDER,
    SCRIPTS_FOLDER,
    Preset,
    load_preset,
)

if TYPE_CHECKING:
    from guided_diffusion.commands.request import Request
    from guided_diffusion.sampling.chunks import ChunkFolder
    from guided_diffusion.sampling.launcher import WorkerCommand
    from guided_diffusion.settings.record import Run

DRIVER = SCRIPTS_FOLDER / "generate_processes_diffusion_and_reverse.py"
GATHER = SCRIPTS_FOLDER / "gather_numpyz_and_compute_fid.py"

# Published defaults. Untyped, they stand for "what is there" and "what the preset says"; the same
# text typed by the user is taken at its word.
DEFAULT_DEVICES = "0,1,2,3,4,5,6,7"
DEFAULT_GUIDANCE = 1.0
DEFAULT_DATASET_PATH = "../evaluations/precomputed/biggan_deep_imagenet64.npz"
# What a run's settings are called among the driver's flags.
_NAMES = {
    "timestep_respacing": "chain_length",
    "denoise_steps": "reverse_steps",
    "classifier_scale": "classifier_guidance_scale",
}
# What may be typed beside --again: where it runs, not what it is.
_BESIDE_AGAIN = {
    *("again", "execute", "output_dir", "devices", "machine_idx", "num_machines"),
    *("not_eval_metrics", "save_png_files", "eval_backend", "eval_device", "eval_cache_dir"),
    *("eval_while_sampling", "compile"),
}


def create_argparser() -> argparse.ArgumentParser:
    """The driver's command line."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("--execute", action="store_true", help="run the commands, not only print them")
    add("--reverse_steps", type=int, default=25, help="K, steps denoised of the respaced chain")
    add("--chain_length", default="250", help="steps of the chain; ddim25 and the like: DDIM")
    add("--start_from_scratch", action="store_true", help="plain DDPM: all steps from pure noise")
    add("--num_samples", type=int, default=50000, help="with --start_from_scratch or --generator")
    add("--dataset_path", default=DEFAULT_DATASET_PATH, help="generator images: npz or folder")
    add("--save_dir_suffix", default="", help="appended to the output folder with _")
    add(
        "--classifier_guidance_scale",
        type=float,
        default=DEFAULT_GUIDANCE,
        help="factor of the classifier's gradient; 0 needs no classifier",
    )
    add("--not_eval_metrics", action="store_true", help="skip the evaluation")
    add_sampler_flags(add)
    add("--seed", type=int, default=0, help="the same seed gives the same samples")
    add("--model_path", help="checkpoint instead of the preset's")
    add("--output_dir", help="folder for samples, logs and metrics instead of exps/…")
    beside = "evaluate while sampling goes on: features of finished chunks on --eval_device"
    add("--eval_while_sampling", action="store_true", help=beside)
    add("--save_png_files", action="store_true", help="also one PNG a sample")
    add("--print_settings", action="store_true", help="show the run and each setting's origin")
    add("--again", metavar="METRICS", help="repeat the run of a metrics.json in --output_dir")
    add_shared_flags(add)
    return parser


def add_shared_flags(add: Callable[..., object]) -> None:
    """The flags of one run that are those of a sweep, too."""
    add("--machine_idx", type=int, default=0, help="this machine's place; machine 0 gathers")
    add("--num_machines", type=int, default=1, help="how many machines share the folder")
    add("--batch_size", type=int, default=32, help="images a step")
    add("--dataset", default="imagenet64", help="name of a preset, or path of a preset file")
    add("--limit", type=int, default=0, help="only the first N generator images (0: all)")
    add("--generator", default="", help=GENERATOR_HELP)
    devices = "GPU indices, none (as CUDA says), cpu, cpu,cpu"
    add("--devices", default=DEFAULT_DEVICES, help=devices)
    clip = "clamp predicted images to [-1, 1]; untyped, solvers that start from T' do not"
    add("--clip_denoised", type=str2bool, default=True, help=clip)
    add("--use_fp16", type=str2bool, help="True or False instead of what the preset says")
    add_precision_flag(add)
    add("--compile", action="store_true", help=COMPILE_HELP)
    add("--classifier_path", help="classifier instead of the preset's")
    override = "a preset's flags win over those of the checkpoint's sidecar"
    truth = {"nargs": "?", "const": True, "default": False, "type": str2bool}
    add("--override_checkpoint_flags", help=override, **truth)
    slurm.add_flags(add)
    scoring.add_flags(add)


def check_place(args: argparse.Namespace) -> None:
    """UserError unless --machine_idx is one of --num_machines, and numbers are no less than 1."""
    check_at_least(args, {"num_machines": 1, "batch_size": 1, "num_samples": 1})
    require(
        0 <= args.machine_idx < args.num_machines,
        f"--machine_idx must be in 0 … {args.num_machines - 1} (--num_machines "
        f"{args.num_machines}), not {args.machine_idx}",
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What this machine is to do: the run, where, by which processes, and how it is scored."""

    run: "Run"
    output: str
    commands: "list[WorkerCommand]"
    evaluation: scoring.Evaluation | None
    dataset: str | None
    args: argparse.Namespace


def main(argv: list[str] | None = None) -> None:
    args, typed = parse(create_argparser(), argv)
    check_not_empty(args, typed, ("save_dir_suffix", "slurm_args"))
    check_place(args)
    argv = sys.argv[1:] if argv is None else argv
    if slurm.is_wanted(args):
        args.execute = True  # though not here: all that the jobs need has to be right
        slurm.check(args, typed)
    with slurm.only_the_script(args):
        plan = _plan_again(args, typed) if args.again else _plan(args, typed)
    if plan is None or not args.execute:
        return
    if slurm.is_wanted(args):
        open_folder(plan.output, plan.run, args.machine_idx)
        [worker] = plan.commands
        argv = ["--execute", *argv]
        slurm.hand_over(args, worker.argv, DRIVER, argv, plan.output, worker.log.parent)
    else:
        _execute(plan, argv)


def _plan(args: argparse.Namespace, typed: set[str]) -> Plan | None:
    """Check the flags and their files; None where commands can only be printed."""
    preset = load_preset(args.dataset)
    warn_of_flags_in_vain(typed, _flags_in_vain(args, preset) | _scoring_in_vain(args))
    named = by_name(args, typed, ("chain_length", "reverse_steps"))
    if not named:
        print(_describe_steps(args, _chain(args, preset)))
    default = absolute(_default_output(args, preset, bool(named)))
    output = absolute(args.output_dir) if args.output_dir else default
    print(f"output folder: {output}")
    evaluation = None
    only_print = not (args.execute or args.print_settings)
    if named.get("t_prime") == AUTO:
        named["t_prime"], _ = measured_t_prime(
            args, typed, preset, named, output, lambda request: scoring.PROPOSAL_FILE
        )
    from guided_diffusion.commands.request import resolve_run

    try:
        check_files(args, typed, preset, output)
        resolved = resolve_run(request_of(args, typed, preset, named), output)
    except UserError as error:
        if not only_print:
            raise
        resolved = None
        print(f"note: these commands cannot run yet: {error}", file=sys.stderr)
    for remark in resolved.remarks if resolved else []:
        print(f"note: {remark}", file=sys.stderr)
    if named and resolved:
        from guided_diffusion.sampling.worker import describe_chain

        print(describe_chain(resolved.run))
    if args.print_settings:
        from guided_diffusion.sampling.job import describe

        print(describe(resolved.run))
        return None
    if args.execute and _evaluates(args):
        evaluation = scoring.read_flags(args, preset)
        evaluation.check(resolved.run.num_samples)
    guided = is_guided(args, preset)
    log = log_folder(args, output) / _log_name(args, bool(named))
    settings = [settings_path(output, args.machine_idx)]
    commands = worker_commands(args, choose_devices(args, typed), guided, settings, log)
    for command in commands:
        print(command, flush=True)
    if resolved is None:
        return None
    if only_print:
        open_folder(output, resolved.run, args.machine_idx)
    return Plan(resolved.run, output, commands, evaluation, preset.name, args)


def measured_t_prime(
    args: argparse.Namespace,
    typed: set[str],
    preset: Preset,
    named: dict[str, Any],
    output: str,
    file_of: "Callable[[Request], str]",
) -> tuple[int, str]:
    """T' for `auto`, and where it is kept: in the file below `output` that `file_of` names.

    An unknown one is measured by machine 0, when it is to sample itself.
    """
    from guided_diffusion.commands.propose import stored_or_measured

    check_files(args, typed, preset, output)
    request = request_of(args, typed, preset, named)
    path = join(output, file_of(request))
    t_prime = stored_or_measured(
        request,
        scoring.read_flags(args, preset),
        choose_devices(args, typed)[0],
        args.batch_size,
        path,
        may_measure=args.execute and args.machine_idx == 0 and not slurm.is_wanted(args),
    )
    return t_prime, path


def open_folder(output: str, run: "Run", machine_idx: int) -> "ChunkFolder":
    """Open the folder, and write what this machine's processes read: the run with our paths."""
    from guided_diffusion.sampling.chunks import ChunkFolder

    folder = ChunkFolder.open(output, run)
    write_json(settings_path(output, machine_idx), run.to_json())
    return folder


def settings_path(output: str, machine_idx: int) -> str:
    """Machine 0 has the folder's own; the files may lie elsewhere on the others."""
    from guided_diffusion.sampling.chunks import SETTINGS_FILE

    name, _, ending = SETTINGS_FILE.partition(".")
    own = f"{name}_machine_{machine_idx}.{ending}"
    return join(output, own if machine_idx else SETTINGS_FILE)


def _execute(plan: Plan, argv: list[str]) -> None:
    """Run the workers, and on machine 0 gather and evaluate."""
    from guided_diffusion.sampling import outputs
    from guided_diffusion.sampling.completion import complete

    terminate_cleanly()
    folder = open_folder(plan.output, plan.run, plan.args.machine_idx)
    if plan.args.save_png_files:
        outputs.claim_png_folder(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(telling_how_to_continue([str(DRIVER), *argv]))
        score = None
        if plan.evaluation and plan.args.eval_while_sampling:
            beside = plan.evaluation.beside(folder.chunks, folder.num_samples)
            score = stack.enter_context(beside)
        complete(
            [folder],
            lambda _: plan.commands,
            gathers=plan.args.machine_idx == 0,
        )
        if plan.args.save_png_files:
            outputs.export_pngs(folder, 0, folder.num_samples)
        if plan.args.machine_idx:
            print(
                f"all samples are there; machine 0 gathers them, or, if it is gone\n  "
                f"{_gather_command(plan)}"
            )
        elif plan.evaluation:
            scoring.evaluate([plan.output], plan.evaluation, plan.dataset, score)


@contextlib.contextmanager
def telling_how_to_continue(command: list[str]) -> Iterator[None]:
    """Print how to go on, by a script and its flags, when workers fail or a signal ends the block.

    UserError for what the user has to mend before; SystemExit where another try may do.
    """
    from guided_diffusion.sampling.launcher import WorkersFailed

    again = shlex.join([sys.executable, *command])
    try:
        yield
    except WorkersFailed as error:
        if error.exit_code == EXIT_USER_ERROR:
            raise UserError(str(error)) from error
        print(f"error: {error}\nwhat is finished stays; continue with\n  {again}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished stays; continue with\n  {again}", file=sys.stderr)
        raise


def _gather_command(plan: Plan) -> str:
    return shlex.join([sys.executable, str(GATHER), "--dir", plan.output])


# --- a run again ---


def _plan_again(args: argparse.Namespace, typed: set[str]) -> Plan:
    """The run that a metrics.json tells of, its inputs compared with those of then."""
    from guided_diffusion.settings.record import Run

    surplus = sorted(typed - _BESIDE_AGAIN)
    require(
        not surplus,
        f"--again repeats a run as it was: leave out {', '.join(f'--{name}' for name in surplus)}",
    )
    warn_of_flags_in_vain(typed, _scoring_in_vain(args))
    require(bool(args.output_dir), "--again: name a new folder with --output_dir")
    record = _read_metrics(args.again)
    run = Run.from_json(record["run"], where=args.again)
    evaluation = _evaluation_again(args, record)
    run = _compare_inputs(run, record)
    output = absolute(args.output_dir)
    check_output_folder(output, flag="--output_dir")
    if args.execute and evaluation:
        evaluation.check(run.num_samples)
    args.batch_size = record["sampling"]["batch_size"]
    log = log_folder(args, output) / "again_global_rank_{rank}.log"
    settings, devices = [settings_path(output, args.machine_idx)], choose_devices(args, typed)
    commands = worker_commands(args, devices, run.guidance is not None, settings, log)
    for command in commands:
        command.argv.extend(["--chunk_size", str(record["sampling"]["chunk_size"])])
        print(command, flush=True)
    if not args.execute:
        open_folder(output, run, args.machine_idx)
    return Plan(run, output, commands, evaluation, record.get("dataset"), args)


def _read_metrics(path: str) -> dict[str, Any]:
    """A metrics.json, or that of a run's folder, with all that repeating the run takes."""
    if not is_blob(path) and os.path.isdir(path):
        path = join(path, METRICS_FILE)
    record = read_json(path)
    require(record is not None, f"--again: there is no file {path}")
    needed = {
        "run": (),
        "inputs": (),
        "sampling": ("batch_size", "chunk_size"),
        "scoring": [field.name for field in dataclasses.fields(scoring.Evaluation)],
    }
    for part, names in needed.items():
        found = record.get(part) if isinstance(record, dict) else None
        require(
            isinstance(found, dict) and found.keys() >= {*names},
            f"--again: {path} has no record of a run that could be repeated: {part} is not whole",
        )
    assert isinstance(record, dict)
    return record


def _evaluation_again(
    args: argparse.Namespace, record: Mapping[str, Any]
) -> scoring.Evaluation | None:
    if not _evaluates(args):
        return None
    evaluation = scoring.Evaluation(**record["scoring"])
    typed = {"backend": args.eval_backend, "device": args.eval_device}
    typed["cache_dir"] = absolute(args.eval_cache_dir) if args.eval_cache_dir else None
    engine = {**evaluation.engine, **{name: value for name, value in typed.items() if value}}
    return dataclasses.replace(evaluation, engine=engine)


def _compare_inputs(run: "Run", record: Mapping[str, Any]) -> "Run":
    """Tell which inputs have changed; the run with the hashes of today."""
    from guided_diffusion.checkpoints import fingerprint, read_checkpoint
    from guided_diffusion.sampling.sources import contents_of

    changed = False
    for name, then in record["inputs"].items():
        path = then["path"]
        if name in ("checkpoint", "classifier"):
            now = fingerprint(read_checkpoint(path, flag="--again"))
        elif name == "start_images" and run.start.kind == "generator":
            now = contents_of(run.start) or ""
        else:
            now = sha256(path, flag="--again")
        if now != then["sha256"]:
            changed = True
            print(
                f"warning: --again: the {name.replace('_', ' ')} {path} is not what it was "
                f"(SHA-256 {then['sha256'][:12]}…, now {now[:12]}…)",
                file=sys.stderr,
            )
        if name == "checkpoint":
            run = dataclasses.replace(run, network=dataclasses.replace(run.network, sha256=now))
        elif name == "classifier" and run.guidance:
            classifier = dataclasses.replace(run.guidance.classifier, sha256=now)
            guidance = dataclasses.replace(run.guidance, classifier=classifier)
            run = dataclasses.replace(run, guidance=guidance)
        elif name == "start_images":
            start = dataclasses.replace(run.start, contents=contents_of(run.start))
            run = dataclasses.replace(run, start=start)
            if now != then["sha256"]:
                _check_start_again(run)
    if not changed:
        print("--again: all inputs are what they were")
    return run


def _check_start_again(run: "Run") -> None:
    """UserError where start images have become others than the run can start from."""
    from guided_diffusion.sampling.sources import open_generator_images

    start, size = run.start, int(run.network.flags["image_size"])
    if start.kind == "generator":
        return
    assert start.path is not None
    images = open_generator_images(start.path, run.num_samples, flag="--again")
    there = f"--again: {start.path} has"
    count, shape = run.num_samples, start.shape or (size, size)
    require(len(images) == count, f"{there} {len(images)} images now, the run takes {count}")
    require(
        images.shape == shape,
        f"{there} images of {images.shape[1]}x{images.shape[0]} now, the run takes "
        f"{shape[1]}x{shape[0]}",
    )
    images.check(size, "image_size", start.num_classes, multiple=1)


# --- flags into what they mean ---


def _chain(args: argparse.Namespace, preset: Preset) -> list[int]:
    """The original timesteps of the chain, as far as flags and preset tell."""
    from guided_diffusion.respace import space_timesteps

    total = preset.diffusion_flags.get("diffusion_steps", 1000)
    try:
        steps = sorted(space_timesteps(total, args.chain_length))
    except ValueError as error:
        raise UserError(f"--chain_length {args.chain_length}: {error}") from error
    require(
        args.start_from_scratch or 1 <= args.reverse_steps <= len(steps),
        f"--reverse_steps must be in 1 … {len(steps)}, the length of the chain "
        f"(--chain_length {args.chain_length}), not {args.reverse_steps}",
    )
    return steps


def _describe_steps(args: argparse.Namespace, steps: list[int]) -> str:
    """One line on the chain, whose original timesteps are `steps`, and where sampling starts."""
    if args.start_from_scratch:
        return f"{len(steps)} steps from pure noise at original timestep {steps[-1]}"
    start = steps[args.reverse_steps - 1]
    return f"{args.reverse_steps} of {len(steps)} steps, starting at original timestep {start}"


def _default_output(args: argparse.Namespace, preset: Preset, named: bool) -> Path:
    """The output folder that stands for what is sampled and how."""
    if named:
        name = f"{point_name(args)}_steps"
    else:
        kind = f"diffusion_and_reverse_{args.reverse_steps}_steps"
        kind = "generate_from_scratch" if args.start_from_scratch else kind
        name = f"ddpm_{args.chain_length}_steps/{kind}"
    suffix = f"_{args.save_dir_suffix}" if args.save_dir_suffix else ""
    return RESULTS_FOLDER / "exps" / preset.name / f"{name}{suffix}"


def point_name(args: argparse.Namespace) -> str:
    """Sampler, T' and evaluations, as folders and logs have them."""
    start = "from_scratch" if args.start_from_scratch else f"t{args.t_prime}"
    return f"{args.sampler or 'ddpm'}_{start}_{args.steps}"


def _log_name(args: argparse.Namespace, named: bool) -> str:
    if named:
        return f"{point_name(args)}_steps_global_rank_{{rank}}.log"
    part = "" if args.start_from_scratch else f"_reverse_{args.reverse_steps}_steps"
    return f"ddpm_{args.chain_length}_length{part}_global_rank_{{rank}}.log"


def warn_of_flags_in_vain(typed: set[str], in_vain: Mapping[str, tuple[bool, str]]) -> None:
    """Print what `without_effect` finds."""
    for remark in without_effect(typed, in_vain):
        print(f"warning: {remark}", file=sys.stderr)


def _flags_in_vain(args: argparse.Namespace, preset: Preset) -> dict[str, tuple[bool, str]]:
    """Whether flags of the sampling do nothing, and when, as `without_effect` takes it."""
    with_eta = "DDIM (--chain_length ddim250, say) or --sampler dpmpp_2m_sde"
    return {
        **unused_flags(args, _uses_ddim(args), with_eta),
        "classifier_guidance_scale": (
            not is_guided(args, preset),
            f"with the data set {preset.name}: it has no classifier (see --classifier_path)",
        ),
        "classifier_path": (
            args.classifier_guidance_scale == 0,
            "with --classifier_guidance_scale 0",
        ),
        "save_dir_suffix": (bool(args.output_dir), "with --output_dir"),
    }


def _scoring_in_vain(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    """The same of flags of the evaluation."""
    unevaluated = "with --not_eval_metrics" if args.not_eval_metrics else "but on machine 0"
    submitted = slurm.is_wanted(args)
    return {
        **slurm.flags_in_vain(args),
        **dict.fromkeys(scoring.FLAGS, (not _evaluates(args), unevaluated)),
        "eval_while_sampling": (
            not _evaluates(args) or submitted,
            "with --submit slurm" if submitted else unevaluated,
        ),
    }


def is_guided(args: argparse.Namespace, preset: Preset) -> bool:
    """Whether a classifier can guide the run."""
    return preset.is_guided or bool(args.classifier_path)


def _uses_ddim(args: argparse.Namespace) -> bool:
    return args.chain_length.startswith("ddim")


def _evaluates(args: argparse.Namespace) -> bool:
    """Whether this machine evaluates the samples."""
    return not args.not_eval_metrics and args.machine_idx == 0


def files_of(args: argparse.Namespace, typed: set[str], preset: Preset) -> dict[str, str]:
    """Every file that the run reads, by the flag that can name another, "" where none is known."""
    found = {
        "model_path": args.model_path or preset.checkpoint,
        "classifier_path": args.classifier_path or preset.classifier,
        "dataset_path": args.dataset_path if "dataset_path" in typed else preset.generator_images,
        "ref_batch": args.ref_batch or preset.reference_batch,
        "inception_path": args.inception_path or preset.feature_graph,
    }
    return {
        flag: absolute(fetched(path, flag=f"--{flag}")) if path else ""
        for flag, path in found.items()
    }


def request_of(
    args: argparse.Namespace, typed: set[str], preset: Preset, named: dict[str, Any]
) -> "Request":
    from guided_diffusion.commands.request import Request

    files = files_of(args, typed, preset)
    return Request(
        kind="model",
        model_path=files["model_path"],
        typed={} if args.use_fp16 is None else {"use_fp16": args.use_fp16},
        respacing=args.chain_length,
        **({"steps": None if args.start_from_scratch else args.reverse_steps} | named),
        use_ddim=_uses_ddim(args),
        eta=args.eta,
        clip_denoised=args.clip_denoised if "clip_denoised" in typed else None,
        variance=args.variance,
        seed=args.seed,
        images=files["dataset_path"] if "dataset_path" in typed or not args.generator else "",
        generator=args.generator,
        device=args.devices.split(",")[0] if "devices" in typed and args.devices != "none" else "",
        num_samples=args.num_samples,
        limit=args.limit,
        classifier_path=files["classifier_path"],
        classifier_scale=args.classifier_guidance_scale if is_guided(args, preset) else 0.0,
        preset=preset,
        override=args.override_checkpoint_flags,
        precision=args.precision,
        names=_NAMES,
    )


def check_files(args: argparse.Namespace, typed: set[str], preset: Preset, output: str) -> None:
    """UserError for files that are missing, all of them, with the command that fetches them.

    And for an output folder that cannot be written.
    """
    check_output_folder(output, flag="--output_dir")
    files = files_of(args, typed, preset)
    unneeded = {"inception_path"} if not files["inception_path"] else set()
    if args.start_from_scratch or args.generator:
        unneeded.add("dataset_path")
    if not (is_guided(args, preset) and args.classifier_guidance_scale):
        unneeded.add("classifier_path")
    if not _evaluates(args):
        unneeded |= {"ref_batch", "inception_path"}
    needed = {f"--{flag}": path for flag, path in files.items() if flag not in unneeded}
    for flag, path in needed.items():
        require(bool(path), f"{flag}: the preset {preset.name} names no such file: give one")
    missing = {f: p for f, p in needed.items() if not (is_blob(p) or os.path.exists(p))}
    if missing:
        all_typed = all(flag.removeprefix("--") in typed for flag in missing)
        what = "; ".join(f"{flag}: there is no file or folder {p}" for flag, p in missing.items())
        fetch = shlex.join(["python", str(SCRIPTS_FOLDER / "download.py"), args.dataset])
        shipped = {file.path for file in preset.download} & set(missing.values())
        if not (shipped or preset.is_own or all_typed):
            what += "; the files of this preset come with the repository: clone it, or name others"
        raise UserError(f"{what}; fetch with: {fetch}" if shipped else what)


def choose_devices(args: argparse.Namespace, typed: set[str]) -> list[str]:
    """The devices to use, one a process; UserError, naming the valid ones, if one is not there.

    Commands that are only printed may be for another machine: there, typed devices need not exist.
    Where Slurm chooses it is one without a name.
    """
    if slurm.is_wanted(args):
        return [""]
    import torch

    there = [str(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    text = args.devices
    if "devices" not in typed or text == "none":
        if not there:
            print("no CUDA device is there: using the CPU")
            return ["cpu"]
        return there if text == "none" else [d for d in text.split(",") if d in there]
    devices = [device.strip() for device in text.split(",")]
    absent = [device for device in devices if device not in (*there, "cpu")]
    if absent and (args.execute or "" in absent):
        raise UserError(
            f"--devices {text}: there is no device {absent[0] or '(empty)'}; valid on this "
            f"machine: {', '.join([*there, 'cpu', 'none'])}",
            got=absent,
            valid=[*there, "cpu", "none"],
        )
    return devices


def log_folder(args: argparse.Namespace, output: str) -> Path:
    """Beside the samples where the user named their folder, else where exps/ is."""
    beside_samples = args.output_dir and not is_blob(output)
    return Path(output if beside_samples else RESULTS_FOLDER) / "logs"


def worker_commands(
    args: argparse.Namespace,
    devices: list[str],
    guided: bool,
    settings: list[str],
    log: Path,
) -> "list[WorkerCommand]":
    """The command of every process of this machine: where the settings of runs are, and its place.

    log: of the process of rank {rank}. A device without a name, and the place of its process, is
    whatever the launcher that starts the command says.
    """
    from guided_diffusion.sampling.launcher import WorkerCommand

    if args.compile and args.execute and all(devices):
        from guided_diffusion.compiling import check_compiler

        for device in devices:
            check_compiler(device)
    script = SCRIPTS_FOLDER / (GUIDED_SAMPLER if guided else PLAIN_SAMPLER)
    commands = []
    for local, device in enumerate(devices):
        rank = local + len(devices) * args.machine_idx
        size = len(devices) * args.num_machines
        place = {"device": device, "global_rank": rank, "world_size": size} if device else {}
        flags = {**place, "any_chunk": True, "batch_size": args.batch_size}
        for switch in ("save_png_files", "compile"):
            if getattr(args, switch):
                flags[switch] = True
        argv = [sys.executable, str(script), "--settings", *settings]
        argv += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        commands.append(WorkerCommand(argv, device, log.with_name(log.name.format(rank=rank))))
    return commands
