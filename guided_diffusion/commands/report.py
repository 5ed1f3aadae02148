"""Put finished runs on one page: a table, plots, samples at every T', how to repeat them.

    python scripts/report.py DIR

DIR is a folder of a finished run, a sweep's, or one that has folders of runs in it. Nothing is
sampled again. Writes report.html, which needs no other file, and sweep.png and strip.png.
"""

import argparse

from esddpm_io.errors import check_at_least, terminate_cleanly
from esddpm_io.files import absolute, check_output_folder, join
from esddpm_io.help import CommandLine

PAGE_FILE, SWEEP_PLOT, STRIP_PLOT = "report.html", "sweep.png", "strip.png"
NEAREST = 6  # samples: enough to see whether the network copies


def create_argparser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("dirs", metavar="DIR", nargs="+", help="folder of a run, of a sweep, or of several runs")
    samples = "samples that the nearest real images are shown of; 0: the features are not computed"
    add("--nearest", type=int, default=NEAREST, help=samples)
    add("--output_dir", help="folder for the page and the plots; default: the first DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    check_at_least(args, {"nearest": 0})
    write(args.dirs, args.output_dir or args.dirs[0], args.nearest)


def write(dirs: list[str], output_dir: str, nearest: int = NEAREST) -> None:
    """Write report.html, sweep.png and strip.png of the runs in `dirs` to `output_dir`.

    dirs: folders of runs (metrics.json, samples_all.npz), or with such folders in them. nearest:
    the number of samples that real images are looked for. UserError, before anything is written,
    for what is no finished run.
    """
    from guided_diffusion.reporting.figures import save_strip_png, save_sweep_png
    from guided_diffusion.reporting.nearest import nearest_real
    from guided_diffusion.reporting.page import write_page
    from guided_diffusion.reporting.points import read_groups
    from guided_diffusion.reporting.strips import strips_of

    output_dir = absolute(output_dir)
    check_output_folder(output_dir, flag="--output_dir")
    groups = read_groups(dirs)
    strips = [strips_of(group) for group in groups]
    save_sweep_png(groups, join(output_dir, SWEEP_PLOT))
    save_strip_png([strip for own in strips for strip in own], join(output_dir, STRIP_PLOT))
    near = [nearest_real(group, nearest) for group in groups]
    page = join(output_dir, PAGE_FILE)
    write_page(groups, strips, near, page)
    print(f"report: {page}")
