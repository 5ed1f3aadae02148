"""vae_train.py and vae_sample.py for real, on a few tiny images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError
from guided_diffusion.checkpoints import read_sidecar
from guided_diffusion.commands import vae_sample, vae_train

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["--image_size", "16", "--num_channels", "8", "--latent_dim", "4", "--batch_size", "4"]
LABELS = np.array([0, 2, 2, 2, 0, 2, 2, 2, 2, 2])  # one label does not occur


@pytest.fixture
def data(tmp_path) -> Path:
    """Ten colour patches with labels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (len(LABELS), 4, 4, 3), np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, arr_0=colours.repeat(4, axis=1).repeat(4, axis=2), arr_1=LABELS)
    return path


@pytest.fixture
def train(monkeypatch):
    """Runs vae_train.py into a folder; returns the folder."""

    def run(folder: Path, data: Path, *flags: str) -> Path:
        monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
        vae_train.main(["--data_dir", str(data), "--random_flip", "False", *TINY, *flags])
        return folder

    return run


def sample(checkpoint: Path, out: Path, *flags: str) -> dict[str, np.ndarray]:
    vae_sample.main(["--model_path", str(checkpoint), "--out", str(out), *flags])
    with np.load(out) as data:
        return dict(data)


def test_labelled_training_then_samples(tmp_path, data, train):
    flags = ["--class_cond", "True", "--iterations", "6", "--sample_interval", "6"]
    folder = train(tmp_path / "run", data, *flags)
    sidecar = read_sidecar(str(folder / "vae000006.pt"))
    assert sidecar["kind"] == "vae"
    assert sidecar["flags"]["num_classes"] == 3
    with Image.open(folder / "samples000006.png") as grid:
        assert grid.height > 2 * 16  # images above, reconstructions below
    made = sample(folder / "vae000006.pt", tmp_path / "a.npz", "--num_samples", "60")
    assert made["arr_0"].shape == (60, 16, 16, 3) and made["arr_0"].dtype == np.uint8
    counts = np.bincount(made["arr_1"], minlength=3)
    assert counts[1] == 0 and counts[2] > counts[0] > 0  # as in the data
    assert made["arr_0"].std(axis=0).max() > 0


def test_samples_depend_on_seed_and_index_alone(tmp_path, data, train):
    folder = train(tmp_path / "run", data, "--class_cond", "True", "--iterations", "2")
    options = [[], ["--batch_size", "3"], ["--compressed"], ["--seed", "1"]]
    a, b, c, other = (
        sample(folder / "vae000002.pt", tmp_path / f"{n}.npz", "--num_samples", "8", *flags)
        for n, flags in enumerate(options)
    )
    for same in (b, c):
        np.testing.assert_array_equal(a["arr_1"], same["arr_1"])
        # Convolutions of other batch sizes may round differently.
        difference = a["arr_0"].astype(int) - same["arr_0"]
        assert np.abs(difference).max() <= 1
    assert not np.array_equal(a["arr_0"], other["arr_0"])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, data, train):
    flags = ["--class_cond", "True", "--anneal_lr", "False"]
    whole = train(tmp_path / "whole", data, *flags, "--iterations", "6")
    parts = train(tmp_path / "parts", data, *flags, "--iterations", "3")
    train(parts, data, *flags, "--iterations", "6", "--resume_checkpoint", "auto")
    expected, resumed = (torch.load(folder / "vae000006.pt") for folder in (whole, parts))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_resuming_a_finished_run_fits_another_prior(tmp_path, data, train):
    folder = train(tmp_path / "run", data, "--iterations", "2", "--prior_components", "3")
    before = torch.load(folder / "vae000002.pt")
    flags = ["--iterations", "2", "--prior_components", "1", "--resume_checkpoint", "auto"]
    train(folder, data, *flags)
    after = torch.load(folder / "vae000002.pt")
    assert before["prior.mean"].shape == (1, 3, 4) and after["prior.mean"].shape == (1, 1, 4)
    name = "decoder.0.layers.2.weight"
    assert torch.equal(before[name], after[name])


def test_a_folder_of_unlabelled_images_of_an_odd_size(tmp_path, train):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (30, 22), (50 * number, 90, 200)).save(images / f"{number}.png")
    folder = train(tmp_path / "run", images, "--iterations", "2", "--image_size", "20")
    made = sample(folder / "vae000002.pt", tmp_path / "a.npz", "--num_samples", "3")
    assert made["arr_0"].shape == (3, 20, 20, 3)
    assert "arr_1" not in made


@pytest.mark.parametrize("more", [[], ["--shard", "--sample_interval", "1"]], ids=str)
def test_two_processes_fit_the_prior_to_all_images(tmp_path, data, train, more):
    alone = train(tmp_path / "alone", data, "--class_cond", "True", "--iterations", "2")
    flags = ["--data_dir", data, "--random_flip", "False", "--class_cond", "True", *TINY]
    flags += ["--iterations", "2", "--batch_size", "2", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", REPOSITORY / "scripts" / "vae_train.py", *flags]
    environment = {**os.environ, "OPENAI_LOGDIR": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in command]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = (torch.load(folder / "vae000002.pt") for folder in (alone, tmp_path / "two"))
    assert "codes of 10 images" in result.stdout
    assert one["label_counts"].tolist() == two["label_counts"].tolist() == [2, 0, 8]
    # Where a gradient is all but zero, its rounding decides which way Adam goes: two steps of lr.
    for name in ("prior.mean", "prior.weight", "decoder.0.layers.2.weight"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=5e-3)


def test_without_averages_the_last_weights_are_the_vae(tmp_path, data, train):
    folder = train(tmp_path / "run", data, "--iterations", "2", "--ema_rate", "")
    last, vae = (torch.load(folder / f"{name}000002.pt") for name in ("model", "vae"))
    assert torch.equal(last["to_posterior.weight"], vae["to_posterior.weight"])
    assert sample(folder / "vae000002.pt", tmp_path / "a.npz", "--num_samples", "3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iterations", "0"], "--iterations is 0"),
        (["--kl_weight", "-1"], "--kl_weight is -1"),
        (["--prior_images", "0"], "--prior_images is 0"),
        (["--num_channels", "12"], "--num_channels is 12"),
        (["--prior_components", "0"], "--prior_components is 0"),
        (["--precision", "float16"], "--precision float16"),
        (["--image_size", "32"], r"--data_dir: .*\[N, 32, 32, 3\]"),
    ],
)
def test_training_with_bad_flags(tmp_path, data, train, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", data, *flags)
    assert not list(tmp_path.glob("run/*.pt"))


def test_sampling_without_a_vae(tmp_path, data, train):
    with pytest.raises(UserError, match="--model_path: name the checkpoint"):
        vae_sample.main([])
    with pytest.raises(UserError, match=r"--seed is 18446744073709551616, it must be in 0 … "):
        vae_sample.main(["--seed", str(2**64)])
    with pytest.raises(UserError, match="--out: .* is a folder"):
        vae_sample.main(["--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"--model_path: .*missing.pt is not a VAE's checkpoint"):
        vae_sample.main(["--model_path", str(tmp_path / "missing.pt")])
    folder = train(tmp_path / "run", data, "--iterations", "1")
    (folder / "vae000001.pt").write_bytes(b"PK\x03\x04cut")
    for flags, message in (
        ([], "--model_path: .*truncated"),
        (["--num_samples", "0"], "--num_samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ):
        with pytest.raises(UserError, match=message):
            sample(folder / "vae000001.pt", tmp_path / "out.npz", *flags)
    assert not (tmp_path / "out.npz").exists()


def test_training_checkpoints_say_that_their_prior_is_not_fitted(tmp_path, data, train, capsys):
    folder = train(tmp_path / "run", data, "--iterations", "1")
    sample(folder / "ema_0.999_000001.pt", tmp_path / "a.npz", "--num_samples", "2")
    assert "plain N(0, I)" in capsys.readouterr().err
    sample(folder / "vae000001.pt", tmp_path / "a.npz", "--num_samples", "2")
    assert "plain N(0, I)" not in capsys.readouterr().err


def test_flags_and_defaults_are_frozen():
    train_flags = vars(vae_train.create_argparser().parse_args([]))
    assert train_flags == {
        "data_dir": "",
        "class_cond": False,
        "kl_weight": 1.0,
        "prior_images": 50000,
        "iterations": 20000,
        "lr": 1e-3,
        "anneal_lr": True,
        "weight_decay": 0.0,
        "batch_size": 32,
        "microbatch": -1,
        "ema_rate": "0.999",
        "log_interval": 100,
        "save_interval": 1000,
        "sample_interval": 0,
        "resume_checkpoint": "",
        "precision": "",
        "keep_checkpoints": 0,
        "seed": 0,
        "random_crop": False,
        "random_flip": True,
        "label_from": "name",
        "num_workers": -1,
        "image_size": 32,
        "num_channels": 24,
        "latent_dim": 64,
        "prior_components": 64,
        "channels_last": False,
        "compile": False,
        "use_fp16": False,
        "lr_warmup": 0,
        "grad_clip": 0.0,
        "power_ema": "",
        "start_anew": False,
        "shard": False,
    }
    sample_flags = vars(vae_sample.create_argparser().parse_args([]))
    assert sample_flags == {
        "model_path": "",
        "num_samples": 10000,
        "batch_size": 64,
        "seed": 0,
        "out": "vae_samples.npz",
        "compressed": False,
    }
