"""Runs handed to Slurm: a job array whose elements are workers, then one job that gathers.

All of it is a shell script for plain `sbatch`, which --print_sbatch shows and --submit runs.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from esddpm_io.errors import EXIT_DISK_FULL, EXIT_TERMINATED, EXIT_USER_ERROR, UserError
from esddpm_io.files import is_blob, join
from guided_diffusion.sampling.queue import JOBS_FILE
from guided_diffusion.settings.layers import require
from guided_diffusion.settings.presets import SCRIPTS_FOLDER

# For a job that fails by itself. Slurm does not ask us about those that it preempts.
_MOST_RESTARTS = 5
# For one that is told to end, as at each time limit: a job that never gets anywhere ends, too.
_MOST_STOPS = 100
_SUBMISSION = """\
#!/usr/bin/env bash
# Submits an array of {elements} to sample together, then one job to gather and evaluate, whatever
# became of these: it samples what is missing. Prints the two ids.
set -euo pipefail
cd {cwd}
mkdir -p {logs}
options=({options})

workers=$(sbatch --parsable --job-name={name} --array=0-{last} --requeue --open-mode=append \\
    --output={logs}/slurm_%A_%a.log --signal=TERM@60 "${{options[@]}}" <<'END'
#!/usr/bin/env bash
# Finished chunks stay, so that each element, put back into the queue, samples what is missing.
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} \\
    {worker} && exit
code=$?
# Not after {user_error} (the user's mistake) and {disk_full} (the disk is full), which stay so; \
{terminated}: SIGTERM, as
# 60 seconds before the time limit.
most=$((code == {terminated} ? {stops} : {restarts}))
if ((code != {user_error} && code != {disk_full} && ${{SLURM_RESTART_COUNT:-0}} < most)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
END
)
workers=${{workers%%;*}} # ";cluster" may follow

gather=$(sbatch --parsable --job-name={name}-gather --dependency="afterany:$workers" \\
    --requeue --open-mode=append --output={logs}/slurm_%j.log "${{options[@]}}" <<'END'
#!/usr/bin/env bash
exec {gather}
END
)
gather=${{gather%%;*}}
echo "$workers $gather\""""


def add_flags(add: Callable[..., object]) -> None:
    """The flags that hand a run over."""
    add("--submit", choices=("slurm",), help="a Slurm array of --num_machines jobs does it")
    show = "print the shell script that --submit slurm runs, and submit nothing"
    add("--print_sbatch", action="store_true", help=show)
    add(
        "--slurm_args", default="", help='sbatch\'s flags, as --slurm_args="--gres=gpu:1 --time=60"'
    )


def is_wanted(args: argparse.Namespace) -> bool:
    """Whether the run is for Slurm."""
    return bool(args.submit or args.print_sbatch)


def flags_in_vain(args: argparse.Namespace) -> dict[str, tuple[bool, str]]:
    """Whether flags of these do nothing, and when, as `without_effect` takes it."""
    return {"slurm_args": (not is_wanted(args), "without --submit slurm or --print_sbatch")}


def check(args: argparse.Namespace, typed: set[str]) -> None:
    """UserError for flags that say what Slurm decides, and where it is not there."""
    for flag in ("devices", "machine_idx"):
        require(flag not in typed, f"--{flag}: leave it out, Slurm chooses (--slurm_args)")
    try:
        shlex.split(args.slurm_args)
    except ValueError as error:
        raise UserError(f"--slurm_args {args.slurm_args}: {error}") from error
    there = args.print_sbatch or shutil.which("sbatch")
    require(bool(there), "--submit slurm: there is no sbatch here; --print_sbatch shows the script")


@contextlib.contextmanager
def only_the_script(args: argparse.Namespace) -> Iterator[None]:
    """With --print_sbatch, what the block prints goes to stderr: stdout is for the script."""
    with contextlib.redirect_stdout(sys.stderr if args.print_sbatch else sys.stdout):
        yield


def hand_over(
    args: argparse.Namespace,
    worker: Sequence[str],
    command: Path,
    argv: Sequence[str],
    output: str,
    logs: Path,
) -> None:
    """Print the script, or run it.

    worker: the argv of an element. The job after them runs `command` with the flags `argv` of this
    one, but those that brought us here. output: the run's folder; logs: of the jobs.
    """
    own = argparse.ArgumentParser(add_help=False)
    add_flags(own.add_argument)
    own.add_argument("--num_machines")
    rest = own.parse_known_args(argv)[1]
    script = _script(args, worker, [sys.executable, str(command), *rest], output, logs)
    if args.print_sbatch:
        print(script)
        return
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--submit slurm: {' '.join(done.stderr.split())}")
    workers, gather = done.stdout.split()
    print(
        f"submitted: the array {workers} samples, then {gather} gathers and evaluates; end both by"
        f"\n  scancel {workers} {gather}\nsee how far they are by\n"
        f"  {shlex.join([sys.executable, str(SCRIPTS_FOLDER / 'status.py'), output])}"
    )


def _script(
    args: argparse.Namespace,
    worker: Sequence[str],
    gather: Sequence[str],
    output: str,
    logs: Path,
) -> str:
    script = _SUBMISSION.format(
        elements=args.num_machines,
        last=args.num_machines - 1,
        cwd=shlex.quote(os.getcwd()),
        logs=shlex.quote(str(logs)),
        options=shlex.join(shlex.split(args.slurm_args)),
        name=re.sub(r"[^\w.-]", "_", os.path.basename(output)),
        worker=shlex.join(worker),
        gather=shlex.join(gather),
        user_error=EXIT_USER_ERROR,
        disk_full=EXIT_DISK_FULL,
        terminated=EXIT_TERMINATED,
        restarts=_MOST_RESTARTS,
        stops=_MOST_STOPS,
    )
    if is_blob(output):  # which no shell can write to: status.py does without
        return script
    return f"{script} | tee -a {shlex.quote(join(output, JOBS_FILE))}"
