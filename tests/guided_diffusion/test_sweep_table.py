"""The tables of a sweep, from metrics.json files written by hand."""

import json

import numpy as np
import pytest

from evaluations.metrics import interval_of_replicates
from guided_diffusion.commands.sweep_table import paired_differences, read_points, write_tables


def write_point(folder, distance: float, replicates=None, **point) -> None:
    values = {
        "t_prime": 200,
        "steps": 8,
        "sampler": "ddim",
        "eta": 0.0,
        "guidance_scale": 0.0,
        "seed": 0,
        "timesteps": [199, 0],
        "network_evaluations": 8,
        "seconds_per_image": 0.5,
        "samples": 500,
        "checkpoint": "a.pt",
        "start_images": "vae.npz",
        **point,
    }
    result = {"metrics": {"frechet_distance": distance}, "labels": {"frechet_distance": "FD"}}
    if replicates is not None:
        result["replicates"] = {"frechet_distance": [distance, *replicates]}
    record = {
        "point": values,
        "scoring": {"reference": "ref.npz", "graph": None, "engine": {}},
        "evaluation": {"results": [result]},
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(record))


def test_only_points_of_one_seed_and_number_are_paired(tmp_path):
    write_point(tmp_path / "a", 3.0)
    write_point(tmp_path / "b", 4.0, t_prime=300)
    write_point(tmp_path / "generator", 9.0, t_prime=0, steps=0, sampler=None, seed=None)
    write_point(tmp_path / "c", 2.0, seed=1)
    write_point(tmp_path / "d", 2.5, seed=1, t_prime=300)
    write_point(tmp_path / "e", 1.0, samples=1000)
    found = paired_differences(read_points(str(tmp_path)))
    assert {name: entry["to"] for name, entry in found.items()} == {
        "a": "a",
        "b": "a",
        "generator": "a",
        "c": "c",
        "d": "c",
        "e": "e",
    }
    assert [found[name]["difference"] for name in "abcde"] == [0, 1, 0, 0.5, 0]
    assert all(entry["interval"] is None for entry in found.values())


def test_another_reference_is_another_comparison(tmp_path):
    write_point(tmp_path / "a", 3.0)
    write_point(tmp_path / "b", 4.0)
    path = tmp_path / "b" / "metrics.json"
    path.write_text(path.read_text().replace("ref.npz", "other.npz"))
    found = paired_differences(read_points(str(tmp_path)))
    assert [found[name]["to"] for name in "ab"] == ["a", "b"]


def test_intervals_are_those_of_the_differences(tmp_path):
    noise = np.random.default_rng(0).standard_normal(40) / 10
    own = np.random.default_rng(1).standard_normal(40) / 100
    write_point(tmp_path / "best", 3.0, 3.0 + noise)
    write_point(tmp_path / "other", 3.2, 3.2 + noise + own, t_prime=300)
    write_point(tmp_path / "few", 3.3, 3.3 + noise[:20], t_prime=400)
    found = paired_differences(read_points(str(tmp_path)))
    low, high = found["other"]["interval"]
    assert (low, high) == pytest.approx(interval_of_replicates(np.array([0.2, *(0.2 + own)])))
    assert low < 0.2 < high
    assert found["best"]["interval"] is found["few"]["interval"] is None


def test_seeds_are_summed_up(tmp_path):
    for seed, distance in enumerate((3.0, 3.5, 4.0)):
        write_point(tmp_path / f"seed{seed}", distance, seed=seed, seconds_per_image=seed)
    write_point(tmp_path / "other", 5.0, t_prime=300)
    said = write_tables(str(tmp_path))
    [entry] = json.loads((tmp_path / "sweep.json").read_text())["over_seeds"]
    assert entry["folders"] == ["seed0", "seed1", "seed2"] and entry["seeds"] == [0, 1, 2]
    distance = entry["metrics"]["frechet_distance"]
    assert distance == {"mean": 3.5, "lowest": 3.0, "highest": 4.0}
    assert "mean of 3 seeds 3.5, 3 … 4" in said


def test_folders_without_metrics_or_points_are_left_out(tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "metrics.json").write_text('{"run": {}}')
    assert "no point has metrics yet" in write_tables(str(tmp_path))
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1
