"""ImageNet's validation images with their classes: as a data set, and as an .npz.

    python imagenet_dataset.py --folder VAL --labels imagenet_val_labels.txt --image_size 64

--folder holds the ILSVRC2012_val_….JPEG files, in one folder or in one a class; --labels is the
table that process_labels.py writes. Images are cut to a square at their centre and scaled. The
.npz (arr_0, arr_1) is a --dataset_path of the driver, or a reference for the evaluator.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.images import decode_image
from esddpm_io.npz import NpzWriter
from esddpm_io.progress import Progress


class ImageNetValidation:
    """Item i is (uint8 [image_size, image_size, 3], class), in the order of the file names.

    Raises UserError if the table cannot be read, or names none of the folder's files, or a file
    of the folder is not in the table; on access, if an image cannot be read.
    """

    def __init__(self, folder: str, labels: str, image_size: int):
        self.image_size = image_size
        table = read_labels(labels)
        files = sorted(Path(folder).rglob("*.JPEG"), key=lambda path: path.name)
        if not files:
            raise UserError(f"--folder: there are no .JPEG files in {folder}")
        unknown = [path.name for path in files if path.name not in table]
        if unknown:
            raise UserError(f"--labels: {labels} has no class for {unknown[0]} of {folder}")
        self.items = [(path, table[path.name]) for path in files]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        from guided_diffusion.image_datasets import center_crop_arr

        path, label = self.items[index]
        try:
            image = Image.fromarray(decode_image(path))
        except UserError as error:
            raise UserError(f"--folder: cannot read the image {path}: {error}") from error
        return center_crop_arr(image, self.image_size), label


def read_labels(path: str) -> dict[str, int]:
    """Class by file name from a table with a line `NAME CLASS` an image."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--labels: cannot read {path}: {error.strerror}") from error
    table = {}
    for number, line in enumerate(lines, start=1):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise UserError(f"--labels: line {number} of {path} is not `NAME CLASS`: {line[:80]}")
        table[name] = int(label)
    return table


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--folder", required=True, help="folder of the validation images")
    parser.add_argument("--labels", default="imagenet_val_labels.txt", help="table of classes")
    parser.add_argument("--image_size", type=int, default=64, help="height and width, pixels")
    parser.add_argument("--output", help="npz to write; default: imagenet_val_SIZE.npz")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    if args.image_size < 1:
        raise UserError(f"--image_size must be at least 1, not {args.image_size}")
    data = ImageNetValidation(args.folder, args.labels, args.image_size)
    output = args.output or f"imagenet_val_{args.image_size}.npz"
    check_output_file(output, flag="--output")
    size = args.image_size
    layout = {"arr_0": ((len(data), size, size, 3), "uint8"), "arr_1": ((len(data),), "int64")}
    with Progress(len(data), "images", "packing") as bar, NpzWriter(output, layout) as writer:
        for index in range(len(data)):
            image, label = data[index]
            writer.append("arr_0", image[None])
            writer.append("arr_1", np.array([label]))
            bar.update(1)
    print(f"{output}: {len(data)} images with labels")
