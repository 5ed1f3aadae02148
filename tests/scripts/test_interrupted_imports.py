"""Ctrl-C while a command loads its packages: one line, as in the middle of its work."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
ALL = sorted([*SCRIPTS.glob("*.py"), *(SCRIPTS / "imagenet_dataloader").glob("*.py")])
# Command lines that get as far as torch.
NEEDS_TORCH = {
    "image_train": ["--data_dir", "x"],
    "classifier_train": ["--data_dir", "x"],
    "super_res_train": ["--data_dir", "x"],
    "vae_train": ["--data_dir", "x"],
    "vae_sample": ["--model_path", "x"],
    "image_nll": ["--data_dir", "x", "--model_path", "x"],
    "image_sample": ["--model_path", "x"],
    "classifier_sample": ["--model_path", "x", "--classifier_path", "x"],
    "super_res_sample": ["--model_path", "x", "--base_samples", "x"],
    "image_sample_diffusion_and_reverse": ["--save_dir", "x"],
    "generate_processes_diffusion_and_reverse": ["--dataset", "emoji32"],
    "sweep": ["--dataset", "emoji32", "--output_dir", "x", "--t_prime", "9", "--steps", "3"],
    "propose_t_prime": ["--dataset", "emoji32"],
}
PRESS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(600)\n"


def pressed_while_importing(package: str, script: Path, argv: list[str], folder: Path):
    """Run a script in a folder whose `package` presses Ctrl-C when it is imported."""
    (folder / f"{package}.py").write_text(PRESS)
    path = os.pathsep.join([str(folder), str(SCRIPTS.parent)])
    return subprocess.run(
        [sys.executable, script, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.stem)
def test_while_the_command_itself_is_loaded(script, tmp_path):
    done = pressed_while_importing("argparse", script, [], tmp_path)
    assert (done.stderr, done.returncode) == ("interrupted\n", 128 + signal.SIGINT)


@pytest.mark.parametrize("name", NEEDS_TORCH)
def test_while_torch_is_loaded(name, tmp_path):
    argv = NEEDS_TORCH[name]
    done = pressed_while_importing("torch", SCRIPTS / f"{name}.py", argv, tmp_path)
    assert done.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in done.stderr
    assert done.returncode == 128 + signal.SIGINT
