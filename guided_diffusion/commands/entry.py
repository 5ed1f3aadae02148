"""The commands of an installed package: those of scripts/ and evaluations/, by other names."""

import importlib
import os
import sys

from esddpm_io.errors import errors_in_one_line

COMMANDS = {
    "es-ddpm-sample": "guided_diffusion.commands.driver",
    "es-ddpm-propose": "guided_diffusion.commands.propose",
    "es-ddpm-sweep": "guided_diffusion.commands.sweep",
    "es-ddpm-report": "guided_diffusion.commands.report",
    "es-ddpm-status": "guided_diffusion.commands.status",
    "es-ddpm-gather": "guided_diffusion.commands.gather",
    "es-ddpm-convert": "guided_diffusion.commands.convert",
    "es-ddpm-download": "guided_diffusion.commands.download",
    "es-ddpm-train": "guided_diffusion.commands.image_train",
    "es-ddpm-train-classifier": "guided_diffusion.commands.classifier_train",
    "es-ddpm-power-ema": "guided_diffusion.commands.power_ema",
    "es-ddpm-train-vae": "guided_diffusion.commands.vae_train",
    "es-ddpm-sample-vae": "guided_diffusion.commands.vae_sample",
    "es-ddpm-evaluate": "evaluations.evaluator",
    "es-ddpm-reference": "evaluations.make_reference",
}


def main() -> None:
    """Run the command that this process was started as."""
    name = os.path.basename(sys.argv[0]).removesuffix(".exe")
    with errors_in_one_line():
        importlib.import_module(COMMANDS[name]).main()
