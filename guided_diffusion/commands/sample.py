"""One sampling process: the published flags of the engine's workers.

A worker is told records (--settings), which it samples one after another, and its place; or all the
published flags, of which the same record is made.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esddpm_io.errors import check_at_least, terminate_cleanly
from esddpm_io.files import join, read_json
from esddpm_io.help import CommandLine
from esddpm_io.processes import PARENT_VARIABLE, watch_parent
from guided_diffusion.commands.sampler_flags import (
    AUTO,
    COMPILE_HELP,
    add_precision_flag,
    add_sampler_flags,
    by_name,
    unused_flags,
)
from guided_diffusion.flag_help import FLAG_HELP
from guided_diffusion.flags import (
    add_dict_to_argparser,
    classifier_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
    str2bool,
)
from guided_diffusion.sampling.chunks import default_chunk_size
from guided_diffusion.sampling.job import Job, describe, rank_from_environment
from guided_diffusion.sampling.worker import run, telling_how_to_continue
from guided_diffusion.settings.layers import parse, require, without_effect
from guided_diffusion.settings.record import Run

if TYPE_CHECKING:
    import torch

    from guided_diffusion.commands.request import Request
    from guided_diffusion.sampling.sources import Source

DESCRIPTION = """Carry generator images to T' and back, or sample from noise: one process's share.

    python image_sample_diffusion_and_reverse.py --model_path model.pt --dataset_path gan.npz \\
        --save_dir samples --t_prime 400 --steps 8 --sampler dpmpp_2m_sde

The driver (generate_processes_diffusion_and_reverse.py) starts these; also under torchrun, mpiexec
or srun. The same command goes on where it was stopped."""
# Flags of every sampling command, and their defaults.
COMMON_DEFAULTS = {
    "clip_denoised": True,
    "num_samples": 10000,
    "batch_size": 16,
    "use_ddim": False,
    "model_path": "",
    "device": "",
    "seed": 0,
    "override_checkpoint_flags": False,
}
# Flags of a process, which the record of the run says nothing of.
_PLACE_DEFAULTS = {
    "settings": (),
    "save_dir": "",
    "global_rank": None,
    "world_size": None,
    "any_chunk": None,
    "chunk_size": 0,
}
_TYPES_OF_UNSET = {"global_rank": int, "world_size": int, "any_chunk": str2bool}
_WITHOUT_TYPE = (*_TYPES_OF_UNSET, "settings")
_SWITCHES = (
    "start_from_scratch",
    "save_numpy_array",
    "save_png_files",
    "print_settings",
    "compile",
)
_OF_THE_PROCESS = {*_PLACE_DEFAULTS, *_SWITCHES[1:], "batch_size", "device"}


def sampling_defaults(guided: bool) -> dict:
    """All flags of a sampling script that take a value, and their defaults."""
    defaults = {
        **COMMON_DEFAULTS,
        **_PLACE_DEFAULTS,
        "dataset_path": "",
        "generator": "",
        "limit": 0,
        "denoise_steps": 25,
        **model_and_diffusion_defaults(),
    }
    if guided:
        defaults |= {"classifier_path": "", "classifier_scale": 1.0, **classifier_defaults()}
    return defaults


def build_parser(guided: bool) -> argparse.ArgumentParser:
    """The command line of a sampling script; switches may be given a truth value too."""
    parser = CommandLine(description=DESCRIPTION)
    defaults = sampling_defaults(guided)
    add_dict_to_argparser(parser, {k: v for k, v in defaults.items() if k not in _WITHOUT_TYPE})
    parser.add_argument("--settings", nargs="+", default=(), help=FLAG_HELP["settings"])
    for name, kind in _TYPES_OF_UNSET.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=FLAG_HELP[name])
    add_sampler_flags(parser.add_argument)
    add_precision_flag(parser.add_argument)
    for name in _SWITCHES:
        add_switch(parser, name, COMPILE_HELP if name == "compile" else FLAG_HELP[name])
    return parser


def add_switch(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add `--name`, which may be given a truth value too."""
    parser.add_argument(f"--{name}", nargs="?", const=True, default=False, type=str2bool, help=text)


def read_jobs(argv: Sequence[str] | None, *, guided: bool) -> list[Job]:
    """Parse and check a sampling script's command line: records, or the published flags.

    Raises UserError, naming the flag and the valid values, for anything that could only fail
    later; of the input files it reads headers, labels and what tells them from others.
    """
    args, typed = parse(build_parser(guided), argv)
    if len(args.settings) < 2:
        return [job_from(args, typed, "model")]
    require(not args.save_dir, "--save_dir: leave it out with more than one file of --settings")
    each = [argparse.Namespace(**{**vars(args), "settings": (path,)}) for path in args.settings]
    return [job_from(one, typed, "model") for one in each]


def job_from(args: argparse.Namespace, typed: set[str], kind: str) -> Job:
    """The job of parsed flags of a network of a `kind`; `typed` names those that were typed."""
    from guided_diffusion.compiling import check_compiler
    from guided_diffusion.sampling.sampler import choose_device

    check_at_least(args, {"num_samples": 1, "batch_size": 1, "chunk_size": 0})
    place = _place(args, os.environ)
    device = choose_device(args.device)
    if args.compile:
        check_compiler(device.type)
    if args.settings:
        run, source = _recorded(args, typed, device)
        remarks = []
    else:
        named = bool(args.save_dir) or args.print_settings
        require(named, "--save_dir: name the folder for the samples")
        from guided_diffusion.commands.request import resolve_run

        request = _request(args, typed, kind)
        if args.t_prime == AUTO:
            from guided_diffusion.commands import propose, scoring

            path = join(args.save_dir, scoring.PROPOSAL_FILE)
            request = dataclasses.replace(request, t_prime=propose.kept(request, path))
        resolved = resolve_run(request, args.save_dir)
        run, source = resolved.run, resolved.source
        with_eta = "--use_ddim True, --sampler ddim or dpmpp_2m_sde"
        in_vain = without_effect(typed, unused_flags(args, args.use_ddim, with_eta))
        remarks = [*resolved.remarks, *in_vain]
    rank, world_size, launched = place
    return Job(
        run=run,
        source=source,
        save_dir=args.save_dir,
        device=args.device,
        rank=rank,
        world_size=world_size,
        any_chunk=launched if args.any_chunk is None else args.any_chunk,
        batch_size=args.batch_size,
        chunk_size=args.chunk_size or default_chunk_size(run.num_samples, args.batch_size),
        save_numpy_array=args.save_numpy_array,
        save_png_files=args.save_png_files,
        print_settings=args.print_settings,
        compile=args.compile,
        remarks=tuple(remarks),
    )


def _recorded(
    args: argparse.Namespace, typed: set[str], device: "torch.device"
) -> tuple[Run, "Source"]:
    """The run that --settings FILE says, its start images found unchanged."""
    from guided_diffusion.sampling.sources import check_source, open_source

    [path] = args.settings
    surplus = sorted(typed - _OF_THE_PROCESS)
    require(
        not surplus,
        f"--settings says all of the run: leave out {', '.join(f'--{name}' for name in surplus)}",
    )
    content = read_json(path)
    require(content is not None, f"--settings: there is no file {path}")
    run = Run.from_json(content, where=path)
    args.save_dir = args.save_dir or os.path.dirname(path)
    source = open_source(run.start, run.num_samples, run.seed, device)
    check_source(source, run.start, args.save_dir)
    return run, source


def _request(args: argparse.Namespace, typed: set[str], kind: str) -> "Request":
    from guided_diffusion.commands.request import Request

    networks = model_and_diffusion_defaults() | classifier_defaults()
    networks |= sr_model_and_diffusion_defaults()
    chain: dict[str, Any] = {"steps": None if args.start_from_scratch else args.denoise_steps}
    return Request(
        kind=kind,
        model_path=args.model_path,
        typed={name: getattr(args, name) for name in typed if name in networks},
        respacing=args.timestep_respacing,
        **(chain | by_name(args, typed, ("timestep_respacing", "denoise_steps", "use_ddim"))),
        use_ddim=args.use_ddim,
        eta=args.eta,
        clip_denoised=args.clip_denoised if "clip_denoised" in typed else None,
        variance=args.variance,
        seed=args.seed,
        images=args.base_samples if kind == "sr" else args.dataset_path,
        generator=getattr(args, "generator", ""),
        device=args.device,
        num_samples=args.num_samples,
        limit=0 if kind == "sr" else args.limit,
        classifier_path=getattr(args, "classifier_path", ""),
        classifier_scale=getattr(args, "classifier_scale", 0.0),
        override=args.override_checkpoint_flags,
        precision=args.precision,
    )


def _place(args: argparse.Namespace, environ: Mapping[str, str]) -> tuple[int, int, bool]:
    """Rank, world size, and whether a launcher set them: flags first, then the environment."""
    if args.global_rank is not None or args.world_size is not None:
        rank, launched = args.global_rank or 0, False
        size = 1 if args.world_size is None else args.world_size
    else:
        rank, size, launched = rank_from_environment(environ)
    require(size >= 1, f"--world_size must be at least 1, not {size}")
    require(0 <= rank < size, f"--global_rank must be in 0 … {size - 1}, not {rank}")
    return rank, size, launched


def main(argv: list[str] | None = None, *, guided: bool) -> None:
    """The command line of a sampling script: parse, sample, export."""
    terminate_cleanly()
    _stop_with_launcher()
    jobs = read_jobs(argv, guided=guided)

    from guided_diffusion.sampling.sampler import LoadedNetworks

    networks = LoadedNetworks()
    with telling_how_to_continue(jobs[0], shlex.join([sys.executable, *sys.argv])):
        for job in jobs:
            if job.print_settings:
                print(describe(job.run))
            else:
                run(job, networks=networks)


def _stop_with_launcher() -> None:
    """End this process when the launcher that started it is gone without having ended it."""

    def stop() -> None:
        print("the launcher is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if launcher := os.environ.get(PARENT_VARIABLE):
        watch_parent(int(launcher), stop)
