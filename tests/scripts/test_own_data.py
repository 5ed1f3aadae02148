"""Your own data in five commands: VAE, early-stopped DDPM, VAE's images, driver, evaluator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GRAPH = REPOSITORY / "evaluations" / "precomputed" / "emoji32_features.pb"


def run(command: str, folder: Path, logdir: str = "") -> str:
    """Run a script of the repository as a user does, standing in `folder`; return its stdout."""
    script, *flags = command.split()
    argv = [sys.executable, str(REPOSITORY / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if logdir:
        environment["OPENAI_LOGDIR"] = logdir
    result = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture
def data(tmp_path) -> str:
    """Twelve images of coloured bars; returns the file's name inside the folder."""
    rng = np.random.default_rng(0)
    bars = rng.integers(0, 256, (12, 1, 4, 3), np.uint8).repeat(16, axis=1).repeat(4, axis=2)
    np.savez(tmp_path / "images.npz", arr_0=bars)
    return "images.npz"


def test_five_commands(tmp_path, data):
    shared = f"--data_dir {data} --image_size 16 --batch_size 4"
    run(
        f"scripts/vae_train.py {shared} --num_channels 8 --latent_dim 4 --iterations 3",
        tmp_path,
        logdir="vae",
    )
    run(
        f"scripts/image_train.py {shared} --num_channels 32 --num_res_blocks 1 --learn_sigma True"
        " --channel_mult 1,2 --attention_resolutions 8 --early_stop_steps 500 --lr_anneal_steps 2"
        " --ema_rate 0.9",
        tmp_path,
        logdir="ddpm",
    )
    run("scripts/vae_sample.py --model_path vae/vae000003.pt --num_samples 6", tmp_path)
    (tmp_path / "mine.toml").write_text(
        'checkpoint = "ddpm/ema_0.9_000002.pt"\ngenerator_images = "vae_samples.npz"\n'
    )
    printed = run(
        "scripts/generate_processes_diffusion_and_reverse.py --dataset mine.toml --devices cpu"
        " --chain_length 10 --reverse_steps 5 --output_dir samples --not_eval_metrics --execute",
        tmp_path,
    )
    assert "5 of 10 steps" in printed
    run(
        f"evaluations/evaluator.py {data} samples/samples_all.npz --inception_path {GRAPH}"
        " --backend torch --json metrics.json",
        tmp_path,
    )
    with np.load(tmp_path / "samples" / "samples_all.npz") as samples:
        assert samples["arr_0"].shape == (6, 16, 16, 3)
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert result["images"] == 6
    assert result["metrics"]["frechet_distance"] > 0
