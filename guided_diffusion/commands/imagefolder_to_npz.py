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
from esddpm_io.images import open_images, write_npz
from esddpm_io.progress import Progress


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--folder", required=True, help="folder of images")
    parser.add_argument("--output", help="the .npz to write; default: FOLDER.npz")
    return parser


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
    with Progress(len(images), "images", "packing") as bar:
        write_npz(output, images, len(images), bar.update)
    labels = "with" if images.has_labels else "without"
    print(f"{output}: {len(images)} images {labels} labels")
