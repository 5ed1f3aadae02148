"""The commands of an installed package: the same scripts, under names of their own."""

import os
import runpy
import sys
from pathlib import Path

from esddpm_io.errors import errors_in_one_line
from guided_diffusion.settings.presets import SCRIPTS_FOLDER

_EVALUATIONS = Path(__file__).parents[2] / "evaluations"
COMMANDS = {
    "es-ddpm-sample": SCRIPTS_FOLDER / "generate_processes_diffusion_and_reverse.py",
    "es-ddpm-propose": SCRIPTS_FOLDER / "propose_t_prime.py",
    "es-ddpm-sweep": SCRIPTS_FOLDER / "sweep.py",
    "es-ddpm-report": SCRIPTS_FOLDER / "report.py",
    "es-ddpm-status": SCRIPTS_FOLDER / "status.py",
    "es-ddpm-gather": SCRIPTS_FOLDER / "gather_numpyz_and_compute_fid.py",
    "es-ddpm-convert": SCRIPTS_FOLDER / "convert_checkpoint.py",
    "es-ddpm-download": SCRIPTS_FOLDER / "download.py",
    "es-ddpm-train": SCRIPTS_FOLDER / "image_train.py",
    "es-ddpm-train-classifier": SCRIPTS_FOLDER / "classifier_train.py",
    "es-ddpm-train-vae": SCRIPTS_FOLDER / "vae_train.py",
    "es-ddpm-sample-vae": SCRIPTS_FOLDER / "vae_sample.py",
    "es-ddpm-evaluate": _EVALUATIONS / "evaluator.py",
    "es-ddpm-reference": _EVALUATIONS / "make_reference.py",
}


def main() -> None:
    """Run the script that the command's name stands for."""
    name = os.path.basename(sys.argv[0]).removesuffix(".exe")
    with errors_in_one_line():
        runpy.run_path(str(COMMANDS[name]), run_name="__main__")
