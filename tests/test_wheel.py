"""The package without its repository: a wheel in another environment, in another folder."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from guided_diffusion.commands.entry import COMMANDS
from tests.tiny_sampling import TinyFiles

REPOSITORY = Path(__file__).parents[1]


def run(*argv: object, cwd: Path, code: int = 0, **environment: str) -> str:
    """Run a command that ends with `code`; what it printed, errors if it is not 0."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        env={**own, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    """The folder of an environment's commands, where the wheel is installed, not the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    # A build leaves its own folders in the source.
    source = root / "source"
    left_out = shutil.ignore_patterns("__pycache__", "models", "precomputed", "exps", "logs")
    for name in ("guided_diffusion", "evaluations", "esddpm_io", "scripts"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    build = (*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", root)
    run(*build, source, cwd=root)
    (wheel,) = root.glob("*.whl")
    environment = root / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=root)
    python = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", code, cwd=root).strip())
    # What it depends on is read from here; a .pth in that folder, of the checkout, is not.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=root)
    found = run(python, "-c", "import guided_diffusion as g; print(g.__file__)", cwd=root)
    assert found.startswith(str(packages))
    return python.parent


def test_every_command_has_its_script():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert declared.keys() == COMMANDS.keys()
    for module in COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_driver_evaluator_and_training_run(commands, tmp_path):
    preset = TinyFiles(tmp_path).preset()
    words = ["--dataset", preset.name, "--classifier_guidance_scale", "0", "--devices", "cpu"]
    words += ["--t_prime", "300", "--steps", "2", "--eval_backend", "torch", "--execute"]
    run(commands / "es-ddpm-sample", *words, cwd=tmp_path)
    (metrics,) = (tmp_path / "exps" / "tiny").glob("*/metrics.json")
    samples = metrics.with_name("samples_all.npz")
    graph = json.loads(metrics.read_text())["scoring"]["graph"]
    words = ["images.npz", samples, "--inception_path", graph, "--backend", "torch"]
    assert "Recall" in run(commands / "es-ddpm-evaluate", *words, cwd=tmp_path)
    words = ["--data_dir", "images.npz", "--image_size", "8", "--num_channels", "32"]
    words += ["--num_res_blocks", "1", "--channel_mult", "1", "--attention_resolutions", ""]
    words += ["--batch_size", "2", "--iterations", "1", "--num_workers", "0"]
    run(commands / "es-ddpm-train", *words, cwd=tmp_path, OPENAI_LOGDIR="trained")
    assert (tmp_path / "trained" / "model000001.pt").exists()


def test_a_shipped_preset_says_where_its_files_are(commands, tmp_path):
    words = ["--dataset", "emoji32", "--devices", "cpu", "--execute"]
    (error,) = run(commands / "es-ddpm-sample", *words, cwd=tmp_path, code=2).splitlines()
    assert "the files of this preset come with the repository: clone it" in error
