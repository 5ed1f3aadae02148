"""Write the class of every ImageNet validation image, for imagenet_dataset.py.

    python process_labels.py --valprep valprep.sh
    python process_labels.py --ground_truth ILSVRC2012_validation_ground_truth.txt --meta meta.mat

valprep.sh is the widely used script that moves the images into one folder a class; the other two
files are in the data folder of the official development kit. Classes are numbered 0 … 999 in the
order of their WordNet ids, as in every published model. The table has a line `NAME CLASS` an image.
"""

import argparse
import re
import zlib

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError, first_line, terminate_cleanly
from esddpm_io.files import check_output_file, open_binary
from esddpm_io.help import CommandLine

NUM_CLASSES = 1000
# What SciPy raises for files that are cut, garbled, or of a version or content of another kind.
_BROKEN_MAT = (OSError, LookupError, ValueError, TypeError, NotImplementedError, zlib.error)
_MOVE = re.compile(r"^\s*mv\s+(ILSVRC2012_val_\d{8}\.JPEG)\s+(n\d{8})/?\s*$", re.MULTILINE)


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--valprep", help="the script valprep.sh")
    source.add_argument("--ground_truth", help="ILSVRC2012_validation_ground_truth.txt")
    parser.add_argument("--meta", help="meta.mat, with --ground_truth")
    parser.add_argument("--output", default="imagenet_val_labels.txt", help="table to write")
    return parser


def labels_from_valprep(path: str) -> dict[str, int]:
    """Class by file name from the `mv` lines of valprep.sh."""
    moves = _MOVE.findall(_read(path, "--valprep"))
    classes = {wnid: index for index, wnid in enumerate(sorted({wnid for _, wnid in moves}))}
    if len(classes) != NUM_CLASSES:
        raise UserError(
            f"--valprep: {path} moves images into {len(classes)} classes, not {NUM_CLASSES}: it is "
            "not the whole script (lines `mv ILSVRC2012_val_00000001.JPEG n01751748/`)"
        )
    return {name: classes[wnid] for name, wnid in sorted(moves)}


def labels_from_ground_truth(path: str, meta: str) -> dict[str, int]:
    """Class by file name from the development kit: a line of `path` is the id of one image."""
    classes = classes_by_id(meta)
    labels = {}
    for number, line in enumerate(_read(path, "--ground_truth").split(), start=1):
        if not line.isdecimal() or int(line) not in classes:
            raise UserError(
                f"--ground_truth: line {number} of {path} is '{line}', not an id 1 … {NUM_CLASSES}"
            )
        labels[f"ILSVRC2012_val_{number:08d}.JPEG"] = classes[int(line)]
    if not labels:
        raise UserError(f"--ground_truth: {path} is empty")
    return labels


def classes_by_id(meta: str) -> dict[int, int]:
    """Class (the rank of its WordNet id) by the development kit's own id, 1 … 1000."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    with open_binary(meta, flag="--meta") as stream:
        try:
            synsets = loadmat(stream, squeeze_me=True)["synsets"]
            wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        except (*_BROKEN_MAT, MatReadError) as error:
            raise UserError(
                f"--meta: {meta} is not the development kit's meta.mat, or not all of it: "
                f"{first_line(error)}"
            ) from error
    # Ids above 1000 are inner nodes of the hierarchy, which no image has.
    leaves = {number: wnid for number, wnid in wnids.items() if number <= NUM_CLASSES}
    if len(set(leaves.values())) != NUM_CLASSES:
        raise UserError(f"--meta: {meta} has {len(leaves)} classes, not {NUM_CLASSES}")
    order = {wnid: index for index, wnid in enumerate(sorted(leaves.values()))}
    return {number: order[wnid] for number, wnid in leaves.items()}


def _read(path: str, flag: str) -> str:
    with open_binary(path, flag=flag) as stream:
        try:
            return stream.read().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag}: cannot read {path}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    if args.ground_truth and not args.meta:
        raise UserError("--meta: give the development kit's meta.mat with --ground_truth")
    check_output_file(args.output, flag="--output")
    if args.valprep:
        labels = labels_from_valprep(args.valprep)
    else:
        labels = labels_from_ground_truth(args.ground_truth, args.meta)
    with atomic_path(args.output) as temporary:
        lines = (f"{name} {label}\n" for name, label in labels.items())
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{args.output}: classes of {len(labels)} images")
