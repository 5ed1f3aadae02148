"""Build the emoji32 data set: 3,786 Noto Emoji drawings at 32 x 32, labelled by category.

    python datasets/emoji32.py                # fetches the package with npm
    python datasets/emoji32.py --package emoji-datasource-google-16.0.0.tgz --out emoji32.npz

The drawings are the 64 x 64 PNGs of the npm package `emoji-datasource-google` 16.0.0 (images
Apache-2.0, Google's Noto Emoji; see NOTICE). The same package gives the same file, byte for byte.
"""

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from esddpm_io.errors import UserError, run_main
from esddpm_io.help import CommandLine
from esddpm_io.npz import NpzWriter

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
IMAGE_FOLDER = "img/google/64"
SOURCE_SIZE = 64
SIZE = 32
# Sorted by name, so a label does not depend on the order of emoji.json.
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)

ReadMember = Callable[[str], bytes]


def fetch_package(folder: Path) -> Path:
    """Download the package with npm into `folder`; return the path of its tarball.

    Raises:
        UserError: npm is missing or could not get the package.
    """
    if shutil.which("npm") is None:
        raise UserError(
            "npm was not found. Install Node.js, or give --package the tarball or the unpacked "
            f"folder of {PACKAGE} {VERSION}"
        )
    command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"`{' '.join(command)}` failed ({reason}). With no network, give --package a tarball"
        )
    return folder / result.stdout.strip().splitlines()[-1]


def open_package(path: Path) -> ReadMember:
    """Return a function from a member's name to its bytes, for a tarball or an unpacked package.

    A tarball is read once, front to back: members of a compressed file cannot be sought cheaply.

    Raises:
        UserError: `path` is neither, or the tarball is damaged.
    """
    if path.is_dir():
        root = path if (path / "emoji.json").exists() else path / "package"
        return lambda name: (root / name).read_bytes()
    wanted = (f"package/{IMAGE_FOLDER}/", "package/emoji.json", "package/package.json")
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(wanted):
                    members[member.name] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"--package {path}: not a readable tarball or folder of {PACKAGE} {VERSION} ({error})"
        ) from error
    return lambda name: members[f"package/{name}"]


def image_labels(emoji: list[dict]) -> list[tuple[str, int]]:
    """(file name, label) of every drawing, skin-tone variants included, sorted by file name."""
    pairs = []
    for entry in emoji:
        label = CATEGORIES.index(entry["category"])
        for drawing in (entry, *entry.get("skin_variations", {}).values()):
            if drawing["has_img_google"]:
                pairs.append((drawing["image"], label))
    return sorted(pairs)


def reduce_on_white(png: bytes) -> np.ndarray:
    """A 64 x 64 PNG laid on white and averaged over 2 x 2 blocks: uint8 [32, 32, 3], rounded.

    Averaging after the composition weighs each colour by its coverage, so no dark or light rim
    appears where the drawing ends.
    """
    from PIL import Image

    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float64)
    if rgba.shape != (SOURCE_SIZE, SOURCE_SIZE, 4):
        raise UserError(
            f"--package: expected {SOURCE_SIZE} x {SOURCE_SIZE} images, got {rgba.shape}"
        )
    alpha = rgba[..., 3:] / 255.0
    on_white = rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)
    factor = SOURCE_SIZE // SIZE
    blocks = on_white.reshape(SIZE, factor, SIZE, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def build(read: ReadMember, source: str) -> tuple[np.ndarray, np.ndarray]:
    """All drawings of an opened package: images uint8 [N, 32, 32, 3] and labels int64 [N].

    Raises:
        UserError: a wrong version, or a file that the package should have is missing.
    """
    try:
        version = json.loads(read("package.json"))["version"]
        if version != VERSION:
            raise UserError(f"--package {source}: version {version}, but {VERSION} is needed")
        pairs = image_labels(json.loads(read("emoji.json")))
        images = [reduce_on_white(read(f"{IMAGE_FOLDER}/{name}")) for name, _ in pairs]
    except (KeyError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--package {source}: not {PACKAGE} {VERSION}, {error} missing") from error
    return np.stack(images), np.array([label for _, label in pairs], dtype=np.int64)


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--package",
        default="",
        help=f"tarball or unpacked folder of {PACKAGE} {VERSION} (default: fetched with npm)",
    )
    default_out = Path(__file__).resolve().with_name("emoji32.npz")
    parser.add_argument("--out", default=str(default_out), help="npz to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(args.package) if args.package else fetch_package(Path(scratch))
        if not package.exists():
            raise UserError(f"--package {package}: no such file or folder")
        images, labels = build(open_package(package), str(package))
    members = {
        "arr_0": (images.shape, images.dtype),
        "arr_1": (labels.shape, labels.dtype),
    }
    with NpzWriter(args.out, members) as writer:
        writer.append("arr_0", images)
        writer.append("arr_1", labels)
    counts = np.bincount(labels, minlength=len(CATEGORIES))
    print(f"{args.out}: {len(images)} images of {SIZE} x {SIZE}")
    for label, (category, count) in enumerate(zip(CATEGORIES, counts, strict=True)):
        print(f"  {label}  {category:18} {count:5d}")


if __name__ == "__main__":
    run_main(main)
