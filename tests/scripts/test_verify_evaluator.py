"""The self-check of the evaluator, on a small graph."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.evaluations.graph_writer import GOLDEN, small_graph

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_evaluator.py"


def test_expected_against_found(tmp_path):
    (tmp_path / "small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        images = file["reference"][:60]
    np.savez(tmp_path / "good.npz", arr_0=images)
    for name, code in [("good.npz", 0), ("none.npz", 2)]:
        argv = [sys.executable, SCRIPT, "--dir", tmp_path, "--reference", name]
        options = ["--inception_path", tmp_path / "small.pb", "--backend", "torch"]
        run = subprocess.run([*argv, *options], capture_output=True, text=True)
        assert run.returncode == code, run.stderr
        if code == 0:
            assert run.stdout.count(": ok") == 4
