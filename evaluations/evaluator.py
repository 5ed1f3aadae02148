"""Score generated images against a reference: Inception Score, FID, sFID, Precision, Recall.

    python evaluations/evaluator.py REF.npz SAMPLE.npz [SAMPLE.npz ...]

Results go to stdout, one a line, and with --json to a file; progress and warnings go to stderr.
Exit code 0 is success, 2 something you can put right, which is named. Under torchrun, mpiexec or
srun the processes share the images and meet in --cache_dir; the first one prints.
"""

import argparse
import os
import signal
import sys
import warnings

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError, run_main, terminate_cleanly
from esddpm_io.files import check_output_file, short_names
from esddpm_io.help import CommandLine
from esddpm_io.launch import Launch, find_launch
from esddpm_io.processes import PARENT_VARIABLE, watch_parent
from esddpm_io.progress import quiet
from evaluations.evaluation import assist, check_launch, run
from evaluations.features import BACKENDS, PRECISIONS
from evaluations.neighbours import ARITHMETICS
from evaluations.network_file import is_network_file
from evaluations.report import Names, as_json, draw_suspicious, lines, table
from evaluations.resizing import RESIZES
from evaluations.scoring import METRICS
from evaluations.settings import Settings


def create_argparser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = CommandLine(description=__doc__)
    images = "an .npz (arr_0 uint8 [N, H, W, 3]), an .npy or a folder of images"
    parser.add_argument("ref_batch", metavar="REF", help=f"reference: {images}")
    parser.add_argument("sample_batch", metavar="SAMPLE", nargs="+", help=f"samples: {images}")
    graph = parser.add_argument_group("features")
    graph.add_argument(
        "--inception_path",
        metavar="GRAPH",
        help="frozen graph, or a .pt or .pt2 network with its TOML beside it; default: "
        "classify_image_graph_def.pb here or in the cache, else downloaded",
    )
    graph.add_argument(
        "--metric_name",
        help="name of the distance of another frozen graph than Inception, for instance "
        "'Frechet distance (emoji32 features)'; default: by the graph's file name",
    )
    graph.add_argument(
        "--backend",
        choices=BACKENDS,
        default=defaults.backend,
        help="auto: the one that can use a GPU, else tensorflow, else torch",
    )
    graph.add_argument("--device", default=defaults.device, help="torch only: cpu, cuda, cuda:1 …")
    graph.add_argument(
        "--devices",
        help="one process on each, as in 0,1 or cpu,cpu; torch only; the figures stay the same",
    )
    graph.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=defaults.precision,
        help="arithmetic of the graph; figures differ by a percent or more",
    )
    graph.add_argument(
        "--allow_mixed_precision",
        action="store_true",
        help="use reference statistics made in another precision",
    )
    graph.add_argument(
        "--resize",
        choices=RESIZES,
        default=defaults.resize,
        help="published: the graph resizes by itself; clean: antialiased bicubic before it",
    )
    graph.add_argument("--batch_size", type=int, default=defaults.batch_size, help="images a step")
    graph.add_argument("--cache_dir", help="keep features here by the content of the images")
    graph.add_argument(
        "--expect",
        type=int,
        metavar="N",
        help="SAMPLE is a folder of chunks that others are writing: wait until it has N images, or "
        "until the process that started this one ends",
    )
    what = parser.add_argument_group("metrics")
    what.add_argument(
        "--metrics",
        nargs="+",
        choices=[*METRICS, "published", "all"],
        metavar="NAME",
        default=defaults.metrics,
        help=f"published, all, or some of {', '.join(METRICS)}",
    )
    what.add_argument(
        "--neighbour_arithmetic",
        choices=ARITHMETICS,
        help="of precision and recall; by default float16, the published rounding, with a frozen "
        "graph, and float32 with a .pt or .pt2",
    )
    what.add_argument(
        "--kid_subsets", type=int, default=defaults.kid_subsets, help="random subsets of KID"
    )
    what.add_argument(
        "--kid_subset_size", type=int, default=defaults.kid_subset_size, help="images of each"
    )
    what.add_argument(
        "--bootstrap",
        type=int,
        default=defaults.bootstrap,
        metavar="GROUPS",
        help="95 %% confidence intervals, from leaving out so many groups of samples in turn (40)",
    )
    what.add_argument("--seed", type=int, default=defaults.seed, help="of subsets and draws")
    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="write results and settings to FILE")
    out.add_argument(
        "--memorization_png",
        metavar="FILE",
        help="with the metric memorization: the samples nearest to the reference beside it",
    )
    out.add_argument("--table", action="store_true", help="print a Markdown table instead")
    return parser


def warn(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    args = vars(create_argparser().parse_args(argv))
    reference, samples = args.pop("ref_batch"), args.pop("sample_batch")
    json_path, as_table = args.pop("json"), args.pop("table")
    metric_name, png_path = args.pop("metric_name"), args.pop("memorization_png")
    for flag, path in [("--json", json_path), ("--memorization_png", png_path)]:
        if path is not None:
            check_output_file(path, flag=flag)
    asked_for = {"memorization", "all"}.intersection(args["metrics"])
    if png_path is not None and (not asked_for or len(samples) > 1):
        raise UserError("--memorization_png takes --metrics memorization and one SAMPLE")
    if png_path is not None and args["expect"] is not None:
        raise UserError("--memorization_png cannot go with --expect: it reads whole sets")
    args["metrics"] = tuple(args["metrics"])
    launch = find_launch()
    check_launch(Settings.of(args), launch)  # every process says the same of what all are given

    if args["expect"] is None:
        terminate_cleanly()
    else:
        # At once: to end tidily would be to wait for the thread that waits for images.
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.SIG_DFL)
        waiting = f"waiting for {args['expect']} images in {', '.join(samples)}"
        print(waiting, file=sys.stderr, flush=True)
        parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
        watch_parent(parent, lambda: os._exit(1))
    if launch.rank > 0:
        _assist(launch, reference, *samples, **args)
        return
    if metric_name and is_network_file(args["inception_path"] or ""):
        warn("--metric_name is left aside: the TOML beside --inception_path names the figures")
    evaluation = run(reference, *samples, tell=warn, launch=launch, **args)

    names = Names(evaluation, metric_name)
    if json_path is not None:
        write_json(json_path, as_json(evaluation, names))
    if png_path is not None:
        draw_suspicious(png_path, evaluation.results[0], reference)
    if as_table:
        print(table(evaluation, names))
        return
    samples = short_names([result.sample for result in evaluation.results])
    for sample, result in zip(samples, evaluation.results, strict=True):
        if len(samples) > 1:
            print(f"{sample}:")
        print("\n".join(lines(result, names)))


def _assist(launch: Launch, *images: str, **settings) -> None:
    """The part of a process that prints nothing, unless something goes wrong in it."""
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            assist(*images, launch=launch, **settings)
    except UserError as error:
        raise UserError(f"process {launch.rank}: {error}") from error


if __name__ == "__main__":
    run_main(main)
