"""The evaluator as users meet it: the command line, the library call, reference batches."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from esddpm_io.errors import UserError, run_main
from evaluations import evaluate, evaluator, features, make_reference
from evaluations.evaluation import Evaluation, check_inputs
from evaluations.features import GRAPH_NAME, find_graph
from evaluations.inputs import FeatureCache
from evaluations.metrics import frechet_distance, gaussian_of, interval_of_replicates
from evaluations.report import Names
from evaluations.scoring import METRICS, PUBLISHED_METRICS
from evaluations.settings import Settings
from tests.evaluations.graph_writer import GOLDEN, small_graph

WITHOUT_INTERVAL = (
    *("Classifier", "Kernel", "Recall", "Coverage"),
    *("Frechet distance infinity", "RBF", "Memorization"),
    "Spatial",  # of fewer than 1000 samples
    "Precision",  # of 49 samples inside and 1 outside
)
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small graph and the golden images in every form that is read."""
    folder = tmp_path_factory.mktemp("evaluator")
    (folder / "small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        reference, samples = file["reference"][:60], file["samples"][:50]
    np.savez(folder / "ref.npz", arr_0=reference)
    np.savez_compressed(folder / "samples.npz", arr_0=samples)
    np.save(folder / "samples.npy", samples)
    (folder / "images").mkdir()
    for index, image in enumerate(samples):
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run the evaluator's main in the folder, with the small graph and PyTorch."""
    monkeypatch.chdir(folder)

    def call(*arguments: str, graph: str = "small.pb", backend: str = "torch"):
        code = 0
        options = ["--inception_path", graph, "--backend", backend]
        try:
            run_main(lambda: evaluator.main([*arguments, *options]))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def numbers(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in (x.split(": ") for x in out.splitlines())}


def test_five_lines_named_by_what_they_are(run):
    code, out, err = run("ref.npz", "samples.npz", "--json", "out/result.json")
    assert code == 0
    assert list(numbers(out)) == [
        "Classifier score (small)",
        "Frechet distance (small)",
        "Spatial Frechet distance (small)",
        "Precision (small)",
        "Recall (small)",
    ]
    assert "features of samples.npz: 50/50 images" in err
    assert "warning: samples.npz: 50 images for 1792-dimensional features" in err
    saved = json.loads(Path("out/result.json").read_text())
    result = saved["results"][0]
    saved_values = list(result["metrics"].values())
    assert saved_values == pytest.approx(list(numbers(out).values()), rel=1e-5)
    assert all(len(line.split(": ")[1]) <= 12 for line in out.splitlines())  # 6 digits
    assert len(str(result["metrics"]["frechet_distance"])) > 12  # and all of them
    assert list(result["metrics"]) == [
        "classifier_score",
        "frechet_distance",
        "spatial_frechet_distance",
        "precision",
        "recall",
    ]
    assert result["images"] == 50
    assert saved["settings"]["backend"] == "torch"
    assert saved["features"] == "small"


def test_names_that_are_given(run):
    _, out, _ = run("ref.npz", "samples.npz", "--metric_name", "Frechet distance (my features)")
    assert "Frechet distance (my features): " in out
    assert "Recall (my features): " in out
    _, by_file, _ = run("ref.npz", "samples.npz", "--metric_name", "FID")  # which it is not
    assert "Frechet distance (small): " in by_file and "FID" not in by_file


@pytest.mark.parametrize("given", [None, "FID", "Frechet distance (emoji32 features)"])
def test_the_inception_graph_has_the_published_names_whatever_is_given(given):
    evaluation = Evaluation("ref", (), Settings(), "any_name.pb", "0" * 64, "published", "torch")
    names = Names(evaluation, given)
    labels = ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert [names.label(metric) for metric in PUBLISHED_METRICS] == labels
    lower = dataclasses.replace(evaluation, settings=Settings(precision="float16", resize="clean"))
    assert Names(lower, given).label("fid") == "FID (clean resize, float16)"
    assert Names(lower, given).features == "Inception 2015, clean resize, float16"
    other = Names(dataclasses.replace(evaluation, identity="other"), given)
    assert not [metric for metric in METRICS if "FID" in other.label(metric)]
    unverified = Names(dataclasses.replace(evaluation, identity="unverified"), given)
    assert unverified.label("fid") == "FID (unverified graph)"


def test_doubtful_inputs_are_told_of_before_the_features(run):
    """Values of 0-1, another size than the reference's, too few images on either side."""
    rng = np.random.default_rng(0)
    np.savez("binary.npz", arr_0=rng.integers(0, 2, (30, 40, 24, 3), dtype=np.uint8))
    code, _, err = run("ref.npz", "binary.npz", "--metrics", "fid", "--json", "doubts.json")
    assert code == 0
    lines = err.splitlines()
    assert lines[:2] == [
        "warning: binary.npz: no value of the first 30 images is above 1: the range must be "
        "0-255, not 0-1",
        "warning: binary.npz: images of 24x40 against a reference of 32x32: what resizing does to "
        "them counts as a difference",
    ]
    assert lines[2] == "features of ref.npz: 60 images"
    result = json.loads(Path("doubts.json").read_text())["results"][0]
    assert [f"warning: {note}" for note in result["warnings"]] == lines[:2]
    with np.load("ref.npz") as file:
        np.savez("few.npz", arr_0=file["arr_0"][:20])
    _, _, err = run("few.npz", "ref.npz", "ref.npz", "--metrics", "fid")
    warnings = [line for line in err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: few.npz: 20 images for 24-dimensional features: the covariance is singular and "
        "fid comes out too high"
    ]


def test_outputs_that_cannot_be_written_are_named_before_any_work(run):
    Path("afile").touch()
    for option, path in [("--json", "/proc/x/y.json"), ("--cache_dir", "afile")]:
        code, out, err = run("ref.npz", "samples.npz", option, path)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"error: {option}: {path} cannot be written: " in err
    with pytest.raises(UserError, match=r"^OUT: afile/x\.npz cannot be written: .*not a folder"):
        make_reference.main(["ref.npz", "afile/x.npz", "--inception_path", "small.pb"])


def test_inputs_can_be_checked_before_there_are_samples(folder, tmp_path):
    options = {"inception_path": str(folder / "small.pb")}
    check_inputs(str(folder / "ref.npz"), 4, **options)
    with pytest.raises(UserError, match=r"sample batch has 3 images, .* need at least 4"):
        check_inputs(str(folder / "ref.npz"), 3, **options)
    with pytest.raises(UserError, match="--device cuda:99: not available here"):
        check_inputs(str(folder / "ref.npz"), device="cuda:99", **options)
    with np.load(folder / "ref.npz") as file:
        np.savez(tmp_path / "wide.npz", **file, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="statistics of 2048-dimensional features, the graph gives"):
        check_inputs(str(tmp_path / "wide.npz"), **options)
    (tmp_path / "cut.pb").write_bytes(small_graph()[:2000])
    with pytest.raises(UserError, match=r"--inception_path: .*cut\.pb is not a complete frozen"):
        check_inputs(str(folder / "ref.npz"), inception_path=str(tmp_path / "cut.pb"))


@pytest.mark.parametrize(
    ("torch_gpu", "tensorflow_gpu", "chosen"),
    [
        (False, False, "tensorflow"),
        (True, False, "torch"),
        (True, True, "tensorflow"),
        (False, True, "tensorflow"),
    ],
)
def test_auto_takes_the_engine_that_has_a_gpu(monkeypatch, torch_gpu, tensorflow_gpu, chosen):
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(features, "cuda_devices", lambda: int(torch_gpu))
    monkeypatch.setattr("evaluations.backend_tensorflow.has_gpu", lambda: tensorflow_gpu)
    assert features._best_backend("float32", "auto") == chosen
    assert features._best_backend("bfloat16", "auto") == "torch"
    assert features._best_backend("float32", "cpu") == "torch"


def test_every_input_form_gives_the_same(run):
    outputs = [run("ref.npz", name)[1] for name in ("samples.npz", "samples.npy", "images")]
    assert outputs[0] == outputs[1] == outputs[2]


def test_both_engines_print_the_same_through_the_command_line(run):
    pytest.importorskip("tensorflow")
    got, expected = (
        numbers(run("ref.npz", "samples.npz", backend=name)[1]) for name in ("torch", "tensorflow")
    )
    for label, value in expected.items():
        slack = {"abs": 2 / 50} if label[:4] in ("Prec", "Reca") else {"rel": 1e-4}
        assert got[label] == pytest.approx(value, **slack)


def test_several_batches_and_a_table(run):
    code, out, err = run("ref.npz", "samples.npz", "ref.npz", "--table")
    assert code == 0
    assert err.count("features of ref.npz: 60 images") == 2  # as the reference and as samples
    assert err.count("features of samples.npz: 50 images") == 1
    header, rule, *rows = out.splitlines()
    assert header.startswith("| Samples | Images | Classifier score (small) |")
    assert set(rule) <= set("| -:")
    assert [row.split(" | ")[0] for row in rows] == ["| samples.npz", "| ref.npz"]
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    code, out, _ = run("ref.npz", "samples.npz", "ref.npz")
    assert [line for line in out.splitlines() if line.endswith(":")] == ["samples.npz:", "ref.npz:"]


def test_files_of_the_same_name_are_told_apart(run):
    for folder in ("runs/t100", "runs/t400"):
        Path(folder).mkdir(parents=True)
        shutil.copy("samples.npz", folder)
    samples = [str(Path("runs", name, "samples.npz").resolve()) for name in ("t100", "t400")]
    _, out, err = run("ref.npz", *samples, "--metrics", "fid")
    assert out.splitlines()[::2] == ["t100/samples.npz:", "t400/samples.npz:"]
    assert all(f"features of {name}/samples.npz: 50/50" in err for name in ("t100", "t400"))
    _, out, _ = run("ref.npz", *samples, "--metrics", "fid", "--table")
    names = [row.split(" | ")[0] for row in out.splitlines()[2:]]
    assert names == ["| t100/samples.npz", "| t400/samples.npz"]


def test_all_metrics_with_intervals(run):
    code, out, err = run("ref.npz", "samples.npz", "--metrics", "all", "--bootstrap", "20")
    assert code == 0
    assert "no interval of precision: it takes 10 samples inside and 10 outside" in err
    lines = out.splitlines()
    assert len(lines) == len(METRICS) - 1  # there are no labels for a mean over classes
    for line in lines:
        value = float(line.split(": ")[1].split(" ")[0])
        if line.startswith(WITHOUT_INTERVAL):
            assert "interval" not in line
            continue
        low, high = map(float, line.split("interval ")[1].rstrip(")").split(" to "))
        assert low < value < high
    _, out, _ = run("ref.npz", "samples.npz", "--metrics", "kid", "recall", "--table")
    assert " ± " not in out  # there is one subset of a thousand images
    kid = ["--metrics", "kid", "--kid_subset_size", "20"]
    _, out, _ = run("ref.npz", "samples.npz", *kid, "--table")
    assert " ± " in out


def test_json_has_what_intervals_come_from(run):
    run("ref.npz", "samples.npz", "--bootstrap", "20", "--json", "out.json")
    [samples] = json.loads(Path("out.json").read_text())["results"]
    assert set(samples["replicates"]) == set(samples["intervals"])
    for name, replicates in samples["replicates"].items():
        assert len(replicates) == 21 and replicates[0] == samples["metrics"][name]
    logarithmic = interval_of_replicates(
        np.array(samples["replicates"]["frechet_distance"]), logarithmic=True
    )
    assert samples["intervals"]["frechet_distance"] == list(logarithmic)


def test_cache_is_used_by_content_and_only_then(run, monkeypatch):
    first = run("ref.npz", "samples.npz", "--cache_dir", "cache")
    files = sorted(Path("cache").iterdir())
    assert len(files) == 2
    again = run("ref.npz", "images", "--cache_dir", "cache")  # the same pixels
    assert again[1] == first[1]
    assert "features of" not in again[2]
    images = np.load("samples.npy")
    images[-1, -1, -1, -1] ^= 1
    np.save("changed.npy", images)
    assert "features of changed.npy" in run("ref.npz", "changed.npy", "--cache_dir", "cache")[2]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made anew"):
        broken = run("ref.npz", "samples.npz", "--cache_dir", "cache")
    assert broken[:2] == first[:2]
    there = [FeatureCache.load(file, count, 24) for file in files for count in (50, 60)]
    assert len([features for features in there if features]) == 2  # and written again


@pytest.mark.parametrize(
    "odd",
    [
        {"pool": np.zeros((), np.float32)},
        {"pool_mean": np.zeros(())},
        {"pool_count": np.zeros(3, int)},
        {"spatial_rows": np.zeros(7)},
        {"pool_mean": np.array(["a"] * 24)},
    ],
)
def test_cached_arrays_that_fit_nothing_are_made_anew(run, odd):
    first = run("ref.npz", "samples.npz", "--cache_dir", "cache")
    path = next(Path("cache").iterdir())
    with np.load(path) as file:
        np.savez(path, **{**file, **odd})
    with pytest.warns(UserWarning, match="made anew: --cache_dir: .* holds"):
        assert run("ref.npz", "samples.npz", "--cache_dir", "cache")[:2] == first[:2]


def test_reference_batch_round_trip(run, folder, capsys):
    """Statistics of all images, a seeded choice of them, the same figures as from the images."""
    labels = np.arange(60) % 7
    with np.load("ref.npz") as file:
        images = file["arr_0"]
    np.savez("labelled.npz", arr_0=images, arr_1=labels)
    options = ["--inception_path", "small.pb", "--backend", "torch"]
    capsys.readouterr()
    make_reference.main(["labelled.npz", "VIRTUAL.npz", "--keep", "45", "--seed", "3", *options])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "features of labelled.npz: 60 images"
    assert lines[-1] == (
        "warning: labelled.npz: 60 images for 1792-dimensional features: the covariance is singular"
    )
    with np.load("VIRTUAL.npz") as file:  # as the published evaluator reads it
        made = dict(file)
    assert made["arr_0"].dtype == np.uint8
    assert made["mu"].shape == (24,) and made["sigma"].shape == (24, 24)
    assert made["mu_s"].shape == (1792,) and made["sigma_s"].shape == (1792, 1792)
    kept = [
        int(np.flatnonzero((images == image).all(axis=(1, 2, 3)))[0]) for image in made["arr_0"]
    ]
    assert len(set(kept)) == 45
    np.testing.assert_array_equal(made["arr_1"], labels[kept])
    direct = run("ref.npz", "samples.npz", "--metrics", "fid", "sfid")[1]
    through = run("VIRTUAL.npz", "samples.npz", "--metrics", "fid", "sfid")[1]
    for (name, a), (_, b) in zip(numbers(direct).items(), numbers(through).items(), strict=True):
        assert a == pytest.approx(b, rel=1e-9), name
    # Without neighbours to count, the statistics are all that is needed of the reference.
    err = run("VIRTUAL.npz", "samples.npz", "--metrics", "fid", "inception_score")[2]
    assert "features of samples.npz" in err
    assert "features of VIRTUAL.npz" not in err
    make_reference.main(["images", "from_folder.npz", *options])
    with np.load("from_folder.npz") as file:
        assert file["arr_0"].shape == (50, 32, 32, 3)
        assert "arr_1" not in file


def test_given_statistics_stand_as_they_are(run):
    with np.load("ref.npz") as file:
        images = file["arr_0"]
    shifted = {"mu": np.full(24, 5.0), "sigma": np.eye(24)}
    np.savez("shifted.npz", arr_0=images, **shifted)
    _, out, _ = run("shifted.npz", "samples.npz", "--metrics", "fid", "sfid", "recall")
    plain = numbers(run("ref.npz", "samples.npz", "--metrics", "fid", "sfid", "recall")[1])
    got = numbers(out)
    assert got["Frechet distance (small)"] > 100 * plain["Frechet distance (small)"]
    assert got["Spatial Frechet distance (small)"] == plain["Spatial Frechet distance (small)"]
    assert got["Recall (small)"] == plain["Recall (small)"]


def test_half_precision_never_meets_float32_statistics_unasked(run):
    options = ["--inception_path", "small.pb", "--backend", "torch"]
    make_reference.main(["ref.npz", "full.npz", *options])
    code, out, err = run("full.npz", "samples.npz", "--precision", "bfloat16")
    assert (code, out) == (2, "")
    assert "error: --precision bfloat16: the statistics in full.npz were made in float32" in err
    make_reference.main(["ref.npz", "half.npz", *options, "--precision", "bfloat16"])
    code, half, _ = run("half.npz", "samples.npz", "--precision", "bfloat16", "--json", "half.json")
    assert code == 0 and half.count(" (small, bfloat16): ") == len(half.splitlines()) == 5
    assert json.loads(Path("half.json").read_text())["features"] == "small, bfloat16"
    assert run("half.npz", "samples.npz")[0] == 2
    mixed = ["--precision", "bfloat16", "--allow_mixed_precision"]
    assert run("full.npz", "samples.npz", *mixed)[0] == 0


def write_bad_inputs(images: np.ndarray) -> None:
    """Files that are wrong in one way each."""
    np.savez("no_images.npz", mu=np.zeros(3))
    np.savez("floats.npz", arr_0=images / 255.0)
    np.savez("grey.npz", arr_0=images[..., 0])
    np.savez("none.npz", arr_0=images[:0])
    np.savez("three.npz", arr_0=images[:3])
    np.savez("one.npz", arr_0=images[:1])
    np.savez("half_pair.npz", arr_0=images, mu=np.zeros(24))
    np.savez("wrong_width.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("wrong_shape.npz", arr_0=images, mu=np.zeros(24), sigma=np.eye(23))
    np.savez("nan.npz", arr_0=images, mu=np.full(24, np.nan), sigma=np.eye(24))
    Path("truncated.npz").write_bytes(Path("ref.npz").read_bytes()[:5000])
    Path("text.txt").write_text("not images")
    Path("empty").mkdir(exist_ok=True)
    Path("mixed").mkdir(exist_ok=True)
    for index, width in enumerate([8, 8, 8, 9]):
        Image.new("RGB", (width, 8)).save(f"mixed/{index}.png")
    Path("unreadable").mkdir(exist_ok=True)
    Path("unreadable/0.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    "sample, words",
    [
        ("missing.npz", "SAMPLE: there is no file"),
        ("no_images.npz", "has no arr_0"),
        ("floats.npz", "must be uint8"),
        ("grey.npz", "must be uint8 [N, height, width, 3]"),
        ("none.npz", "must be uint8"),
        ("three.npz", "three.npz has 3 images, precision, recall need at least 4"),
        ("one.npz", "fid, sfid, precision, recall need at least 4"),
        ("half_pair.npz", "has no sigma"),
        ("wrong_width.npz", "statistics of 2048-dimensional features, the graph gives 24"),
        ("wrong_shape.npz", "[D] and [D, D] expected"),
        ("nan.npz", "NaN or infinite"),
        ("truncated.npz", "not a complete .npz file"),
        ("text.txt", "neither an .npz or .npy file nor a folder"),
        ("empty", "has no images"),
        ("mixed", "mixed/3.png is 9x8"),
        ("unreadable", "unreadable/0.png"),
    ],
)
def test_bad_images_are_named(run, sample, words):
    with np.load("ref.npz") as file:
        write_bad_inputs(file["arr_0"])
    code, out, err = run("ref.npz", sample)
    assert code == 2
    assert out == ""
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch_size", "0"], "--batch_size 0"),
        (["--bootstrap", "-1"], "--bootstrap -1"),
        (["--kid_subset_size", "1"], "--kid_subset_size 1"),
        (["--json", "."], "--json: . is a folder"),
        (["--metrics", "psnr"], "invalid choice: 'psnr'"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--precision", "float16", "--device", "cpu"], "float16 needs a GPU"),
    ],
)
def test_bad_options_are_named(run, options, words):
    code, out, err = run("ref.npz", "samples.npz", *options)
    assert (code, out) == (2, "")
    assert words in err


def test_missing_graph_says_where_to_put_it(run, monkeypatch, tmp_path):
    assert "there is no file nowhere.pb" in run("ref.npz", "samples.npz", graph="nowhere.pb")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ES_DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evaluations.features.GRAPH_URL", "http://127.0.0.1:9/graph.pb")
    with pytest.raises(UserError, match=rf"cannot reach.*put it at .*{GRAPH_NAME}.*working dir"):
        find_graph()
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / GRAPH_NAME).write_bytes(small_graph())
    assert find_graph() == str(tmp_path / "cache" / GRAPH_NAME)
    (tmp_path / GRAPH_NAME).write_bytes(small_graph())
    assert find_graph() == GRAPH_NAME


def test_library_call_with_arrays(folder, capsys):
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        reference, samples = file["reference"][:30], file["samples"][:30]
    options = {"inception_path": str(folder / "small.pb"), "backend": "torch"}
    evaluation = evaluate(reference, samples, reference, **options)
    assert evaluation.results[0]["fid"] > 0
    assert evaluation.results[1]["fid"] == pytest.approx(0, abs=1e-9)
    assert set(evaluation.results[0].metrics) == set(PUBLISHED_METRICS)
    assert "covariance is singular" in " ".join(evaluation.results[0].warnings)
    with pytest.raises(UserError, match="^samples: the array is float32"):
        evaluate(reference, samples.astype(np.float32), **options)
    with pytest.raises(ValueError, match="^metrics psnr: choose from"):
        evaluate(reference, samples, metrics=("psnr",), **options)
    with pytest.raises(UserError, match="^samples: give at least one"):
        evaluate(reference, **options)
    assert capsys.readouterr() == ("", "")


SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=5).map(tuple) | st.tuples(
    st.integers(1, 12), st.integers(1, 40), st.integers(1, 40), st.just(3)
)
DTYPES = st.sampled_from(["uint8", "uint8", "int64", "float32", "bool", "<U3", "complex64"])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shape=SHAPES, dtype=DTYPES, suffix=st.sampled_from(["npz", "npy"]))
def test_no_array_gives_a_traceback(run, shape, dtype, suffix):
    """Any shape, size and dtype ends in five finite numbers or in one line and code 2."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, shape).astype(dtype)
    if suffix == "npz":
        np.savez("any.npz", arr_0=array)
    else:
        np.save("any.npy", array)
    code, out, err = run("ref.npz", f"any.{suffix}")
    if code == 0:
        assert dtype == "uint8" and len(shape) == 4 and shape[0] >= 4
        assert np.isfinite(list(numbers(out).values())).all()
        assert len(out.splitlines()) == 5
    else:
        assert code == 2
        assert err.splitlines()[-1].startswith("error: ")


BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
from esddpm_io.errors import run_main
from evaluations.evaluator import main
run_main(main)
"""


@pytest.mark.parametrize("absent, backend", [("tensorflow", "torch"), ("torch", "tensorflow")])
def test_neither_engine_needs_the_other(folder, absent, backend):
    if backend == "tensorflow":
        pytest.importorskip("tensorflow")

    def call(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", BLOCKED.format(name=absent), "ref.npz", "samples.npz"]
        return subprocess.run(
            [*command, "--inception_path", "small.pb", "--backend", name, *flags],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )

    # As a process of a launcher, which looks for a device of its own, and alone
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for flags, environment in ([], {}), (["--cache_dir", f"without_{absent}"], rank):
        good = call(backend, *flags, **environment)
        assert good.returncode == 0, good.stderr
        assert len(numbers(good.stdout)) == 5
        refused = call(absent, *flags, **environment)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert f"--backend {absent}" in refused.stderr.splitlines()[-1]


def test_importing_the_evaluator_loads_no_engine():
    code = (
        "import sys, evaluations.evaluator, evaluations.make_reference\n"
        "print([n for n in ('torch', 'tensorflow') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_flags_and_defaults_are_frozen():
    defaults = vars(evaluator.create_argparser().parse_args(["ref", "sample"]))
    assert defaults == {
        "ref_batch": "ref",
        "sample_batch": ["sample"],
        "inception_path": None,
        "metric_name": None,
        "backend": "auto",
        "device": "auto",
        "devices": None,
        "precision": "float32",
        "allow_mixed_precision": False,
        "batch_size": 64,
        "cache_dir": None,
        "expect": None,
        "metrics": ("published",),  # which are PUBLISHED_METRICS where the network has them
        "resize": "published",
        "neighbour_arithmetic": None,  # float16 with a frozen graph
        "kid_subsets": 100,
        "kid_subset_size": 1000,
        "bootstrap": 0,
        "seed": 0,
        "json": None,
        "memorization_png": None,
        "table": False,
    }


def test_fewer_samples_than_dimensions_are_scored_exactly(folder):
    """The spatial distance of 60 and 50 images in 1792 dimensions, from kept features."""
    options = {"inception_path": str(folder / "small.pb"), "backend": "torch", "bootstrap": 2}
    evaluation = evaluate(folder / "ref.npz", folder / "samples.npz", **options)
    told = " ".join(evaluation.results[0].warnings)
    assert "covariance is singular" in told
    assert "no interval of sfid: it takes 3584 samples" in told
    assert "no interval of fid" not in told and "of recall" not in told
    from evaluations.features import choose_engine, features_of_batch, load_graph

    engine = choose_engine(load_graph(options["inception_path"]), "torch")
    sets = []
    for name in ("ref.npz", "samples.npz"):
        with np.load(folder / name) as file:
            sets.append(gaussian_of(features_of_batch(engine, file["arr_0"])[1]))
    assert evaluation.results[0]["sfid"] == pytest.approx(frechet_distance(*sets), rel=1e-5)
