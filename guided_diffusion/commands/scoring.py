"""What finished samples are scored with, and metrics beside all that produced them."""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError
from esddpm_io.files import absolute, exists, is_blob, join, read_json, sha256
from esddpm_io.launch import without_launch
from esddpm_io.processes import PARENT_VARIABLE, run_to_end, running
from guided_diffusion.sampling.chunks import SETTINGS_FILE, ChunkFolder
from guided_diffusion.sampling.gathering import METRICS_FILE, SAMPLES_FILE, how_sampled
from guided_diffusion.sampling.point import generator_of, point_of_run
from guided_diffusion.settings.presets import Preset
from guided_diffusion.settings.provenance import provenance

if TYPE_CHECKING:
    from guided_diffusion.settings.record import Run

PROPOSAL_FILE = "t_prime.json"  # of --t_prime auto
EVALUATOR = Path(__file__).resolve().parents[2] / "evaluations" / "evaluator.py"
BACKENDS = ("auto", "tensorflow", "torch")  # the evaluator's, which is not imported
_POLL_S = 0.2
FLAGS = ("ref_batch", "inception_path", "eval_backend", "eval_device", "eval_cache_dir")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What samples are scored with. graph None: the 2015 Inception graph.

    engine: the evaluator's flags backend, device, cache_dir and bootstrap, as far as given.
    """

    reference: str
    graph: str | None
    metric_name: str | None
    engine: dict[str, str | int]

    def check(self, count: int | None = None) -> None:
        """Fetch the graph if need be; UserError, with our flags, for what could only fail later.

        count: how many samples there will be, where that is known.
        """
        from evaluations.evaluation import check_inputs

        try:
            notes = check_inputs(self.reference, count, inception_path=self.graph, **self.engine)
        except UserError as error:
            # What the evaluator says of its flags, under the names that they have here.
            text = re.sub(r"--(backend|device|cache_dir)\b", r"--eval_\1", str(error))
            raise UserError(f"{text}; --not_eval_metrics leaves the evaluation out") from error
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)

    def inputs(self) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of reference and graph, as they are now."""
        from evaluations.features import cached_graph_path

        paths = {"reference": self.reference, "graph": self.graph or str(cached_graph_path())}
        return {name: {"path": path, "sha256": sha256(path)} for name, path in paths.items()}

    @functools.cached_property
    def _hashes(self) -> set[str]:
        return {entry["sha256"] for entry in self.inputs().values()}

    def made(self, record: Mapping[str, Any]) -> bool:
        """Whether a metrics.json has figures of this evaluation, wherever features were kept.

        And of files with the contents that reference and graph have now.
        """

        def decisive(scoring: Mapping[str, Any]) -> dict[str, Any]:
            engine = {k: v for k, v in scoring["engine"].items() if k != "cache_dir"}
            return {**scoring, "engine": engine}

        inputs = record.get("inputs") or {}  # not in the oldest
        then = {inputs[name]["sha256"] for name in ("reference", "graph") if name in inputs}
        same = decisive(record["scoring"]) == decisive(dataclasses.asdict(self))
        return same and then == self._hashes

    def score(self, *samples: str) -> dict[str, Any]:
        """Run the evaluator, whose results go to stdout; what it writes with --json.

        All in one process, which computes the reference's features once. SystemExit with its exit
        code if it fails.
        """
        with tempfile.TemporaryDirectory() as scratch:
            result = join(scratch, "metrics.json")
            code = run_to_end(self._command(samples, json=result), without_launch())
            if code:
                where = ", ".join(samples)
                print(f"error: the evaluation failed; the samples are in {where}", file=sys.stderr)
                sys.exit(code)
            found = read_json(result)
        assert isinstance(found, dict)
        return found

    @contextlib.contextmanager
    def beside(self, chunks: str, count: int) -> Iterator[Callable[[str], dict[str, Any]]]:
        """Start the evaluator on a folder of chunks that are still being sampled, `count` images.

        Gives what is called in place of `score` once they are gathered, in a file that is named to
        it: it shows what the evaluator has said so far, and waits for the rest.
        """
        if not is_blob(chunks):
            os.makedirs(chunks, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            result, said, figures = (join(scratch, name) for name in ("json", "stderr", "stdout"))
            argv = self._command([chunks], json=result, expect=count)
            with open(said, "wb") as stderr, open(figures, "wb") as stdout:
                env = {**without_launch(), PARENT_VARIABLE: str(os.getpid())}
                with running(argv, stdout=stdout, stderr=stderr, env=env) as process:

                    def finish(samples: str) -> dict[str, Any]:
                        _pass_on(said, process)
                        if process.returncode:
                            print("the samples are evaluated once more", file=sys.stderr)
                            return self.score(samples)
                        print(Path(figures).read_text(), end="", flush=True)
                        found = read_json(result)
                        assert isinstance(found, dict)
                        [scored] = found["results"]
                        scored["sample"] = samples
                        warnings = scored["warnings"]
                        scored["warnings"] = [note.replace(chunks, samples) for note in warnings]
                        return found

                    yield finish

    def _command(self, samples: Sequence[str], **flags: str | int) -> list[str]:
        flags |= {"inception_path": self.graph, "metric_name": self.metric_name, **self.engine}
        argv = [sys.executable, str(EVALUATOR), self.reference, *samples]
        for flag, value in flags.items():
            argv += [f"--{flag}", str(value)] if value else []
        return argv


def _pass_on(said: str, process: subprocess.Popen) -> None:
    """Show on stderr what a process has written to a file and goes on to write, until its end."""
    with open(said, encoding="utf-8", errors="replace") as stream:
        ended = False
        while not ended:
            ended = process.poll() is not None
            print(stream.read(), end="", file=sys.stderr, flush=True)
            time.sleep(0 if ended else _POLL_S)


def add_flags(add: Callable[..., object]) -> None:
    """The flags that `read_flags` takes."""
    add("--ref_batch", help="reference batch instead of the preset's")
    add("--inception_path", help="feature graph for the evaluator instead of the preset's")
    add("--eval_backend", choices=BACKENDS, help="engine of the evaluator")
    add("--eval_device", help="the evaluator's device, for torch: cpu, cuda, cuda:1 …")
    add("--eval_cache_dir", help="folder where the evaluator keeps features")


def read_flags(args: argparse.Namespace, preset: Preset | None) -> Evaluation:
    """What the flags and the preset say; UserError if there is no reference."""
    given = absolute(args.ref_batch) if args.ref_batch else None
    reference = given or (preset.reference_batch if preset else None)
    if not reference:
        why = f"the preset {preset.name} names no" if preset else "no --dataset names a"
        raise UserError(f"--ref_batch: {why} reference batch: give one")
    own = preset.feature_graph if preset else None
    graph = absolute(args.inception_path) if args.inception_path else own
    # The preset's name is for the features of its own graph.
    name = preset.metric_name if preset and graph and graph == own else None
    engine = {"backend": args.eval_backend, "device": args.eval_device}
    engine["cache_dir"] = absolute(args.eval_cache_dir) if args.eval_cache_dir else None
    return Evaluation(reference, graph, name, {k: v for k, v in engine.items() if v})


def evaluate(
    folders: Sequence[str],
    evaluation: Evaluation,
    dataset: str | None,
    score: Callable[..., dict[str, Any]] | None = None,
) -> None:
    """Score the gathered samples of folders; write `metrics.json` with all that produced them.

    score: what stands in for `evaluation.score`.
    """
    files = (join(folder, SAMPLES_FILE) for folder in folders)
    scores = (score or evaluation.score)(*files)
    inputs = evaluation.inputs()
    for folder, result in zip(folders, scores["results"], strict=True):
        metrics = join(folder, METRICS_FILE)
        of_folder = {**scores, "results": [result]}
        write_json(metrics, _record(folder, evaluation, inputs, dataset, of_folder))
        print(f"metrics and settings: {absolute(metrics)}")


def _record(
    folder: str,
    evaluation: Evaluation,
    inputs: Mapping[str, Any],
    dataset: str | None,
    scores: Mapping[str, Any],
) -> dict[str, Any]:
    sampled = ChunkFolder.load(folder) if exists(join(folder, SETTINGS_FILE)) else None
    run = sampled.run if sampled else None
    sampling = how_sampled(sampled) if sampled else None
    generator = generator_of(folder)
    point = generator.values() if generator else None
    made = generator.contents if generator and generator.seed is not None else None
    if run and sampling:
        point = point_of_run(run, sampling["seconds_per_image"])
        made = run.start.contents if run.start.kind == "generator" else None
    return {
        "dataset": dataset,
        "point": point,
        "provenance": provenance(),
        "run": run.to_json() if run else None,
        "sampling": sampling,
        "t_prime_proposal": read_json(join(folder, PROPOSAL_FILE)),
        "inputs": {**hash_inputs(run, point["start_images"] if point else None, made), **inputs},
        "scoring": dataclasses.asdict(evaluation),
        "evaluation": scores,
    }


def hash_inputs(
    run: "Run | None", start_images: str | None, made: str | None
) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of what was sampled from; of a checkpoint, that of its tensors, as recorded.

    made: the recorded hash of the generator that makes the start images, None if a file has them.
    """
    hashes = {}
    if run is not None:
        hashes["checkpoint"] = {"path": run.network.path, "sha256": run.network.sha256}
        if run.guidance:
            classifier = run.guidance.classifier
            hashes["classifier"] = {"path": classifier.path, "sha256": classifier.sha256}
    if start_images:
        hashes["start_images"] = {"path": start_images, "sha256": made or sha256(start_images)}
    return hashes
