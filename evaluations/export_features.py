"""Export a feature network as a file for the evaluator, with its TOML beside it.

    python export_features.py dinov2 dinov2_vitl14.pt2
    python evaluator.py REF.npz SAMPLE.npz --inception_path dinov2_vitl14.pt2

The network comes from torch hub or, where that cannot be reached, from transformers.
"""

import argparse
import os
from typing import TYPE_CHECKING

from esddpm_io.errors import UserError, first_line, run_main, terminate_cleanly
from esddpm_io.files import check_output_file
from esddpm_io.help import CommandLine
from evaluations.network_file import SUFFIXES, Description, is_network_file

if TYPE_CHECKING:
    import torch

HUB = "facebookresearch/dinov2"
# Of DINOv2 (Oquab et al. 2023): name at torch hub, that of transformers, width of the features
VARIANTS = {
    "vits14": ("facebook/dinov2-small", 384),
    "vitb14": ("facebook/dinov2-base", 768),
    "vitl14": ("facebook/dinov2-large", 1024),  # of FD-DINOv2 (Stein et al. 2023)
    "vitg14": ("facebook/dinov2-giant", 1536),
}


def dinov2(variant: str, repo: str | None = None) -> "tuple[torch.nn.Module, Description]":
    """DINOv2's class token, normalised, and how its images are prepared.

    repo: a clone of `HUB` in place of the hub. From transformers, which interpolates position
    embeddings otherwise, the name ends in `_hf`. `UserError` if neither can be had.
    """
    name, (model_id, features) = f"dinov2_{variant}", VARIANTS[variant]
    try:
        module = _from_hub(name, repo)
    except Exception as error:  # code from elsewhere, which may raise anything
        if repo is not None:
            raise UserError(f"--repo {repo}: no {name} in it: {first_line(error)}") from error
        module, name = _from_transformers(model_id, first_line(error)), f"{name}_hf"
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return module, Description(name, features, (224, 224), "bicubic", (0.0, 1.0), **imagenet)


def _from_hub(name: str, repo: str | None) -> "torch.nn.Module":
    import torch

    if repo is not None:
        return torch.hub.load(repo, name, source="local")
    return torch.hub.load(HUB, name, trust_repo=True, skip_validation=True)


def _from_transformers(model_id: str, why_no_hub: str) -> "torch.nn.Module":
    try:
        from transformers import AutoModel

        return class_token(AutoModel.from_pretrained(model_id))
    except (ImportError, OSError) as error:
        raise UserError(
            f"dinov2: torch hub cannot be used ({why_no_hub}), nor {model_id} of transformers "
            f"({first_line(error)}): --repo takes a clone of {HUB}"
        ) from error


def class_token(model: "torch.nn.Module") -> "torch.nn.Module":
    """A module that gives the first token [N, D] of a vision model of transformers."""
    import torch

    class ClassToken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]

    return ClassToken()


def create_argparser() -> argparse.ArgumentParser:
    parser = CommandLine(description=__doc__)
    parser.add_argument("network", metavar="NETWORK", choices=["dinov2"], help="dinov2")
    parser.add_argument("out", metavar="OUT", help=f"file to write, {' or '.join(SUFFIXES)}")
    parser.add_argument("--variant", choices=VARIANTS, default="vitl14", help="size of the network")
    parser.add_argument("--repo", metavar="DIR", help=f"a clone of {HUB} in place of torch hub")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)
    if not is_network_file(args.out):
        raise UserError(f"OUT: {args.out} must end in {' or '.join(SUFFIXES)}")
    check_output_file(args.out, flag="OUT")
    if args.repo is not None and not os.path.isdir(args.repo):
        raise UserError(f"--repo: there is no folder {args.repo}")
    from evaluations.backend_network import export_network

    module, about = dinov2(args.variant, args.repo)
    export_network(module, args.out, about)
    print(f"{about.name}: {args.out}")


if __name__ == "__main__":
    run_main(main)
