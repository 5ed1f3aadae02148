"""Unpack the images of an .npz into a folder of PNGs, named INDEX_label_LABEL.png or INDEX.png.

    python npz_to_imagefolder.py --dataset imagenet64            the generator images of a preset
    python npz_to_imagefolder.py --dataset samples_all.npz       any .npz with arr_0

The folder is a valid --dataset_path of the driver, and the same images in the same order.
"""

import argparse
import os

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.files import check_output_folder
from esddpm_io.help import CommandLine
from esddpm_io.images import ImageSource, open_images, png_name, save_png
from esddpm_io.progress import Progress
from guided_diffusion.settings.presets import load_preset


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--dataset", default="imagenet64", help="a preset, a preset file, or an .npz of images"
    )
    parser.add_argument("--output", help="the folder to write; default: the .npz's name without it")
    return parser


def images_of(dataset: str) -> str:
    """The .npz that `--dataset` names."""
    if dataset.endswith(".npz"):
        return dataset
    path = load_preset(dataset).generator_images
    if path is None:
        raise UserError(f"--dataset: the preset {dataset} names no generator_images")
    return path


def write_folder(images: ImageSource, folder: str) -> None:
    """Write every image as a PNG; each appears whole, and one that is there is left alone."""
    with Progress(len(images), "images", "unpacking") as bar:
        for index in range(len(images)):
            labels = images.labels(index, index + 1)
            path = os.path.join(folder, png_name(index, None if labels is None else labels[0]))
            if not os.path.exists(path):
                save_png(path, images.read(index, index + 1)[0])
            bar.update(1)


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    path = images_of(args.dataset)
    images = open_images(path, flag="--dataset")
    folder = args.output or path.removesuffix(".npz")
    check_output_folder(folder, flag="--output")
    write_folder(images, folder)
    print(f"{folder}: {len(images)} images")
