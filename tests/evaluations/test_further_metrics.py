"""FID infinity, FID per class, the Gaussian kernel, memorization: against independent code."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from esddpm_io.errors import UserError
from esddpm_io.images import save_png
from evaluations import evaluate, evaluator, scoring
from evaluations.features import Features
from evaluations.metrics import (
    Value,
    frechet_distance,
    frechet_distance_extrapolated,
    frechet_distance_per_class,
    gaussian_kernel_distance,
    gaussian_of,
    memorization,
)
from tests.evaluations.graph_writer import GOLDEN, small_graph
from tests.evaluations.metric_packages import inputs

REFERENCE, SAMPLES, _ = inputs()
GRAPH = {"inception_path": "small.pb", "backend": "torch"}


def plain_frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(a + b - 2 * sqrtm(a @ b).real))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Reference and samples with labels; samples 7 and 30 are copies of reference images."""
    monkeypatch.chdir(tmp_path)
    Path("small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        reference, samples = file["reference"][:60], file["samples"][:50]
    samples[7], samples[30] = reference[12], reference[41]
    np.savez("ref.npz", arr_0=reference, arr_1=np.arange(60) % 3)
    np.savez("samples.npz", arr_0=samples, arr_1=np.arange(50) % 3)
    return tmp_path


def test_extrapolation_is_the_line_of_plain_distances():
    reference = gaussian_of(REFERENCE)
    got = frechet_distance_extrapolated(reference, SAMPLES, seed=4)
    rng = np.random.default_rng(4)
    sizes = np.linspace(len(SAMPLES) // 2, len(SAMPLES), 15).astype(int)
    values = [plain_frechet(REFERENCE, SAMPLES[rng.permutation(len(SAMPLES))[:n]]) for n in sizes]
    design = np.stack([np.ones(15), 1 / sizes], axis=1)
    line, *_ = np.linalg.lstsq(design, values, rcond=None)
    assert got.value == pytest.approx(line[0], rel=1e-6)
    assert got.notes == ()
    (note,) = frechet_distance_extrapolated(reference, SAMPLES[:40]).notes
    assert "from 20 and more images, too few for 24-dimensional features" in note


def test_extrapolation_takes_the_bias_away():
    """Samples of the reference's own distribution are at distance 0, which their FID is not."""
    rng = np.random.default_rng(1)
    reference = gaussian_of(rng.standard_normal((40_000, 10)))
    draws = [rng.standard_normal((600, 10)) for _ in range(20)]
    plain = np.mean([frechet_distance(reference, gaussian_of(draw)) for draw in draws])
    limit = np.mean([frechet_distance_extrapolated(reference, draw).value for draw in draws])
    assert plain > 0.05
    assert abs(limit) < 0.2 * plain


def test_distance_per_class_is_the_mean_of_plain_ones():
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, len(features)) for features in (REFERENCE, SAMPLES)]
    got = frechet_distance_per_class(REFERENCE, labels[0], SAMPLES, labels[1])
    each = [plain_frechet(REFERENCE[labels[0] == k], SAMPLES[labels[1] == k]) for k in range(3)]
    assert got.value == pytest.approx(np.mean(each), rel=1e-6)
    assert got.deviation == pytest.approx(np.std(each), rel=1e-5)
    assert got.notes == ()


def test_classes_with_too_few_images_are_named():
    own, theirs = np.zeros(len(REFERENCE), int), np.zeros(len(SAMPLES), int)
    own[:9] = 5  # no more than the 24 features, and only one among the samples
    theirs[:1] = 5
    own[20:30] = theirs[20:30] = 8
    theirs[1:5] = 6  # nowhere in the reference
    got = frechet_distance_per_class(REFERENCE, own, SAMPLES, theirs)
    assert got.notes == (
        "classes with fewer than 2 images, left out: 5, 6",
        "1 of 2 classes have no more images than features: their distances come out too high",
    )
    each = [plain_frechet(REFERENCE[own == k], SAMPLES[theirs == k]) for k in (0, 8)]
    assert got.value == pytest.approx(np.mean(each), rel=1e-5)
    with pytest.raises(ValueError, match="no class has 2 images"):
        frechet_distance_per_class(REFERENCE, own + 100, SAMPLES, theirs)


def test_gaussian_kernel_against_all_pairs_and_a_closed_form():
    def mean_kernel(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * 10.0**2)).mean()

    for x, y in [(REFERENCE, SAMPLES), (REFERENCE + 50, SAMPLES + 50)]:
        x, y = x.astype(np.float32), y.astype(np.float32)
        expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
        assert gaussian_kernel_distance(x, y).value == pytest.approx(expected, rel=1e-4)
    assert gaussian_kernel_distance(REFERENCE, REFERENCE).value == pytest.approx(0, abs=1e-9)
    # Two points 10 apart: k = 1 with themselves, exp(-1/2) with each other.
    apart = np.array([[0.0, 0.0]]), np.array([[6.0, 8.0]])
    assert gaussian_kernel_distance(*apart).value == pytest.approx(2000 * (1 - np.exp(-0.5)))


def test_memorization_by_hand():
    """A line of points 1 apart, but for two that are 0.5 apart; samples at known distances."""
    points = np.arange(200.0)
    points[1] = 0.5
    reference = np.stack([points, np.zeros(200)], axis=1)
    heights = np.array([0.0, 0.4, 0.6, 0.9, 3.0])
    samples = np.stack([[0, 50, 60, 70, 80], heights], axis=1)
    found = memorization(reference, samples)
    # The two smallest of 200 distances are 0.5: the 1 % quantile lies 0.99 of the way to the 3rd.
    assert found.limit == pytest.approx(0.5 + 0.99 * 0.5)
    np.testing.assert_allclose(found.distances, heights, atol=2e-2)
    assert found.nearest.tolist() == [0, 50, 60, 70, 80]
    assert found.share == Value(0.8)
    pairs = found.most_suspicious(2)
    assert [pair[:2] for pair in pairs] == [(0, 0), (1, 50)]
    with pytest.raises(ValueError, match="1 points: at least 2"):
        memorization(reference[:1], samples)


def test_memorization_against_a_tree():
    found = memorization(REFERENCE, SAMPLES)
    tree = cKDTree(REFERENCE)
    distances, rows = tree.query(SAMPLES)
    np.testing.assert_array_equal(found.nearest, rows)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3)
    limit = np.quantile(tree.query(REFERENCE, k=2)[0][:, 1], 0.01)
    assert found.limit == pytest.approx(limit, rel=1e-3)


def test_new_images_pass_for_copies_as_often_as_the_quantile_says_and_copies_always():
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((2000, 8))
    assert memorization(reference, rng.standard_normal((4000, 8))).share.value == pytest.approx(
        0.01, abs=0.006
    )
    copies = reference[:300] + 1e-3 * rng.standard_normal((300, 8))
    assert memorization(reference, copies).share == Value(1.0)


def test_a_reference_of_duplicates_is_told_of():
    (note,) = memorization(np.concatenate([REFERENCE, REFERENCE[:9]]), SAMPLES).share.notes
    assert "there twice" in note and "duplicates" in note


def test_copies_are_named_and_drawn(folder, capsys):
    argv = ["ref.npz", "samples.npz", "--inception_path", "small.pb", "--backend", "torch"]
    argv += ["--metrics", "memorization", "--memorization_png", "out/pairs.png"]
    evaluator.main([*argv, "--json", "out/result.json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "Memorization (small): 0.04"  # 2 of 50
    pairs = json.loads(Path("out/result.json").read_text())["results"][0]["suspicious"]
    assert sorted(pair[:2] for pair in pairs[:2]) == [[7, 12], [30, 41]]
    assert [pair[2] for pair in pairs] == sorted(pair[2] for pair in pairs) and len(pairs) == 16
    picture = np.asarray(Image.open("out/pairs.png"))
    with np.load("ref.npz") as file:
        copied = file["arr_0"][pairs[0][1]].repeat(4, axis=0).repeat(4, axis=1)
    for left in (2, 2 + 128):  # the sample, and the same image of the reference beside it
        np.testing.assert_array_equal(picture[2 : 2 + 128, left : left + 128], copied)


def test_a_picture_without_the_metric_or_of_many_batches_is_refused(folder):
    argv = ["--inception_path", "small.pb", "--memorization_png", "a.png"]
    for more in (["samples.npz"], ["samples.npz", "samples.npz", "--metrics", "memorization"]):
        with pytest.raises(UserError, match="--memorization_png takes --metrics memorization and"):
            evaluator.main(["ref.npz", *more, *argv])


def test_per_class_takes_the_labels_of_both_files(folder):
    result = evaluate("ref.npz", "samples.npz", metrics="fid_per_class", **GRAPH).results[0]
    assert result.warnings[-1].startswith("samples.npz: 3 of 3 classes have no more images than")
    reference = evaluate("ref.npz", "samples.npz", metrics="all", **GRAPH)
    assert set(reference.results[0].metrics) == set(scoring.METRICS)
    with np.load("samples.npz") as file:
        samples = file["arr_0"]
    with pytest.raises(UserError, match=r"^metrics fid_per_class: .* no labels \(arr_1\): choose"):
        evaluate("ref.npz", samples, metrics="fid_per_class", **GRAPH)
    assert (
        "fid_per_class"
        not in evaluate("ref.npz", samples, metrics="all", **GRAPH).results[0].metrics
    )


@pytest.mark.parametrize(("count", "offered"), [(999, {"fid"}), (1000, {"fid", "sfid"})])
def test_an_interval_of_sfid_takes_a_thousand_samples(count, offered):
    rng = np.random.default_rng(0)
    sides = []
    for shift in (0.0, 0.1):
        rows = rng.standard_normal((count, 4)) + shift
        sides.append(Features(rows, gaussian_of(rows), gaussian_of(rows), rows))
    options = {"neighbour_arithmetic": "float32", "kid_subsets": 1, "kid_subset_size": 2, "seed": 0}
    scorer = scoring.Scorer(*sides, None, **options)
    assert {name for name in ("fid", "sfid") if scorer.replicates(name, 3) is not None} == offered


def write_classes(folder, source, names):
    """A folder of images in subfolders of these names, in turn."""
    with np.load(source) as file:
        images = file["arr_0"]
    for index, image in enumerate(images):
        save_png(Path(folder, names[index % len(names)], f"{index}.png"), image)


def test_classes_are_paired_by_name_or_not_at_all(folder):
    """Folders number their classes by themselves: equal numbers are of other classes."""
    write_classes("pets", "ref.npz", ["cats", "dogs", "eels"])
    write_classes("same", "samples.npz", ["cats", "dogs", "eels"])
    write_classes("other", "samples.npz", ["dogs", "eels", "zebras"])
    by_number = evaluate("ref.npz", "samples.npz", metrics="fid_per_class", **GRAPH).results[0]
    for reference in ("pets", "ref.npz"):
        named = evaluate(reference, "same", metrics="fid_per_class", **GRAPH).results[0]
        assert named["fid_per_class"] == pytest.approx(by_number["fid_per_class"], rel=1e-9)
    words = "pets and other have other classes, only one of them has cats, zebras: choose from"
    with pytest.raises(UserError, match=f"^metrics fid_per_class: {words}"):
        evaluate("pets", "same", "other", metrics="fid_per_class", **GRAPH)
    assert (
        "fid_per_class" not in evaluate("pets", "other", metrics="all", **GRAPH).results[0].metrics
    )
    evaluate("pets", "other", metrics="fid", **GRAPH)


def test_a_metric_is_one_entry_of_the_table(folder, monkeypatch, capsys):
    """Added to METRICS alone it has its flag, its lines, its JSON and its interval."""

    def share_of_large(scorer):
        large = scorer.samples.pool.max(axis=1) > np.median(scorer.reference.pool.max(axis=1))
        return lambda rows: float(large[rows].mean())

    entry = scoring.Metric(
        "Large",
        "Large",
        "large",
        fewest=5,
        value=lambda s: Value(share_of_large(s)(np.arange(50)), notes=("of 50",)),
        resampled=share_of_large,
        needs=("images",),
    )
    monkeypatch.setitem(scoring.METRICS, "large", entry)
    argv = ["ref.npz", "samples.npz", "--inception_path", "small.pb", "--backend", "torch"]
    evaluator.main([*argv, "--metrics", "large", "--bootstrap", "10", "--json", "large.json"])
    out, err = capsys.readouterr()
    assert out.startswith("Large (small): 0.") and "95 % interval" in out
    assert "warning: samples.npz: of 50" in err
    assert "large" in json.loads(Path("large.json").read_text())["results"][0]["metrics"]
    with pytest.raises(UserError, match="has 4 images, large need at least 5"):
        evaluate("ref.npz", np.zeros((4, 8, 8, 3), np.uint8), metrics="large", **GRAPH)
