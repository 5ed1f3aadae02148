"""Sample a VAE: the npz of images (and labels) that the driver starts from.

    python scripts/vae_sample.py --model_path scripts/models/emoji32_vae.pt --num_samples 3786

Codes come from the fitted prior and labels as often as in the training data; none is thrown away.
Image number i depends on --seed and i alone, whatever the batch size.
"""

import argparse

from esddpm_io.errors import check_at_least
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from guided_diffusion.train_options import check_seed


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--model_path", default="", help="checkpoint vaeNNNNNN.pt of vae_train.py")
    parser.add_argument("--num_samples", type=int, default=10000, help="how many images")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images a step; images do not depend on it"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--out", default="vae_samples.npz", help="npz to write")
    parser.add_argument("--compressed", action="store_true", help="deflate the file's arrays")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_at_least(args, {"num_samples": 1, "batch_size": 1})
    check_output_file(args.out, flag="--out")
    check_seed(args.seed)
    write_samples(args)


def write_samples(args: argparse.Namespace) -> None:
    """Sample the checkpoint of checked flags into its npz."""
    import numpy as np

    from esddpm_io.npz import NpzWriter
    from esddpm_io.progress import Progress
    from guided_diffusion import dist_util
    from guided_diffusion.vae_sampling import load_vae, sample_range

    vae = load_vae(args.model_path).to(dist_util.dev())
    shape = (args.num_samples, vae.image_size, vae.image_size, 3)
    arrays = {"arr_0": (shape, np.uint8)}
    if vae.num_classes:
        arrays["arr_1"] = ((args.num_samples,), np.int64)
    with (
        NpzWriter(args.out, arrays, compressed=args.compressed) as writer,
        Progress(args.num_samples, "images", "vae") as progress,
    ):
        for start in range(0, args.num_samples, args.batch_size):
            stop = min(start + args.batch_size, args.num_samples)
            images, labels = sample_range(vae, args.seed, start, stop)
            writer.append("arr_0", images)
            if vae.num_classes:
                writer.append("arr_1", labels)
            progress.update(stop - start)
    print(f"{args.out}: {args.num_samples} images of {args.model_path}")
