"""Turn an LSUN category (an LMDB of JPEG or WebP files) into a folder of PNGs for training.

    python datasets/lsun_bedroom.py bedroom_train_lmdb lsun_bedroom --image_size 256

Get the LMDB with the LSUN project's own download tool (https://github.com/fyu/lsun) and unpack it.
Images are cropped to their centre square, reduced, and called bedroom_0000000.png … in the order of
the database. A second run goes on where the first stopped. Needs the lmdb package.
"""

import argparse
import io
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from esddpm_io.errors import UserError, run_main
from esddpm_io.help import CommandLine
from esddpm_io.images import decode_image, save_png
from esddpm_io.progress import Progress

# Images that wait for a thread each: keeps all busy without reading the database into memory.
_AHEAD = 8


def open_database(path: str):
    """The LMDB environment at `path`, read only; UserError if there is none or no lmdb package."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError("reading an LMDB needs a package: pip install lmdb") from error
    if not Path(path).is_dir():
        raise UserError(f"lmdb_path: there is no folder {path}")
    try:
        return lmdb.open(path, readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise UserError(f"lmdb_path: {path} is not an LMDB ({error})") from error


def entries(database, limit: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(index, key, file contents) of the first `limit` entries (0: all)."""
    with database.begin() as transaction, transaction.cursor() as cursor:
        for index, (key, value) in enumerate(itertools.islice(cursor, limit or None)):
            yield index, key, value


def convert(contents: bytes, path: Path, image_size: int) -> str | None:
    """Write one image; returns what is wrong with it, if it cannot be read."""
    from guided_diffusion.image_datasets import center_crop_arr

    try:
        rgb = Image.fromarray(decode_image(io.BytesIO(contents)))
    except UserError as error:
        return str(error)
    save_png(path, center_crop_arr(rgb, image_size))
    return None


def convert_all(
    database, out_dir: Path, image_size: int, prefix: str, limit: int, threads: int
) -> tuple[int, int]:
    """Write all images that are not there yet; returns how many there are and were unreadable."""
    total = database.stat()["entries"]
    total = min(total, limit) if limit else total
    unreadable = 0
    with ThreadPoolExecutor(threads) as pool, Progress(total, "images", "converting") as progress:

        def start(entry):
            index, key, contents = entry
            path = out_dir / f"{prefix}_{index:07d}.png"
            done = path.exists()
            return key, None if done else pool.submit(convert, contents, path, image_size)

        waiting = map(start, entries(database, limit))
        while batch := list(itertools.islice(waiting, threads * _AHEAD)):
            for key, job in batch:
                problem = job.result() if job else None
                if problem:
                    unreadable += 1
                    print(f"skipping {key.decode(errors='replace')}: {problem}")
            progress.update(len(batch))
    return total, unreadable


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.image_size < 1:
        raise UserError(f"--image_size is {args.image_size}, it must be at least 1")
    if "_" in args.prefix or "/" in args.prefix:
        raise UserError(f"--prefix is {args.prefix}: it is the label, without _ and /")
    database = open_database(args.lmdb_path)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    total, unreadable = convert_all(
        database, out_dir, args.image_size, args.prefix, args.limit, args.threads
    )
    print(
        f"{total - unreadable} images in {out_dir}" + f", {unreadable} skipped" * (unreadable > 0)
    )


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("lmdb_path", help="the folder of data.mdb")
    parser.add_argument("out_dir", help="folder for the PNGs")
    parser.add_argument(
        "--image_size",
        "--image-size",
        type=int,
        default=256,
        help="height and width of the images, pixels",
    )
    parser.add_argument("--prefix", default="bedroom", help="start of the names: the class label")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many (0: all)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="images decoded at once"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
