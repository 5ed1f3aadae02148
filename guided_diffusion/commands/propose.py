"""Propose T' from data: measure a few values on some hundred images, say which comes out best.

    python scripts/propose_t_prime.py --dataset emoji32 --steps 5 --sampler dpmpp_2m_sde

Takes the flags of the driver that say what is sampled, from what and against which reference. All
values of T' are compared on the same images with the same noise. Its last line on stdout is
`T' = N (LOW … HIGH)`: the proposal, and the measured values that cannot be told from the best.
"""

import argparse
import dataclasses
import os
import shlex
import tempfile
import time
from typing import TYPE_CHECKING, Any

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError, check_at_least, terminate_cleanly
from esddpm_io.files import check_output_file, read_json
from esddpm_io.help import CommandLine
from guided_diffusion.commands import driver, scoring
from guided_diffusion.commands.sampler_flags import AUTO, by_name
from guided_diffusion.settings.layers import check_not_empty, parse, require
from guided_diffusion.settings.presets import load_preset

if TYPE_CHECKING:
    import numpy as np

    from guided_diffusion.commands.request import Request, ResolvedRun
    from guided_diffusion.proposal import Proposal
    from guided_diffusion.settings.record import Run

NUM_IMAGES = 300  # of the measurements that docs/t_prime.md tells of
_STEPS, _SAMPLER = 5, "dpmpp_2m_sde"
# Flags of the driver that say what is sampled, and on what; the others are for whole runs.
_FLAGS = {
    *("dataset", "dataset_path", "generator", "limit", "model_path", "classifier_path", "seed"),
    *("use_fp16", "classifier_guidance_scale", "steps", "sampler", "spacing", "eta", "variance"),
    *("clip_denoised", "precision", "override_checkpoint_flags", "devices", "batch_size"),
    *scoring.FLAGS,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """A proposal, what it is of, and what it cost.

    question: what it depends on beside the settings of the search. evaluations: of the network, for
    one image each.
    """

    proposal: "Proposal"
    question: dict[str, str | None]
    images: int
    steps: int
    evaluations: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers, as plain values."""
        return {**dataclasses.asdict(self), "doubts": self.proposal.doubts}

    def __str__(self) -> str:
        """A table, what to know about it, and `T' = N (LOW … HIGH)` as the last line."""
        lines = [f"{'T':>5}'  distance  above the best (95 % interval)"]
        for point in self.proposal.points:
            line = f"{point.t_prime:>6}  {point.distance:8.4g}"
            if point is not self.proposal.best:
                line += f"  {point.difference:+.3g} ({point.low:+.3g} … {point.high:+.3g})"
            lines.append(line)
        lines.append(
            f"{self.images} images, {self.evaluations} network evaluations, {self.seconds:.0f} s"
        )
        lines += [f"note: {doubt}" for doubt in self.proposal.doubts]
        found = self.proposal
        return "\n".join([*lines, f"T' = {found.t_prime} ({found.low} … {found.high})"])


def create_argparser() -> argparse.ArgumentParser:
    """The command line: flags of the driver, as far as they apply, and this command's own."""
    parser = CommandLine(description=__doc__)
    for action in driver.create_argparser()._actions:
        if action.dest in _FLAGS:
            parser._add_action(action)
    parser.set_defaults(steps=_STEPS, sampler=_SAMPLER)
    images = "start images to measure with, spread over all of them"
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help=images)
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--plot", help="PNG of the curve")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args, typed = parse(create_argparser(), argv)
    check_not_empty(args, typed)
    check_at_least(args, {"num_images": 4, "batch_size": 1, "steps": 1})
    for name in ("json", "plot"):
        if getattr(args, name):
            check_output_file(getattr(args, name), flag=f"--{name}")
    preset = load_preset(args.dataset)
    args = argparse.Namespace(**{**vars(driver.create_argparser().parse_args([])), **vars(args)})
    args.t_prime = AUTO
    named = by_name(args, {"t_prime", "steps"}, ("chain_length", "reverse_steps"))
    device = driver.choose_devices(args, typed)[0]
    with tempfile.TemporaryDirectory() as scratch:
        driver.check_files(args, typed, preset, scratch)
        evaluation = scoring.read_flags(args, preset)
        request = driver.request_of(args, typed, preset, named)
        found = measure(request, evaluation, device, args.batch_size, args.num_images, scratch)
    if args.json:
        write_json(args.json, found.to_json())
    if args.plot:
        from guided_diffusion.reporting.figures import save_proposal_png

        title = f"{preset.name}, {args.sampler}, {args.steps} evaluations"
        save_proposal_png(found.proposal, title, args.plot)
    print(f"to sample with it:\n  {_command(args, typed, found.proposal.t_prime)}")
    print(found)


def _command(args: argparse.Namespace, typed: set[str], t_prime: int) -> str:
    """The driver's command line that samples what was measured here, from this T'."""
    said = {name: getattr(args, name) for name in sorted((typed & _FLAGS) | {"steps", "sampler"})}
    flags = {"dataset": args.dataset, **said, "t_prime": t_prime}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return shlex.join(["python", str(driver.DRIVER), "--execute", *argv])


def measure(
    request: "Request",
    evaluation: scoring.Evaluation,
    device: str,
    batch_size: int,
    count: int,
    scratch: str,
) -> Measured:
    """Propose a T' for a request whose own is left open, on `count` of its start images.

    UserError for all that `resolve_run` and the evaluation refuse, before anything is sampled.
    """
    from evaluations.evaluation import reference_gaussian
    from evaluations.features import choose_engine, load_graph, pool_features
    from evaluations.metrics import frechet_distance, gaussian_of
    from guided_diffusion.commands.request import at_t_prime
    from guided_diffusion.proposal import propose
    from guided_diffusion.sampling.trial import Trial

    began = time.monotonic()
    resolved, steps = _with_least_t_prime(request, scratch)
    evaluation.check(min(count, len(resolved.source)))
    choice = {name: evaluation.engine.get(name, "auto") for name in ("backend", "device")}
    graph = load_graph(evaluation.graph)
    engine = choose_engine(graph, **choice)
    reference = reference_gaussian(evaluation.reference, graph, engine)
    trial = Trial(resolved.run, resolved.source, count, device=device, batch_size=batch_size)
    evaluations = 0

    def features_at(t_prime: int) -> "np.ndarray":
        nonlocal evaluations
        if t_prime == 0:
            return pool_features(engine, trial.start_images()[0])
        evaluations += len(trial) * steps
        sampler = at_t_prime(resolved.run, t_prime, steps, request.spacing)
        return pool_features(engine, trial.sample(sampler, f"T' = {t_prime}"))

    proposal = propose(
        features_at,
        lambda features: frechet_distance(reference, gaussian_of(features)),
        resolved.highest_t_prime,
        steps,
    )
    return Measured(
        proposal,
        _question(request, resolved.run, evaluation),
        len(trial),
        steps,
        evaluations,
        time.monotonic() - began,
    )


def _with_least_t_prime(request: "Request", scratch: str) -> "tuple[ResolvedRun, int]":
    """The run that is the same for all T' but for its timesteps; and K."""
    from guided_diffusion.commands.request import resolve_run

    steps = request.steps
    require(bool(steps and steps > 0), f"--steps must be at least 1, not {steps}")
    assert steps is not None
    return resolve_run(dataclasses.replace(request, t_prime=steps), scratch), steps


def _question(
    request: "Request", run: "Run", evaluation: scoring.Evaluation | None
) -> dict[str, str | None]:
    """What a proposal depends on; with T' = K all spacings are the same run."""
    asked: dict[str, str | None] = {"run": run.identity, "spacing": request.spacing}
    if evaluation is not None:
        asked |= {"reference": evaluation.reference, "graph": evaluation.graph}
    return asked


def stored_or_measured(
    request: "Request",
    evaluation: scoring.Evaluation,
    device: str,
    batch_size: int,
    path: str,
    *,
    may_measure: bool,
) -> int:
    """The T' that is kept in the JSON file `path`, or is measured and kept there.

    So a run that goes on, and the other machines of one, take the same. UserError if it is not
    there and this process is not to measure it.
    """
    if read_json(path) is None and may_measure:
        folder = os.path.dirname(path)
        found = measure(request, evaluation, device, batch_size, NUM_IMAGES, folder)
        print(found)
        write_json(path, found.to_json())
        return found.proposal.t_prime
    return kept(request, path, evaluation)


def kept(request: "Request", path: str, evaluation: scoring.Evaluation | None = None) -> int:
    """The T' in a JSON file that was measured for this request; evaluation: by this one, if given.

    UserError if there is none, or it is of something else.
    """
    stored = read_json(path)
    require(
        stored is not None,
        f"--t_prime auto: T' is not known yet ({path} is not there): the driver measures it on "
        f"machine 0 when it starts to sample, propose_t_prime.py --json {path} at once",
    )
    if not (isinstance(stored, dict) and isinstance(stored.get("proposal"), dict)):
        raise UserError(f"--t_prime auto: {path} is damaged: remove it")
    run = _with_least_t_prime(request, os.path.dirname(path))[0].run
    wanted = _question(request, run, evaluation)
    known = stored.get("question")
    require(
        isinstance(known, dict) and all(known.get(name) == wanted[name] for name in wanted),
        f"--t_prime auto: {path} was measured with other settings, images or networks: choose "
        "another --output_dir, or remove it",
    )
    t_prime = int(stored["proposal"]["t_prime"])
    print(f"T' = {t_prime}, as it was measured before ({path})")
    return t_prime
