"""Pack a folder of images into an .npz that the driver, the samplers and the evaluator read.

    python imagefolder_to_npz.py --folder IMAGES

Files are taken in the order of the numbers in their names; names like 27987_label_762.png carry
labels (arr_1). Grey becomes RGB, alpha is dropped. Images are streamed, so any number will do.
"""

import argparse
import os

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.images import ImageSource, open_images
from esddpm_io.npz import NpzWriter
from esddpm_io.progress import Progress

_IMAGES_AT_ONCE = 64


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--folder", required=True, help="folder of images")
    parser.add_argument("--output", help="the .npz to write; default: FOLDER.npz")
    return parser


def write_npz(images: ImageSource, path: str) -> None:
    """Stream images, and their labels if they have some, into an .npz."""
    layout = {"arr_0": (images.shape, "uint8")}
    if images.has_labels:
        layout["arr_1"] = (images.shape[:1], "int64")
    with Progress(len(images), "images", "packing") as bar, NpzWriter(path, layout) as writer:
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            stop = min(start + _IMAGES_AT_ONCE, len(images))
            writer.append("arr_0", images.read(start, stop))
            if images.has_labels:
                writer.append("arr_1", images.labels(start, stop))
            bar.update(stop - start)


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    if not os.path.isdir(args.folder):
        raise UserError(f"--folder: there is no folder {args.folder}")
    output = args.output or args.folder.rstrip("/") + ".npz"
    if not output.endswith(".npz"):
        raise UserError(f"--output must end in .npz, not {output}")
    check_output_file(output, flag="--output")
    images = open_images(args.folder, flag="--folder")
    write_npz(images, output)
    labels = "with" if images.has_labels else "without"
    print(f"{output}: {len(images)} images {labels} labels")
