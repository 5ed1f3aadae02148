"""guided-diffusion's own sampling commands: pure noise in, one .npz in the log folder out."""

import argparse
import shlex
import sys

from esddpm_io.errors import terminate_cleanly
from esddpm_io.files import absolute
from esddpm_io.help import CommandLine
from guided_diffusion.commands.sample import (
    COMMON_DEFAULTS,
    add_switch,
    job_from,
    sampling_defaults,
)
from guided_diffusion.commands.sampler_flags import COMPILE_HELP, add_precision_flag
from guided_diffusion.flag_help import FLAG_HELP
from guided_diffusion.flags import add_dict_to_argparser
from guided_diffusion.sampling import outputs, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.job import describe
from guided_diffusion.settings.layers import parse

# What an engine's worker has flags for, and these commands do not.
_OF_A_WORKER = {
    "start_from_scratch": True,
    "save_numpy_array": False,
    "save_png_files": False,
    "t_prime": None,
    "steps": None,
    "sampler": None,
    "spacing": "uniform",
    "variance": "learned",
}


def build_parser(description: str, defaults: dict) -> argparse.ArgumentParser:
    """A command line with the common flags and `defaults`."""
    parser = CommandLine(description=description)
    add_dict_to_argparser(parser, {**COMMON_DEFAULTS, **defaults})
    eta = "with --use_ddim True: 0 (default) adds no noise, 1 that of DDPM"
    parser.add_argument("--eta", type=float, help=eta)
    add_precision_flag(parser.add_argument)
    add_switch(parser, "print_settings", FLAG_HELP["print_settings"])
    add_switch(parser, "compile", COMPILE_HELP)
    return parser


def sample(parser: argparse.ArgumentParser, argv: list[str] | None, kind: str) -> None:
    """Check the command line `argv`, then sample it with the engine into the log folder.

    kind: of the network, "model" or "sr". All processes that were started together share the
    work; rank 0 joins it to `samples_{N}x{H}x{W}x{C}.npz` (`arr_0`, and `arr_1` where there are
    labels).
    """
    args, typed = parse(parser, argv)
    args = argparse.Namespace(**{**sampling_defaults(guided=False), **_OF_A_WORKER, **vars(args)})
    terminate_cleanly()

    from guided_diffusion import dist_util, logger

    if args.print_settings:
        print(describe(job_from(args, typed, kind).run))
        return
    dist_util.setup_dist()
    logger.configure()
    args.save_dir = logger.get_dir()
    job = job_from(args, typed, kind)
    with worker.telling_how_to_continue(job, _command(args.save_dir)):
        worker.run(job, logger.log)
        if job.rank == 0:
            logger.log(f"wrote {outputs.export_all(ChunkFolder.load(job.save_dir))}")


def _command(folder: str) -> str:
    """What goes on in this log folder; the launcher, if there was one, is not ours to know."""
    where = f"OPENAI_LOGDIR={shlex.quote(absolute(folder))}"
    return f"{where} {shlex.join([sys.executable, *sys.argv])}"
