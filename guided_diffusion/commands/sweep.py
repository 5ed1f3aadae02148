"""Sweep T', steps, samplers and more: sample a point for each combination, score and compare them.

    python scripts/sweep.py --dataset emoji32 --t_prime 0,250,500 --steps 5,10 --output_dir sweep

Flags that take lists (a,b,c) span the points. All of them are checked before the first is sampled;
the same command goes on where it was stopped, and another one with the same --output_dir adds its
points to those that are there.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from esddpm_io.atomic import write_json
from esddpm_io.errors import EXIT_MAY_PASS, check_at_least, terminate_cleanly
from esddpm_io.files import absolute, check_output_folder, exists, is_blob, join, read_json
from esddpm_io.help import CommandLine
from guided_diffusion.commands import driver, report, scoring, slurm
from guided_diffusion.commands.sampler_flags import AUTO
from guided_diffusion.commands.sweep_points import (
    LISTS,
    SCRATCH,
    Point,
    combinations_of,
    resolve_points,
)
from guided_diffusion.commands.sweep_table import write_tables
from guided_diffusion.sampling.gathering import METRICS_FILE, SAMPLES_FILE
from guided_diffusion.sampling.point import GeneratorPoint
from guided_diffusion.settings.layers import check_not_empty, parse, require
from guided_diffusion.settings.presets import SCRIPTS_FOLDER, Preset, load_preset
from guided_diffusion.settings.record import SAMPLERS
from guided_diffusion.solvers import SPACINGS

if TYPE_CHECKING:
    from guided_diffusion.sampling.chunks import ChunkFolder
    from guided_diffusion.sampling.launcher import WorkerCommand, WorkersFailed

SWEEP = SCRIPTS_FOLDER / "sweep.py"
FEATURES_FOLDER = "features"
DEFAULT_GROUPS = 20  # a Fréchet distance each; 40 would make intervals 3 % narrower


def create_argparser() -> argparse.ArgumentParser:
    """The command line of a sweep."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder of the sweep, with a folder for each point")
    start = "list of T', in original timesteps; 0: the generator's images themselves, "
    start += f"{SCRATCH}: from pure noise, {AUTO}: T' from data"
    add("--t_prime", required=True, metavar="T'", help=start)
    add("--steps", help="list of K, how many times the network is evaluated")
    add("--sampler", default="dpmpp_2m_sde", help=f"list of {', '.join(SAMPLERS)}")
    add("--eta", help="list of shares of the noise, 0 … 1, for ddim and dpmpp_2m_sde")
    add("--classifier_guidance_scale", help="list of factors of the classifier's gradient")
    add("--model_path", help="list of checkpoints instead of the preset's")
    add("--dataset_path", help="list of generator images instead of the preset's")
    add("--seed", default="0", help="list of seeds")
    add("--spacing", choices=SPACINGS, default="uniform", help="where the K evaluations lie")
    groups = "groups of samples left out in turn for 95 %% intervals; 0: no intervals"
    add("--eval_bootstrap", type=int, default=DEFAULT_GROUPS, help=groups)
    add("--print_points", action="store_true", help="show the points and do nothing")
    driver.add_shared_flags(add)
    return parser


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is to be done; evaluation None: on all machines but the first."""

    args: argparse.Namespace
    output: str
    points: list[Point]
    evaluation: scoring.Evaluation | None
    preset: Preset
    devices: list[str]


def main(argv: list[str] | None = None) -> None:
    args, typed = parse(create_argparser(), argv)
    check_not_empty(args, typed, ("slurm_args",))
    driver.warn_of_flags_in_vain(typed, slurm.flags_in_vain(args))
    argv = sys.argv[1:] if argv is None else argv
    if slurm.is_wanted(args):
        slurm.check(args, typed)
    with slurm.only_the_script(args):
        sweep = _plan(args, typed)
        if args.print_points or slurm.is_wanted(args):
            _print_points(sweep)
    if args.print_points:
        return
    if slurm.is_wanted(args):
        _hand_over(sweep, argv)
        return
    terminate_cleanly()
    with driver.telling_how_to_continue([str(SWEEP), *argv]):
        _print_points(sweep)  # once they are seen, a signal is told how to go on
        failed = _execute(sweep)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if failed:
        sys.exit(EXIT_MAY_PASS)


# --- from flags to points ---


def _plan(args: argparse.Namespace, typed: set[str]) -> Sweep:
    """All that can be wrong is found here; UserError with everything that is."""
    preset = load_preset(args.dataset)
    driver.check_place(args)
    check_at_least(args, {"limit": 0})
    require(
        args.eval_bootstrap == 0 or args.eval_bootstrap >= 2,
        f"--eval_bootstrap must be at least 2, or 0 for no intervals, not {args.eval_bootstrap}",
    )
    output = absolute(args.output_dir)
    check_output_folder(output, flag="--output_dir")
    combinations = combinations_of(args)
    full = _as_driver_args(args)
    devices = driver.choose_devices(full, typed)
    points = resolve_points(full, typed, preset, output, combinations)
    evaluation = None
    if args.machine_idx == 0:
        evaluation = _evaluation(args, preset, output)
        evaluation.check(min(point.samples for point in points))
    return Sweep(full, output, points, evaluation, preset, devices)


def _evaluation(args: argparse.Namespace, preset: Preset, output: str) -> scoring.Evaluation:
    """What the flags say, with intervals, and with features kept in the sweep's folder."""
    evaluation = scoring.read_flags(args, preset)
    engine = {**evaluation.engine, "bootstrap": args.eval_bootstrap}
    if not is_blob(output):
        engine.setdefault("cache_dir", join(output, FEATURES_FOLDER))
    return dataclasses.replace(evaluation, engine=engine)


def _as_driver_args(args: argparse.Namespace) -> argparse.Namespace:
    """The driver's flags, with what the sweep says of those that take no list."""
    defaults = vars(driver.create_argparser().parse_args([]))
    own = {name: value for name, value in vars(args).items() if name not in LISTS}
    return argparse.Namespace(**{**defaults, **own, "execute": not args.print_points})


def _print_points(sweep: Sweep) -> None:
    print("\n".join(_describe(sweep)), flush=True)


def _describe(sweep: Sweep) -> Iterator[str]:
    """A table of the points, and what they take."""
    from guided_diffusion.sampling.chunks import ChunkFolder

    names = [os.path.basename(point.folder) for point in sweep.points]
    width = max(map(len, names))
    yield f"{'point':<{width}}  images  evaluations  sampled"
    done_evaluations = 0
    for name, point in zip(names, sweep.points, strict=True):
        done = point.samples
        if point.run:
            done = ChunkFolder(point.folder, point.run).count_done()
            done_evaluations += done * len(point.run.sampler.timesteps)
        yield f"{name:<{width}}  {point.samples:>6}  {point.evaluations:>11}  {done}"
    total = sum(point.evaluations for point in sweep.points)
    done = f", {done_evaluations} of them done" if done_evaluations else ""
    yield f"{len(sweep.points)} points, {total} network evaluations{done}; folder: {sweep.output}"


# --- from points to figures ---


def _execute(sweep: Sweep) -> list[str]:
    """Sample, and on machine 0 gather, score and compare; what went wrong with single points."""
    from guided_diffusion.sampling.completion import complete

    folders = _open_all(sweep)
    left = [point for point in sweep.points if not _is_scored(point, sweep.evaluation)]
    failed: dict[str, str] = {}

    def note_failure(error: "WorkersFailed") -> None:
        folder = error.folder.folder
        failed[folder] = f"{folder}: {error}"
        print(f"error: {failed[folder]}\ngoing on with the other points", file=sys.stderr)

    complete(
        [folders[point.folder] for point in left if point.run],
        lambda missing: _commands(sweep, missing),
        gathers=sweep.args.machine_idx == 0,
        on_failure=note_failure,
    )
    if sweep.evaluation is None:
        print("nothing is left to sample; machine 0 gathers and scores the points")
    else:
        _score(sweep, [point for point in left if point.folder not in failed])
    return list(failed.values())


def _hand_over(sweep: Sweep, argv: Sequence[str]) -> None:
    """Have Slurm sample all points, then do the rest by this command."""
    folders = list(_open_all(sweep).values())
    require(bool(folders), "--submit: there is nothing to sample: leave it out")
    [worker] = _commands(sweep, folders)
    logs = worker.log.parent
    slurm.hand_over(sweep.args, worker.argv, SWEEP, argv, sweep.output, logs)


def _open_all(sweep: Sweep) -> "dict[str, ChunkFolder]":
    """The points' folders, of which each may refuse, before the first sample."""
    from guided_diffusion.sampling.chunks import IMAGES_FILE

    # What reading all images of a folder has told, so that not every process does so again.
    note = read_json(join(sweep.output, IMAGES_FILE))
    folders = {}
    for point in sweep.points:
        if isinstance(point.what, GeneratorPoint):
            point.what.check_folder(point.folder)
            continue
        machine = sweep.args.machine_idx
        folders[point.folder] = driver.open_folder(point.folder, point.what, machine)
        if note is not None:
            write_json(join(point.folder, IMAGES_FILE), note)
        if point.proposal is not None:
            write_json(join(point.folder, scoring.PROPOSAL_FILE), read_json(point.proposal))
    return folders


def _score(sweep: Sweep, points: list[Point]) -> None:
    """Score points that are sampled, then compare all of the folder."""
    assert sweep.evaluation is not None
    for point in points:
        if isinstance(point.what, GeneratorPoint):
            point.what.write(point.folder, sweep.devices[0])
    if points:
        folders = [point.folder for point in points]
        scoring.evaluate(folders, sweep.evaluation, sweep.preset.name)
    print(write_tables(sweep.output))
    if any(exists(join(point.folder, METRICS_FILE)) for point in sweep.points):
        report.write([sweep.output], sweep.output)


def _commands(sweep: Sweep, folders: "Sequence[ChunkFolder]") -> "list[WorkerCommand]":
    guided = driver.is_guided(sweep.args, sweep.preset)
    machine = sweep.args.machine_idx
    settings = [driver.settings_path(folder.folder, machine) for folder in folders]
    log = driver.log_folder(sweep.args, sweep.output) / "sweep_global_rank_{rank}.log"
    return driver.worker_commands(sweep.args, sweep.devices, guided, settings, log)


def _is_scored(point: Point, evaluation: scoring.Evaluation | None) -> bool:
    """Whether the point's metrics.json is of these images and this evaluation."""
    record = read_json(join(point.folder, METRICS_FILE))
    if not isinstance(record, dict) or not exists(join(point.folder, SAMPLES_FILE)):
        return False
    samples = (record.get("point") or {}).get("samples")
    return evaluation is not None and samples == point.samples and evaluation.made(record)
