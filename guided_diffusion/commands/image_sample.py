"""Sample images from noise with a diffusion model, into samples_….npz in OPENAI_LOGDIR.

    python scripts/image_sample.py --model_path MODEL.pt --num_samples 100

Flags of the network that are not given come from the checkpoint's sidecar or, where the command
names none at all, from the names and shapes of its tensors. Also with torchrun, mpiexec, srun.
"""

import argparse

from guided_diffusion.commands import log_folder
from guided_diffusion.flags import model_and_diffusion_defaults


def create_argparser() -> argparse.ArgumentParser:
    return log_folder.build_parser(__doc__, model_and_diffusion_defaults())


def main(argv: list[str] | None = None) -> None:
    log_folder.sample(create_argparser(), argv, "model")
