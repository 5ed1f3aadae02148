"""Images that are not square, through a network of convolutions made for square ones."""

import json

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion import early_stop, load_network
from guided_diffusion.commands import driver, sweep
from tests.tiny_sampling import IMAGE_SIZE

KNOWN = {"num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear"}


def save(path, height: int, width: int):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, height, width, 3), dtype=np.uint8)
    np.savez(path, images, rng.integers(0, 1000, 12))
    return path


def flags(tiny, output, images, **changes: object) -> list[str]:
    values = {
        "dataset": tiny.root / "tiny.toml",
        "dataset_path": images,
        "classifier_guidance_scale": 0,
        "t_prime": 300,
        "steps": 2,
        "sampler": "dpmpp_2m_sde",
        "batch_size": 12,
        "devices": "cpu",
        "eval_backend": "torch",
        "output_dir": output,
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def test_a_sweep_from_images_to_report(tiny, tmp_path, capsys):
    images = save(tmp_path / "wide.npz", 6, 14)
    sweep.main(flags(tiny, tmp_path / "out", images, t_prime="0,300"))
    assert "14x6; the network was made for 8x8" in capsys.readouterr().err
    point = tmp_path / "out" / "dpmpp_2m_sde_t300_2_steps_guidance0"
    with np.load(images) as given, np.load(point / "samples_all.npz") as made:
        network = load_network(str(tiny.model), "cpu", image_size=IMAGE_SIZE, **KNOWN)
        own = {"labels": given["arr_1"], "batch_size": 12}
        expected = early_stop(network, given["arr_0"], 300, 2, **own)
        assert made["arr_0"].shape == (12, 6, 14, 3)
        np.testing.assert_array_equal(made["arr_0"], expected)
        upright = early_stop(network, given["arr_0"].swapaxes(1, 2).copy(), 300, 2, **own)
    assert upright.shape == (12, 14, 6, 3)
    record = json.loads((point / "metrics.json").read_text())
    assert record["run"]["start"]["shape"] == [6, 14]
    [result] = record["evaluation"]["results"]
    assert result["images"] == 12 and np.isfinite(list(result["metrics"].values())).all()
    assert (tmp_path / "out" / "report.html").exists()


def test_files_are_named_by_height_and_width(tiny, tmp_path):
    from guided_diffusion.commands import sample

    argv = tiny.worker_flags(tmp_path / "out", dataset_path=save(tmp_path / "a.npz", 10, 6))
    sample.main([*argv, "--save_numpy_array", "True"], guided=False)
    assert (tmp_path / "out" / "samples_12x10x6x3_rank_0.npz").exists()


def test_what_no_network_here_can_take(tiny, tmp_path):
    odd = save(tmp_path / "odd.npz", 8, 11)
    with pytest.raises(UserError, match=r"11x8; the network takes sides that are multiples of 2"):
        driver.main([*flags(tiny, tmp_path / "out", odd), "--execute"])
    wide = save(tmp_path / "wide.npz", 8, 12)
    with pytest.raises(UserError, match=r"are 12x8, the network takes 8x8"):
        driver.main(
            [*flags(tiny, tmp_path / "out", wide, classifier_guidance_scale=1), "--execute"]
        )
    large = save(tmp_path / "large.npz", 16, 16)
    with pytest.raises(UserError, match=r"are 16x16, the network takes 8x8"):
        driver.main([*flags(tiny, tmp_path / "out", large), "--execute"])
    network = load_network(str(tiny.model), "cpu", image_size=IMAGE_SIZE, **KNOWN)
    for shape in ((2, 8, 11, 3), (2, 16, 16, 3), (2, 8, 12, 1), (0, 8, 12, 3), (8, 12, 3)):
        with pytest.raises(ValueError, match=r"^images must have shape \[N, 8, 8, 3\]"):
            early_stop(network, np.zeros(shape, np.uint8), 300, 2, labels=np.zeros(2, int))
