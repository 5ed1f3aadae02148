"""Several processes, each with its share of the images: the figures of one."""

from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from evaluations import devices, evaluate
from evaluations.devices import shares_of
from evaluations.moments import gaussian_of, merged
from tests.evaluations.graph_writer import GOLDEN, small_graph


@pytest.mark.parametrize("parts", [[5, 9], [9, 40, 1], [40, 60], [100]])
def test_moments_merge_exactly(parts):
    features = np.random.default_rng(0).standard_normal((sum(parts), 20)) + 100
    pieces = np.split(features, np.cumsum(parts)[:-1])
    got, expected = merged([gaussian_of(piece) for piece in pieces]), gaussian_of(features)
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(got.full_covariance(), expected.full_covariance(), atol=1e-11)
    assert (got.rows is None) == (expected.rows is None)


def test_shares_are_whole_batches():
    assert shares_of(50, 2, 8) == [(0, 32), (32, 50)]
    assert shares_of(50, 1, 64) == [(0, 50)]
    assert len(shares_of(50_000, 2, 64)) == 7


def test_two_processes_give_the_figures_of_one_and_go_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        reference, samples = file["reference"][:60], file["samples"][:50]
    np.savez("samples.npz", arr_0=samples)
    options = {"inception_path": "small.pb", "backend": "torch", "batch_size": 8}
    one = evaluate(reference, "samples.npz", **options).results[0].metrics
    options.update(devices="cpu,cpu", cache_dir="cache")

    # Stopped when the first share has been stored …
    save = devices.FeatureCache.save

    def save_and_stop(path, features):
        save(path, features)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(devices.FeatureCache, "save", staticmethod(save_and_stop))
        with pytest.raises(KeyboardInterrupt):
            evaluate(reference, "samples.npz", **options)
    kept = list(Path("cache").iterdir())
    assert kept
    # … the next run goes on from there, and leaves whole sets only.
    two = evaluate(reference, "samples.npz", **options).results[0].metrics
    for name, value in one.items():
        assert two[name].value == pytest.approx(value.value, rel=1e-9)
    assert len(list(Path("cache").iterdir())) == 2 and not set(kept) & set(Path("cache").iterdir())
    with pytest.raises(UserError, match="^device cuda:99"):
        evaluate(reference, samples, **{**options, "devices": "cpu,99"})
