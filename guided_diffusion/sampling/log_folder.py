"""guided-diffusion's own sampling commands: pure noise in, one .npz in the log folder out."""

import argparse
import shlex
import sys
from collections.abc import Callable

from esddpm_io.errors import terminate_cleanly
from esddpm_io.files import absolute
from guided_diffusion import dist_util, logger
from guided_diffusion.checkpoints import explicit_flags
from guided_diffusion.sampling import outputs, worker
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.sampling.plan import as_argv
from guided_diffusion.sampling.settings import COMMON_DEFAULTS, Job
from guided_diffusion.script_util import add_dict_to_argparser


def build_parser(description: str, defaults: dict) -> argparse.ArgumentParser:
    """A command line with the common flags and `defaults`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dict_to_argparser(parser, {**COMMON_DEFAULTS, **defaults})
    return parser


def sample(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    read_job: Callable[[list[str]], Job],
    *worker_flags: str,
) -> None:
    """Check the command line `argv`, then sample it with the engine into the log folder.

    `read_job` reads the flags of an engine's worker, which are those of `parser` and more:
    `worker_flags`. All processes that were started together share the work; rank 0 joins it to
    `samples_{N}x{H}x{W}x{C}.npz` (`arr_0`, and `arr_1` where there are labels).
    """
    args = parser.parse_args(argv)
    # Spelt out, for what is an abbreviation here may be none among the engine's flags.
    flags = as_argv({name: getattr(args, name) for name in explicit_flags(parser, argv)})
    terminate_cleanly()
    dist_util.setup_dist()
    logger.configure()
    job = read_job([*flags, *worker_flags, "--save_dir", logger.get_dir()])
    with worker.telling_how_to_continue(job, _command(logger.get_dir())):
        worker.run(job, logger.log)
        if job.rank == 0:
            logger.log(f"wrote {outputs.export_all(ChunkFolder.load(job.save_dir))}")


def _command(folder: str) -> str:
    """What goes on in this log folder; the launcher, if there was one, is not ours to know."""
    where = f"OPENAI_LOGDIR={shlex.quote(absolute(folder))}"
    return f"{where} {shlex.join([sys.executable, *sys.argv])}"
