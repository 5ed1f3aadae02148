"""Make a reference batch of one's own images, in the published format.

    python evaluations/make_reference.py IMAGES OUT.npz

OUT.npz gets `mu`, `sigma`, `mu_s`, `sigma_s` of all images and a random 10,000 of them as `arr_0`
(with labels, if there are any, as `arr_1`). It also says which network they are of.
"""

import argparse
import os
import sys

import numpy as np

from esddpm_io.errors import UserError, run_main, terminate_cleanly
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.images import ImageSource
from esddpm_io.npz import NpzWriter
from evaluations.features import BACKENDS, PRECISIONS, Features, choose_engine, extract, load_graph
from evaluations.inputs import Images, open_set
from evaluations.resizing import PUBLISHED_RESIZE, RESIZES

_ROWS = 256  # images copied at a time


def make_reference(
    images: Images,
    out: str | os.PathLike,
    *,
    keep: int = 10_000,
    seed: int = 0,
    inception_path: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "float32",
    resize: str = PUBLISHED_RESIZE,
    batch_size: int = 64,
    compressed: bool = False,
) -> None:
    """Write the reference batch of `images` (an .npz, .npy, folder or uint8 array) to `out`.

    `keep` images are drawn with `seed`, all where there are no more. `UserError` for anything
    the caller can put right.
    """
    if not str(out).endswith(".npz"):
        raise UserError(f"OUT: {out} must end in .npz")
    for flag, value, least in [
        ("--keep", keep, 1),
        ("--batch_size", batch_size, 1),
        ("--seed", seed, 0),
    ]:
        if value < least:
            raise UserError(f"{flag} {value}: it must be at least {least}")
    check_output_file(out, flag="OUT")
    image_set = open_set(images, flag="IMAGES")
    name, source = os.path.basename(image_set.name.rstrip("/")), image_set.source
    source.check()
    if len(source) < 2:
        raise UserError(f"IMAGES: {image_set.name} has 1 image, a covariance needs 2 or more")
    graph = load_graph(inception_path)
    engine = choose_engine(graph, backend, precision, device, resize)
    features = extract(engine, source, name=name, batch_size=batch_size, keep_pool=False)
    for gaussian in (features.pool_gaussian, features.spatial_gaussian):
        if singular := gaussian.too_few():
            print(f"warning: {name}: {singular}: the covariance is singular", file=sys.stderr)
    rng = np.random.default_rng(seed)
    # In rising order, so that compressed files are unpacked once.
    kept = np.sort(rng.choice(len(source), min(keep, len(source)), replace=False))
    making = {"precision": precision, "network": graph.digest}
    if resize != PUBLISHED_RESIZE:
        making["resize"] = resize
    _write(out, source, kept, features, making, compressed)


def _write(
    out: str | os.PathLike,
    source: ImageSource,
    kept: np.ndarray,
    features: Features,
    making: dict[str, str],
    compressed: bool,
) -> None:
    statistics = {
        "mu": features.pool_gaussian.mean,
        "sigma": features.pool_gaussian.full_covariance(),
        # Of width 0 for a network without them
        "mu_s": features.spatial_gaussian.mean,
        "sigma_s": features.spatial_gaussian.full_covariance(),
        **{f"feature_{name}": np.array([text]) for name, text in making.items()},
    }
    arrays = {"arr_0": ((len(kept), *source.shape[1:]), np.uint8)}
    if source.has_labels:
        arrays["arr_1"] = ((len(kept),), np.int64)
    arrays.update({name: (value.shape, value.dtype) for name, value in statistics.items()})
    with NpzWriter(out, arrays, compressed=compressed) as writer:
        for start in range(0, len(source), _ROWS):
            stop = min(start + _ROWS, len(source))
            rows = kept[(kept >= start) & (kept < stop)] - start
            if len(rows):
                writer.append("arr_0", source.read(start, stop)[rows])
            if source.has_labels:  # all of them: their CRC-32 is known at the last
                writer.append("arr_1", source.labels(start, stop)[rows])
        for name, value in statistics.items():
            writer.append(name, value)


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("images", metavar="IMAGES", help="an .npz, an .npy or a folder of images")
    parser.add_argument("out", metavar="OUT.npz", help="reference batch to write")
    parser.add_argument("--keep", type=int, default=10_000, help="images in arr_0")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these")
    parser.add_argument(
        "--inception_path",
        metavar="GRAPH",
        help="frozen graph, .pt or .pt2; default: as for evaluator.py",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the graph; auto: what can use a GPU",
    )
    parser.add_argument("--device", default="auto", help="torch only: cpu, cuda, cuda:1 …")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="arithmetic of the graph, which the file tells",
    )
    parser.add_argument(
        "--resize", choices=RESIZES, default=PUBLISHED_RESIZE, help="as for evaluator.py"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images a step")
    parser.add_argument("--compressed", action="store_true", help="deflate the file's arrays")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = vars(create_argparser().parse_args(argv))
    make_reference(args.pop("images"), args.pop("out"), **args)


if __name__ == "__main__":
    run_main(main)
