"""scripts/train_early_stopped.sh, with a network small enough for a test."""

import os
import subprocess
import sys
from pathlib import Path

from guided_diffusion.checkpoints import read_sidecar
from guided_diffusion.settings.presets import SCRIPTS_FOLDER

SCRIPT = Path(SCRIPTS_FOLDER) / "train_early_stopped.sh"
SMALL = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --noise_schedule cosine"


def train(output: Path, *more: str, **variables: object) -> str:
    """Run the script; what it printed."""
    words = {name: str(value) for name, value in variables.items()}
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MODEL_FLAGS": SMALL}
    done = subprocess.run(
        ["bash", str(SCRIPT), *more],
        env={**os.environ, **own, "OUTPUT": str(output), "BATCH_SIZE": "2", **words},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_clean():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    lint = subprocess.run(
        ["shellcheck", str(SCRIPT)], env={"PATH": path}, capture_output=True, text=True
    )
    assert lint.returncode == 0, lint.stdout


def test_it_trains_below_t_prime_and_goes_on(tmp_path):
    train(tmp_path, T_PRIME=150, ITERATIONS=2, EMA_RATE=0.5, SAVE_INTERVAL=1)
    sidecar = read_sidecar(str(tmp_path / "ema_0.5_000002.pt"))
    assert sidecar["early_stop_steps"] == 150
    assert sidecar["flags"]["channel_mult"] == "1,1" and sidecar["flags"]["image_size"] == 32
    assert (tmp_path / "model000001.pt").exists()
    told = train(tmp_path, "--keep_checkpoints", "1", T_PRIME=150, ITERATIONS=3, EMA_RATE=0.5)
    assert f"loading the model from {tmp_path}/model000002.pt" in told
    assert [path.name for path in tmp_path.glob("model*.pt")] == ["model000003.pt"]


def test_several_processes_are_one_training(tmp_path):
    train(tmp_path, T_PRIME=150, ITERATIONS=1, PROCESSES=2)
    assert (tmp_path / "log-rank001.txt").exists() and (tmp_path / "model000001.pt").exists()
