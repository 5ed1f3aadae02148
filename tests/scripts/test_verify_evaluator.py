"""The self-check of the evaluator, on a small graph and files that are called as published ones."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from evaluations import evaluate
from guided_diffusion.commands import verify_evaluator
from tests.evaluations.graph_writer import GOLDEN, small_graph

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_evaluator.py"
REFERENCE, SAMPLES = "VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz"


@pytest.fixture
def published(tmp_path):
    """A folder with a small graph, a reference and samples by published names."""
    (tmp_path / "small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        np.savez(tmp_path / REFERENCE, arr_0=file["reference"][:60])
        np.savez(tmp_path / SAMPLES, arr_0=file["samples"][:60])
    return tmp_path


def verify(folder, *flags):
    argv = [sys.executable, SCRIPT, "--dir", folder, "--backend", "torch", *flags]
    argv += ["--inception_path", folder / "small.pb"]
    return subprocess.run(argv, capture_output=True, text=True)


def test_figures_other_than_the_published_are_wrong(published):
    """Those of the reference against itself are right; the small graph's others are no FID."""
    (published / "admnet_imagenet64.npz").touch()
    run = verify(published)
    assert run.returncode == 1, run.stderr
    alone = (
        "admnet_imagenet64.npz against VIRTUAL_imagenet64_labeled.npz: "
        "VIRTUAL_imagenet64_labeled.npz is not there, skipped"
    )
    assert alone in run.stdout
    assert run.stdout.count(": ok") == 4 and run.stdout.count(": WRONG") == 5
    assert f"{SAMPLES} fid: expected 3.94256, found " in run.stdout
    assert f"against {REFERENCE}: admnet_guided_imagenet256.npz is not there, skipped" in run.stdout


def test_a_reference_of_another_name(published):
    (published / REFERENCE).rename(published / "mine.npz")
    run = verify(published, "--reference", "mine.npz")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(": ok") == 4 == len(run.stdout.splitlines())
    run = verify(published)
    assert run.returncode == 2 and f"--dir {published}: it has none of VIRTUAL_" in run.stderr


def test_expected_figures_are_ok(published, monkeypatch, capsys):
    options = {"inception_path": str(published / "small.pb"), "backend": "torch"}
    one = evaluate(published / REFERENCE, published / SAMPLES, metrics="fid", **options)
    argv = ["--dir", str(published), *(x for k, v in options.items() for x in (f"--{k}", v))]
    fid = one.results[0]["fid"]
    for distance, verdict in [(0.009, "ok"), (0.011, "WRONG")]:
        expected = {REFERENCE: {SAMPLES: {"fid": (fid + distance, 0.01)}}}
        monkeypatch.setattr(verify_evaluator, "PUBLISHED", expected)
        try:
            verify_evaluator.main(argv)
        except SystemExit as end:
            assert end.code == 1 and verdict == "WRONG"
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"found {fid:.6g}: {verdict}")
    with pytest.raises(UserError, match="it has none of other.npz"):
        verify_evaluator.main([*argv, "--reference", "other.npz"])
