"""Sweep T', steps, samplers and more: sample a point for each combination, score and compare them.

Flags that take lists (a,b,c) span the points. All of them are checked before the first is sampled;
the same command goes on where it was stopped, and another one with the same --output_dir adds its
points to those that are there.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from esddpm_io.errors import EXIT_MAY_PASS, UserError, check_at_least, terminate_cleanly
from esddpm_io.files import (
    absolute,
    check_output_folder,
    exists,
    is_blob,
    join,
    list_names,
    read_json,
)
from guided_diffusion.commands import driver, scoring
from guided_diffusion.commands.point import GeneratorPoint, generator_of
from guided_diffusion.commands.sampler_flags import AUTO, OWN_ETA, SPACINGS
from guided_diffusion.commands.sweep_table import write_tables
from guided_diffusion.settings.layers import parse, require
from guided_diffusion.settings.presets import SCRIPTS_FOLDER, Preset, load_preset
from guided_diffusion.settings.record import SAMPLERS

if TYPE_CHECKING:
    from guided_diffusion.sampling.chunks import ChunkFolder
    from guided_diffusion.sampling.launcher import WorkersFailed
    from guided_diffusion.settings.record import Run

SWEEP = SCRIPTS_FOLDER / "sweep.py"
SCRATCH = "scratch"
FEATURES_FOLDER, GENERATOR_FOLDER = "features", "generator"
DEFAULT_GROUPS = 20  # a Fréchet distance each; 40 would make intervals 3 % narrower
LISTS = {
    *("t_prime", "steps", "sampler", "eta", "classifier_guidance_scale"),
    *("model_path", "dataset_path", "seed"),
}
Values = dict[str, Any]  # one of each list, None where the flag was not given


def create_argparser() -> argparse.ArgumentParser:
    """The command line of a sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="folder of the sweep, with a folder for each point")
    add("--t_prime", required=True, help="list of T', original timesteps; 0 stands for the "
        f"generator's images themselves, {SCRATCH} for sampling from pure noise, {AUTO} for T' "
        "from data")  # fmt: skip
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
class Point:
    """One combination: a run, or the generator's images themselves."""

    folder: str
    what: "Run | GeneratorPoint"

    @property
    def run(self) -> "Run | None":
        return None if isinstance(self.what, GeneratorPoint) else self.what

    @property
    def samples(self) -> int:
        return self.run.num_samples if self.run else self.what.samples

    @property
    def evaluations(self) -> int:
        """Of the network, for all images."""
        return self.samples * len(self.run.sampler.timesteps) if self.run else 0


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
    sweep = _plan(args, typed)
    print("\n".join(_describe(sweep)), flush=True)
    if args.print_points:
        return
    terminate_cleanly()
    with driver.telling_how_to_continue([str(SWEEP), *(sys.argv[1:] if argv is None else argv)]):
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
    combinations = _combinations(args)
    full = _as_driver_args(args)
    devices = driver.choose_devices(full, typed)
    points = _settle_all(full, typed, preset, output, combinations)
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


def _combinations(args: argparse.Namespace) -> list[Values]:
    """One value of each list, in all combinations; UserError with all values that are none."""
    problems: list[str] = []

    def read(name: str, convert: Callable[[str], object], valid: str) -> list:
        text = getattr(args, name)
        values = []
        for part in [] if text is None else text.split(","):
            try:
                values.append(convert(part.strip()))
            except ValueError:
                problems.append(f"--{name}: '{part.strip()}' is none of: {valid}")
        return values or [None]

    lists = {
        "model_path": read("model_path", _path, "paths of checkpoints"),
        "dataset_path": read("dataset_path", _path, "paths of images"),
        "t_prime": read("t_prime", _t_prime, f"whole numbers from 0, {SCRATCH}, {AUTO}"),
        "steps": read("steps", _at_least(1), "whole numbers from 1"),
        "sampler": read("sampler", _sampler, ", ".join(SAMPLERS)),
        "eta": read("eta", _number, "numbers in 0 … 1"),
        "classifier_guidance_scale": read("classifier_guidance_scale", _number, "numbers"),
        "seed": read("seed", _at_least(0), "whole numbers from 0"),
    }
    if lists["steps"] == [None] and set(lists["t_prime"]) - {0}:
        problems.append("--steps: say how many times the network is evaluated")
    if problems:
        raise UserError("; ".join(problems))
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _t_prime(text: str) -> int | str:
    return text if text in (SCRATCH, AUTO) else _at_least(0)(text)


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return convert


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _sampler(text: str) -> str:
    if text not in SAMPLERS:
        raise ValueError
    return text


def _path(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _settle_all(
    args: argparse.Namespace,
    typed: set[str],
    preset: Preset,
    output: str,
    combinations: list[Values],
) -> list[Point]:
    """The points, each once; UserError with what is wrong with any."""
    from guided_diffusion.commands.request import ReadNetworks

    networks = ReadNetworks()
    found: dict[str, Point] = {}
    problems: dict[str, None] = {}
    remarks: dict[str, None] = {}
    there = _folders_by_identity(output)
    files = ("model_path", "dataset_path")
    several = [name for name in files if len({values[name] for values in combinations}) > 1]
    # Those that have to be measured last, when nothing else is wrong.
    for values in sorted(combinations, key=lambda values: values["t_prime"] == AUTO):
        if values["t_prime"] == AUTO and problems:
            break
        try:
            own = _args_of(args, typed, preset, values, output)
            driver.check_files(own, typed, preset, output)
            if values["t_prime"] == 0:
                what, said = _generator(own, typed, preset), []
            else:
                what, said = _run(own, typed, preset, output, networks)
        except UserError as error:
            # What the driver calls it.
            problems[str(error).replace("--start_from_scratch", f"--t_prime {SCRATCH}")] = None
            continue
        remarks |= dict.fromkeys(said)
        identity = _identity(what)
        if identity not in found:
            stems = {name: _stem(values[name]) for name in several}
            name = there.get(identity) or _name(own, what, stems, _is_guided(args, preset))
            found[identity] = Point(join(output, name), what)
    if problems:
        raise UserError("; ".join(problems))
    if "classifier_guidance_scale" in typed and not _is_guided(args, preset):
        remarks["--classifier_guidance_scale has no effect: there is no classifier"] = None
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    points = list(found.values())
    assert len({point.folder for point in points}) == len(points)
    return points


def _args_of(
    args: argparse.Namespace, typed: set[str], preset: Preset, values: Values, output: str
) -> argparse.Namespace:
    """The driver's flags for one combination."""
    given = {name: value for name, value in values.items() if value is not None}
    own = argparse.Namespace(**{**vars(args), **given})
    if own.t_prime == AUTO:
        own.t_prime = _measured_t_prime(own, typed, preset, output)
    if own.t_prime == SCRATCH:
        own.t_prime, own.start_from_scratch = None, True
        own.num_samples = _count_images(own, typed, preset)
    return own


def _measured_t_prime(
    args: argparse.Namespace, typed: set[str], preset: Preset, output: str
) -> int:
    """T' for `auto`, of one combination's checkpoint, generator images and sampler."""
    from guided_diffusion.commands.propose import stored_or_measured

    driver.check_files(args, typed, preset, output)
    named = {name: getattr(args, name) for name in ("sampler", "steps", "spacing")}
    request = driver.request_of(args, typed, preset, named)
    asked = hashlib.sha256(repr(request).encode()).hexdigest()[:16]
    return stored_or_measured(
        request,
        scoring.read_flags(args, preset),
        driver.choose_devices(args, typed)[0],
        args.batch_size,
        join(output, "t_prime", f"{asked}.json"),
        may_measure=args.execute and args.machine_idx == 0,
    )


def _count_images(args: argparse.Namespace, typed: set[str], preset: Preset) -> int:
    """As many images from noise as of the generator, where it has any: points are compared."""
    if args.limit and not exists(driver.files_of(args, typed, preset)["dataset_path"]):
        return args.limit
    count = len(_open_generator(args, typed, preset))
    return min(args.limit or count, count)


def _open_generator(args: argparse.Namespace, typed: set[str], preset: Preset):
    from esddpm_io.images import open_images

    return open_images(driver.files_of(args, typed, preset)["dataset_path"], flag="--dataset_path")


def _generator(args: argparse.Namespace, typed: set[str], preset: Preset) -> GeneratorPoint:
    images = _open_generator(args, typed, preset)
    images.check()
    path = driver.files_of(args, typed, preset)["dataset_path"]
    return GeneratorPoint(path, images.fingerprint(), _count_images(args, typed, preset))


def _run(
    args: argparse.Namespace, typed: set[str], preset: Preset, output: str, networks: Any
) -> "tuple[Run, list[str]]":
    from guided_diffusion.commands.request import settle

    named = {name: getattr(args, name) for name in ("sampler", "t_prime", "steps", "spacing")}
    settled = settle(driver.request_of(args, typed, preset, named), output, networks)
    return settled.run, settled.remarks


def _identity(what: "Run | GeneratorPoint") -> str:
    return f"images {what.contents}" if isinstance(what, GeneratorPoint) else what.identity


def _folders_by_identity(output: str) -> dict[str, str]:
    """The points that are there already, whatever command made them."""
    from guided_diffusion.sampling.chunks import SETTINGS_FILE
    from guided_diffusion.settings.record import Run

    found = {}
    for name in sorted(list_names(output)):
        path = join(output, name, SETTINGS_FILE)
        content = read_json(path)
        generator = generator_of(join(output, name))
        if content is not None:
            found[Run.from_json(content, where=path).identity] = name
        elif generator is not None:
            found[_identity(generator)] = name
    return found


def _name(
    args: argparse.Namespace,
    what: "Run | GeneratorPoint",
    stems: Values,
    is_guided: bool,
) -> str:
    """A folder's name: sampler, T' and steps, and what else tells points apart.

    Seed, eta and guidance where they are not the default, files where there are several: so most
    names stay the same when another command adds points.
    """
    if isinstance(what, GeneratorPoint):
        images = stems.get("dataset_path")
        return f"{GENERATOR_FOLDER}_{images}_{what.contents[:6]}" if images else GENERATOR_FOLDER
    parts = [f"{driver.point_name(args)}_steps"]
    if what.sampler.eta != OWN_ETA[what.sampler.name]:
        parts.append(f"eta{what.sampler.eta:g}")
    if is_guided and args.classifier_guidance_scale != driver.DEFAULT_GUIDANCE:
        parts.append(f"guidance{args.classifier_guidance_scale:g}")
    if "model_path" in stems:
        parts += [stems["model_path"], what.network.sha256[:6]]
    if "dataset_path" in stems and what.start.contents:
        parts += [stems["dataset_path"], what.start.contents[:6]]
    if what.seed:
        parts.append(f"seed{what.seed}")
    return "_".join(parts)


def _is_guided(args: argparse.Namespace, preset: Preset) -> bool:
    return preset.is_guided or bool(args.classifier_path)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path.rstrip("/")))[0]


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

    machine = sweep.args.machine_idx
    folders = {}
    for point in sweep.points:  # All of them, for each may refuse.
        if isinstance(point.what, GeneratorPoint):
            point.what.check_folder(point.folder)
        else:
            folders[point.folder] = driver.open_folder(point.folder, point.what, machine)
    left = [point for point in sweep.points if not _is_scored(point, sweep.evaluation)]
    failed: dict[str, str] = {}

    def report(error: "WorkersFailed") -> None:
        folder = error.folder.folder
        failed[folder] = f"{folder}: {error}"
        print(f"error: {failed[folder]}\ngoing on with the other points", file=sys.stderr)

    complete(
        [folders[point.folder] for point in left if point.run],
        lambda missing: _commands(sweep, missing),
        gathers=machine == 0,
        on_failure=report,
    )
    if sweep.evaluation is None:
        print("all samples are there; machine 0 gathers and scores them")
        return list(failed.values())
    for point in left:
        if isinstance(point.what, GeneratorPoint):
            point.what.write(point.folder)
    if unscored := [point.folder for point in left if point.folder not in failed]:
        scoring.evaluate(unscored, sweep.evaluation, sweep.preset.name)
    print(write_tables(sweep.output))
    if importlib.util.find_spec("guided_diffusion.commands.report"):
        importlib.import_module("guided_diffusion.commands.report").write(
            [sweep.output], sweep.output
        )
    return list(failed.values())


def _commands(sweep: Sweep, folders: "Sequence[ChunkFolder]"):
    guided = _is_guided(sweep.args, sweep.preset)
    machine = sweep.args.machine_idx
    settings = [driver.settings_path(folder.folder, machine) for folder in folders]
    log = driver.log_folder(sweep.args, sweep.output) / "sweep_global_rank_{rank}.log"
    return driver.worker_commands(sweep.args, sweep.devices, guided, settings, log)


def _is_scored(point: Point, evaluation: scoring.Evaluation | None) -> bool:
    """Whether the point's metrics.json is of these images and this evaluation."""
    from guided_diffusion.sampling.gathering import SAMPLES_FILE

    record = read_json(join(point.folder, scoring.METRICS_FILE))
    if not isinstance(record, dict) or not exists(join(point.folder, SAMPLES_FILE)):
        return False
    samples = (record.get("point") or {}).get("samples")
    return evaluation is not None and samples == point.samples and evaluation.made(record)
