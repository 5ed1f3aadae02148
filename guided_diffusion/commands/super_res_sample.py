"""Enlarge images with a super-resolution model, into samples_….npz in OPENAI_LOGDIR.

    python scripts/super_res_sample.py --model_path 64_256_upsampler.pt --base_samples SMALL.npz

--base_samples is an .npz (arr_0, arr_1 labels for a class-conditional model) or a folder of images;
sample i enlarges image i, beginning again after the last. Flags of the network that are not given
are found as image_sample.py finds them. Also with torchrun, mpiexec, srun.
"""

import argparse

from guided_diffusion.commands import log_folder
from guided_diffusion.flags import sr_model_and_diffusion_defaults


def create_argparser() -> argparse.ArgumentParser:
    defaults = {"base_samples": "", **sr_model_and_diffusion_defaults()}
    return log_folder.build_parser(__doc__, defaults)


def main(argv: list[str] | None = None) -> None:
    log_folder.sample(create_argparser(), argv, "sr")
