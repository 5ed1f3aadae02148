"""Sample a VAE: the npz of images (and labels) that the driver starts from.

    python scripts/vae_sample.py --model_path scripts/models/emoji32_vae.pt --num_samples 3786

Codes come from the fitted prior and labels as often as in the training data; none is thrown away.
Image number i depends on --seed and i alone, whatever the batch size.
"""

import argparse
import sys

import numpy as np
import torch

from esddpm_io.errors import UserError, check_at_least, run_main
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from esddpm_io.npz import NpzWriter
from esddpm_io.progress import Progress
from guided_diffusion import dist_util
from guided_diffusion.checkpoints import load_weights, read_sidecar
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import RandomStreams
from guided_diffusion.train_options import check_seed
from guided_diffusion.vae import VAE, create_vae


def load_vae(path: str) -> VAE:
    """The VAE of a checkpoint written by vae_train.py, in evaluation mode on the CPU.

    Raises:
        UserError: no path, no such file, no sidecar, or another kind of network.
    """
    if not path:
        raise UserError("--model_path: name the checkpoint that vae_train.py wrote")
    sidecar = read_sidecar(path)
    if sidecar is None or sidecar["kind"] != "vae":
        raise UserError(
            f"--model_path: {path} is not a VAE's checkpoint: vae_train.py writes one, "
            "vaeNNNNNN.pt, with a .json of its flags beside it"
        )
    vae = create_vae(**sidecar["flags"])
    load_weights(vae, path, flag="--model_path")
    if not vae.prior.fitted:
        print(
            f"note: {path} is from the middle of a training; its prior is plain N(0, I). The "
            "vaeNNNNNN.pt that vae_train.py writes at its end has the fitted one",
            file=sys.stderr,
        )
    return vae.eval()


def sample_range(vae: VAE, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples start … stop-1 of a seed: uint8 [n, H, W, 3] and labels int64 [n]."""
    device = vae.label_counts.device
    streams = RandomStreams(seed, start, stop, purpose="latents")
    normal = streams.randn(torch.empty(stop - start, 2 + vae.latent_dim))
    # The normal distribution function makes uniform numbers of the first two: one picks the label,
    # one the component of its prior.
    uniform = torch.special.ndtr(normal[:, :2].double())
    labels = frequent_labels(vae.label_counts, uniform[:, 0].to(device))
    images = vae.sample(
        labels if vae.num_classes else None, uniform[:, 1].to(device), normal[:, 2:].to(device)
    )
    return to_uint8(images), labels.cpu().numpy()


def frequent_labels(counts: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels int64 [N] with the frequencies of `counts`, from uniform numbers [N] in [0, 1)."""
    cumulative = counts.double().cumsum(dim=0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__.splitlines()[0])
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


if __name__ == "__main__":
    run_main(main)
