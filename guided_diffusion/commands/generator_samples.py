"""Turn any generator into the npz of images that the driver starts from.

    python scripts/generator_samples.py my_gan:sample --num_samples 50000 --out my_gan.npz

`sample(n, seed)` is your own function: it returns n images, uint8 [n, H, W, 3], or a pair of images
and integer labels [n]. It is called once a batch, each time with another seed that follows from
--seed, and each batch is written before the next is made. MODULE is a module that Python finds
from the folder you stand in, or the path of a .py file.
"""

import argparse
from collections.abc import Callable

import numpy as np

from esddpm_io.errors import UserError, check_at_least, terminate_cleanly
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.images import check_image_array
from esddpm_io.npz import NpzWriter
from esddpm_io.progress import Progress


def batch_seed(seed: int, batch: int) -> int:
    """The seed of a batch, 0 … 2³²-1: batches of all seeds draw unrelated numbers."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])


def checked_batch(result: object, n: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A function's result as (uint8 [n, H, W, 3], int64 [n] or None).

    Raises:
        UserError: the result is anything else; the message says what came and what should.
    """
    images, labels = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    images = np.asarray(images)
    check_image_array(images.shape, images.dtype, f"what {name}({n}, seed) gave", count=n)
    if labels is None:
        return images, None
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise UserError(
            f"{name}({n}, seed) gave {labels.dtype}{list(labels.shape)} for the labels; "
            f"it must give integers [{n}]"
        )
    return images, labels.astype(np.int64)


def write_samples(
    function: Callable, name: str, out: str, num_samples: int, batch_size: int, seed: int
) -> None:
    """Call `function` batch by batch and stream what it returns into the npz `out`.

    Raises:
        UserError: a batch is not images, or does not fit the first one.
    """

    def batches():
        for number, start in enumerate(range(0, num_samples, batch_size)):
            n = min(batch_size, num_samples - start)
            yield checked_batch(function(n, batch_seed(seed, number)), n, name)

    made = batches()
    first, first_labels = next(made)
    arrays = {"arr_0": ((num_samples, *first.shape[1:]), np.uint8)}
    if first_labels is not None:
        arrays["arr_1"] = ((num_samples,), np.int64)
    with (
        NpzWriter(out, arrays) as writer,
        Progress(num_samples, "images", "generator") as progress,
    ):
        images, labels = first, first_labels
        while images is not None:
            if images.shape[1:] != first.shape[1:] or (labels is None) != (first_labels is None):
                raise UserError(f"{name}: a batch differs in image size or labels from the first")
            writer.append("arr_0", images)
            if labels is not None:
                writer.append("arr_1", labels)
            progress.update(len(images))
            images, labels = next(made, (None, None))


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="f(n, seed) -> images")
    parser.add_argument("--num_samples", type=int, default=10000, help="how many images")
    parser.add_argument("--batch_size", type=int, default=64, help="most images asked for at once")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed asks for the same images"
    )
    parser.add_argument("--out", default="generator_samples.npz", help="npz to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    check_at_least(args, {"num_samples": 1, "batch_size": 1, "seed": 0})
    check_output_file(args.out, flag="--out")
    from guided_diffusion.sampling.generators import load_function

    function = load_function(args.function, "MODULE:FUNCTION")
    write_samples(function, args.function, args.out, args.num_samples, args.batch_size, args.seed)
    print(f"{args.out}: {args.num_samples} images of {args.function}")
