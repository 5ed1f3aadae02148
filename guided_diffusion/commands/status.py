"""Show where a folder of samples, or a sweep's, stands: done, rate, time left, who does what.

    python scripts/status.py FOLDER --watch

It only reads, so it may be asked at any time and from any machine that has the folder.
"""

import argparse
import os
import sys
import time

from esddpm_io.files import exists, is_blob, join, list_names
from esddpm_io.help import CommandLine
from guided_diffusion.sampling.chunks import SETTINGS_FILE, ChunkFolder
from guided_diffusion.sampling.status import Monitor, Screen

_EVERY_S = 1.0


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("dir", help="the folder that the sampling processes, or a sweep, write to")
    parser.add_argument("--watch", action="store_true", help="keep showing it until it is complete")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    monitor = Monitor(*_folders(args.dir))
    overview = monitor.look()
    if not args.watch:
        print("\n".join(overview.table()))
        return
    screen = Screen(sys.stdout)
    screen.show(overview)
    while not overview.complete:
        time.sleep(_EVERY_S)
        overview = monitor.look()
        if screen.is_due():
            screen.show(overview)
    screen.show(overview)


def _folders(path: str) -> list[ChunkFolder]:
    """The folder itself, or those of a sweep's points in it."""
    if exists(join(path, SETTINGS_FILE)) or not (is_blob(path) or os.path.isdir(path)):
        return [ChunkFolder.load(path)]
    names = sorted(list_names(path))
    points = [join(path, name) for name in names if exists(join(path, name, SETTINGS_FILE))]
    return [ChunkFolder.load(point) for point in points or [path]]
