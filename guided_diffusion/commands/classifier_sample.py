"""Sample images from noise, guided by a classifier, into samples_….npz in OPENAI_LOGDIR.

    python scripts/classifier_sample.py --model_path MODEL.pt --classifier_path CLASSIFIER.pt

Labels are drawn for each sample and kept as arr_1. Flags of the networks that are not given are
found as image_sample.py finds them. Also with torchrun, mpiexec, srun.
"""

import argparse

from guided_diffusion.commands import log_folder
from guided_diffusion.flags import classifier_defaults, model_and_diffusion_defaults


def create_argparser() -> argparse.ArgumentParser:
    own = {"classifier_path": "", "classifier_scale": 1.0}
    defaults = {**own, **model_and_diffusion_defaults(), **classifier_defaults()}
    return log_folder.build_parser(__doc__, defaults)


def main(argv: list[str] | None = None) -> None:
    log_folder.sample(create_argparser(), argv, "model")
