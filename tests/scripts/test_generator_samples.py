"""generator_samples.py: a user's function becomes an npz, batch by batch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from guided_diffusion.commands.generator_samples import batch_seed, create_argparser, main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generator_samples.py"

MODULE = """
import numpy as np

calls = []

def plain(n, seed):
    calls.append((n, seed))
    return np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), np.uint8)

def labelled(n, seed):
    return plain(n, seed), np.full(n, seed % 7, np.int32)

def floats(n, seed):
    return np.zeros((n, 6, 5, 3))

def short(n, seed):
    return np.zeros((n - 1, 6, 5, 3), np.uint8)

def float_labels(n, seed):
    return plain(n, seed), np.zeros(n)

def uneven(n, seed):
    size = 4 if calls else 6
    calls.append((n, seed))
    return np.zeros((n, size, size, 3), np.uint8)

not_a_function = 3
"""


@pytest.fixture
def generator(tmp_path, monkeypatch):
    path = tmp_path / "my_generator.py"
    path.write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


def test_images_are_those_of_the_function_batch_by_batch(generator, tmp_path):
    main([f"{generator}:plain", "--num_samples", "7", "--batch_size", "3", "--seed", "5"])
    with np.load(tmp_path / "generator_samples.npz") as data:
        assert data.files == ["arr_0"]
        images = data["arr_0"]
    expected = [
        np.random.default_rng(batch_seed(5, batch)).integers(0, 256, (n, 6, 5, 3), np.uint8)
        for batch, n in enumerate((3, 3, 1))
    ]
    np.testing.assert_array_equal(images, np.concatenate(expected))
    assert len({batch_seed(seed, batch) for seed in range(4) for batch in range(4)}) == 16


def test_labels_from_a_module_in_the_folder_one_stands_in(generator, tmp_path):
    command = [sys.executable, SCRIPT, "my_generator:labelled", "--num_samples", "5"]
    command += ["--batch_size", "4", "--out", "sub/out.npz"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "sub" / "out.npz") as data:
        assert data["arr_0"].shape == (5, 6, 5, 3)
        assert data["arr_1"].dtype == np.int64
        expected = [batch_seed(0, 0) % 7] * 4 + [batch_seed(0, 1) % 7]
        assert data["arr_1"].tolist() == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_generator", "MODULE:FUNCTION"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("missing.py:f", "no file missing.py"),
        ("my_generator.py:nothing", "no function nothing"),
        ("my_generator.py:not_a_function", "no function not_a_function"),
        ("my_generator.py:floats", r"float64\[4, 6, 5, 3\].*must be uint8 \[4, height, width, 3\]"),
        ("my_generator.py:short", r"uint8\[3, 6, 5, 3\]"),
        ("my_generator.py:float_labels", "must give integers"),
        ("my_generator.py:uneven", "differs in image size"),
    ],
)
def test_bad_functions_are_named_and_leave_no_file(generator, tmp_path, target, message):
    with pytest.raises(UserError, match=message):
        main([target, "--num_samples", "8", "--batch_size", "4"])
    assert [path.name for path in tmp_path.glob("*.npz")] == []


@pytest.mark.parametrize(
    "flags", [["--num_samples", "0"], ["--batch_size", "-1"], ["--seed", "-2"]]
)
def test_numbers_out_of_range_name_their_flag(generator, flags):
    with pytest.raises(UserError, match=flags[0]):
        main(["my_generator.py:plain", *flags])


def test_flags_and_defaults_are_frozen():
    assert vars(create_argparser().parse_args(["m:f"])) == {
        "function": "m:f",
        "num_samples": 10000,
        "batch_size": 64,
        "seed": 0,
        "out": "generator_samples.npz",
    }
