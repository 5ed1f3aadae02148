"""Importing the library costs no optional package: what needs one imports it where it is used."""

import ast
import graphlib
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
# Written as one file, layers and command line.
IS_A_NETWORK = {"emoji32_features"}
OPTIONAL = ("mpi4py", "tensorflow", "matplotlib", "blobfile", "requests", "tensorboard", "lmdb")
OPTIONAL += ("diffusers", "huggingface_hub", "safetensors", "wandb")


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


def imported_on_loading(name):
    """Names of modules, and of what may be one, that the module's own lines import."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    found = set()
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_module_imports_itself_through_others():
    modules = set(modules_of(esddpm_io, evaluations, guided_diffusion))
    assert imported_on_loading("evaluations.settings") & modules >= {"evaluations.scoring"}
    graph = {name: imported_on_loading(name) & modules for name in modules}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names a circle
    assert len(order) == len(modules)


def test_the_packages_do_not_lean_on_each_other():
    io_names = modules_of(esddpm_io)
    assert loaded_after_importing(io_names, ["torch", "guided_diffusion", "evaluations"]) == []
    assert loaded_after_importing(modules_of(evaluations), ["guided_diffusion"]) == []
    # Its command lines use both; nothing below them knows the evaluator.
    assert loaded_after_importing(modules_of(guided_diffusion), ["evaluations"]) == []


def test_gathering_and_status_need_no_torch():
    names = [f"guided_diffusion.sampling.{name}" for name in ("gathering", "status")]
    assert loaded_after_importing(names, ["torch"]) == []


def test_help_needs_no_torch():
    """One process shows the help of every script, and has not loaded torch in the end."""
    scripts = [
        path
        for folder in ("scripts", "scripts/imagenet_dataloader", "evaluations", "datasets")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "__main__" in path.read_text() and path.stem not in IS_A_NETWORK
    ]
    assert len(scripts) > 25
    code = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, script\n"
        "    assert 'torch' not in sys.modules, script\n"
    )
    command = [sys.executable, "-c", code, *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.count("--help") >= len(scripts)


def test_the_mathematics_imports_no_input_output():
    maths = ("nn", "losses", "gaussian_diffusion", "respace", "unet", "script_util")
    names = [f"guided_diffusion.{name}" for name in maths]
    suspects = [f"guided_diffusion.{name}" for name in ("logger", "dist_util", "checkpoints")]
    assert loaded_after_importing(names, [*suspects, "esddpm_io"]) == []
