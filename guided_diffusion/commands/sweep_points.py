"""The points of a sweep: from lists in flags to runs, each checked and with a folder of its own."""

import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from esddpm_io.errors import UserError, did_you_mean
from esddpm_io.files import exists, join, list_names, read_json
from guided_diffusion.commands import driver
from guided_diffusion.commands.sampler_flags import AUTO, OWN_ETA
from guided_diffusion.sampling.point import GeneratorPoint, generator_of
from guided_diffusion.settings.presets import Preset
from guided_diffusion.settings.record import SAMPLERS

if TYPE_CHECKING:
    from esddpm_io.images import ImageSource
    from guided_diffusion.commands.request import Request
    from guided_diffusion.settings.record import Run

SCRATCH = "scratch"
GENERATOR_FOLDER = "generator"
LISTS = {
    *("t_prime", "steps", "sampler", "eta", "classifier_guidance_scale"),
    *("model_path", "dataset_path", "seed"),
}
Values = dict[str, Any]  # one of each list, None where the flag was not given


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination: a run, or the generator's images themselves.

    proposal: file of the measurement that its T' comes from, None if it was typed.
    """

    folder: str
    what: "Run | GeneratorPoint"
    proposal: str | None = None

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


def combinations_of(args: argparse.Namespace) -> list[Values]:
    """One value of each list, in all combinations; UserError with all values that are none."""
    problems: list[str] = []

    def read(name: str, convert: Callable[[str], object], valid: str) -> list:
        text = getattr(args, name)
        values = []
        for part in [] if text is None else text.split(","):
            try:
                values.append(convert(part.strip()))
            except ValueError:
                meant = did_you_mean(part.strip(), valid.split(", "))
                problems.append(f"--{name}: '{part.strip()}' is none of: {valid}{meant}")
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


def resolve_points(
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
        identity = what.identity
        if identity in found:
            point = found[identity]
            found[identity] = dataclasses.replace(point, proposal=own.proposal or point.proposal)
        else:
            stems = {name: _stem(values[name]) for name in several}
            name = there.get(identity) or _name(own, what, stems, driver.is_guided(args, preset))
            found[identity] = Point(join(output, name), what, own.proposal)
    if problems:
        raise UserError("; ".join(problems))
    if "classifier_guidance_scale" in typed and not driver.is_guided(args, preset):
        remarks["--classifier_guidance_scale has no effect: there is no classifier"] = None
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    points = list(found.values())
    assert len({point.folder for point in points}) == len(points)
    return points


def _args_of(
    args: argparse.Namespace, typed: set[str], preset: Preset, values: Values, output: str
) -> argparse.Namespace:
    """The driver's flags for one combination, and `proposal`: where its T' was measured."""
    given = {name: value for name, value in values.items() if value is not None}
    own = argparse.Namespace(**{**vars(args), **given, "proposal": None})
    if own.t_prime == AUTO:
        named = {name: getattr(own, name) for name in ("sampler", "steps", "spacing")}
        own.t_prime, own.proposal = driver.measured_t_prime(
            own, typed, preset, named, output, _proposal_file
        )
    if own.t_prime == SCRATCH:
        own.t_prime, own.start_from_scratch = None, True
        own.num_samples = _count_images(own, typed, preset)
    return own


def _proposal_file(request: "Request") -> str:
    """Of one combination's checkpoint, generator images and sampler."""
    return f"t_prime/{hashlib.sha256(repr(request).encode()).hexdigest()[:16]}.json"


def _count_images(args: argparse.Namespace, typed: set[str], preset: Preset) -> int:
    """As many images from noise as of the generator, where it has any: points are compared."""
    if args.generator:
        return args.limit or args.num_samples
    if args.limit and not exists(driver.files_of(args, typed, preset)["dataset_path"]):
        return args.limit
    count = len(_open_generator(args, typed, preset))
    return min(args.limit or count, count)


def _open_generator(args: argparse.Namespace, typed: set[str], preset: Preset) -> "ImageSource":
    from esddpm_io.images import open_images

    return open_images(driver.files_of(args, typed, preset)["dataset_path"], flag="--dataset_path")


def _generator(args: argparse.Namespace, typed: set[str], preset: Preset) -> GeneratorPoint:
    if args.generator:
        from guided_diffusion.commands.request import open_start

        request = driver.request_of(args, typed, preset, {})
        start = open_start(request)
        return GeneratorPoint(start.path, start.fingerprint(), len(start), request.seed)
    images = _open_generator(args, typed, preset)
    images.check()
    path = driver.files_of(args, typed, preset)["dataset_path"]
    return GeneratorPoint(path, images.fingerprint(), _count_images(args, typed, preset))


def _run(
    args: argparse.Namespace, typed: set[str], preset: Preset, output: str, networks: Any
) -> "tuple[Run, list[str]]":
    from guided_diffusion.commands.request import resolve_run

    named = {name: getattr(args, name) for name in ("sampler", "t_prime", "steps", "spacing")}
    resolved = resolve_run(driver.request_of(args, typed, preset, named), output, networks)
    return resolved.run, resolved.remarks


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
            found[generator.identity] = name
    return found


def _name(
    args: argparse.Namespace,
    what: "Run | GeneratorPoint",
    stems: Values,
    guided: bool,
) -> str:
    """A folder's name: sampler, T' and steps, and what else tells points apart.

    Seed, eta and guidance where they are not the default, files where there are several: so most
    names stay the same when another command adds points.
    """
    if isinstance(what, GeneratorPoint):
        images = stems.get("dataset_path")
        name = f"{GENERATOR_FOLDER}_{images}_{what.contents[:6]}" if images else GENERATOR_FOLDER
        return f"{name}_seed{what.seed}" if what.seed else name
    parts = [f"{driver.point_name(args)}_steps"]
    if what.sampler.eta != OWN_ETA[what.sampler.name]:
        parts.append(f"eta{what.sampler.eta:g}")
    if guided and args.classifier_guidance_scale != driver.DEFAULT_GUIDANCE:
        parts.append(f"guidance{args.classifier_guidance_scale:g}")
    if "model_path" in stems:
        parts += [stems["model_path"], what.network.sha256[:6]]
    if "dataset_path" in stems and what.start.contents:
        parts += [stems["dataset_path"], what.start.contents[:6]]
    if what.seed:
        parts.append(f"seed{what.seed}")
    return "_".join(parts)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path.rstrip("/")))[0]
