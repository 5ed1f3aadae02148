"""Importing the library costs no optional package: what needs one imports it where it is used."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import esddpm_io
import evaluations
import guided_diffusion

ROOT = Path(__file__).parents[1]
# evaluations/backend_tensorflow.py is the one file that TensorFlow lives in.
NEEDS_TENSORFLOW = {"evaluations.backend_tensorflow"}
OPTIONAL = ("mpi4py", "tensorflow", "matplotlib", "blobfile", "requests", "tensorboard", "lmdb")
OPTIONAL += ("diffusers", "huggingface_hub", "safetensors")


def modules_of(*packages):
    return [
        info.name
        for package in packages
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if info.name not in NEEDS_TENSORFLOW
    ]


def loaded_after_importing(names, suspects):
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split(','): importlib.import_module(name)\n"
        "print(*[name for name in sys.argv[2].split(',') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, ",".join(names), ",".join(suspects)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_importing_everything_loads_no_optional_package():
    names = ["esddpm_io", "guided_diffusion", "evaluations"]
    names += modules_of(esddpm_io, guided_diffusion, evaluations)
    assert {"guided_diffusion.sampling.worker", "guided_diffusion.commands.driver"} <= set(names)
    assert "evaluations.evaluator" in names
    assert loaded_after_importing(names, OPTIONAL) == []


def test_the_packages_do_not_lean_on_each_other():
    io_names = modules_of(esddpm_io)
    assert loaded_after_importing(io_names, ["torch", "guided_diffusion", "evaluations"]) == []
    assert loaded_after_importing(modules_of(evaluations), ["guided_diffusion"]) == []
    # Its command lines use both; nothing below them knows the evaluator.
    assert loaded_after_importing(modules_of(guided_diffusion), ["evaluations"]) == []


def test_gathering_status_and_help_need_no_torch():
    names = (
        "sampling.gathering",
        "sampling.status",
        "commands.driver",
        "commands.gather",
        "commands.sweep",
    )
    assert loaded_after_importing([f"guided_diffusion.{name}" for name in names], ["torch"]) == []


def test_the_mathematics_imports_no_input_output():
    maths = ("nn", "losses", "gaussian_diffusion", "respace", "unet", "script_util")
    names = [f"guided_diffusion.{name}" for name in maths]
    suspects = [f"guided_diffusion.{name}" for name in ("logger", "dist_util", "checkpoints")]
    assert loaded_after_importing(names, [*suspects, "esddpm_io"]) == []
