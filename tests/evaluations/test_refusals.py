"""What the evaluator refuses or names otherwise, since the figure would be another one's."""

import functools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esddpm_io.errors import UserError
from evaluations import evaluate, features
from evaluations.devices import extract_on_devices, stamp_of
from evaluations.evaluation import run
from evaluations.evaluator import warn
from evaluations.features import graph_identity, load_graph, remember_graph
from evaluations.graph_file import Graph, Node
from evaluations.inputs import open_set
from evaluations.make_reference import make_reference
from evaluations.settings import Settings
from tests.evaluations.graph_writer import GOLDEN, constant, graph, node, small_graph


@pytest.fixture(scope="module")
def images():
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        return file["reference"][:30], file["samples"][:30]


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """The evaluation in an empty folder with a small graph; figures and what was printed."""
    monkeypatch.chdir(tmp_path)
    Path("small.pb").write_bytes(small_graph())

    def call(*sets, **settings):
        options = {"inception_path": "small.pb", "backend": "torch", "metrics": "fid"}
        capsys.readouterr()
        evaluation = run(*sets, tell=warn, **{**options, **settings})
        return evaluation.results[0].metrics, capsys.readouterr().err

    return call


def refused_early(score, capsys, words: str, *sets, **settings) -> None:
    """Refused with these words, before any image went through the graph."""
    with pytest.raises(UserError, match=words):
        score(*sets, **settings)
    assert "features of" not in capsys.readouterr().err


def test_a_changed_byte_is_not_scored(score, images):
    np.savez("a.npz", arr_0=images[1])
    data = bytearray(Path("a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    Path("a.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"SAMPLE: arr_0 in a\.npz is not .*CRC-32"):
        score(images[0], "a.npz")
    # Of which two processes see a half each
    with pytest.raises(UserError, match=r"SAMPLE: arr_0 in a\.npz is not .*CRC-32"):
        score(images[0], "a.npz", devices="cpu,cpu", batch_size=15)


@pytest.mark.parametrize("change", ["negative", "asymmetric", "indefinite"])
def test_statistics_that_are_no_covariance_are_refused(score, images, capsys, change):
    sigma = np.cov(np.random.default_rng(0).standard_normal((40, 24)), rowvar=False)
    given = {"mu": np.zeros(24, np.float32)}
    np.savez("good.npz", arr_0=images[0], sigma=sigma.astype(np.float32), **given)
    score("good.npz", images[1])
    np.savez("none.npz", arr_0=images[0], sigma=0 * sigma, **given)
    score("none.npz", images[1])
    if change == "negative":
        sigma = -sigma
    elif change == "asymmetric":
        sigma[0, 1] += 0.01
    else:
        sigma[0, 1] = sigma[1, 0] = 3
    np.savez("bad.npz", arr_0=images[0], sigma=sigma, **given)
    words = "^REF: mu and sigma of bad.npz: sigma is no covariance"
    refused_early(score, capsys, words, "bad.npz", images[1])


@pytest.mark.parametrize("name", ["inception_path", "cache_dir"])
def test_an_empty_path_is_none(score, images, name):
    with pytest.raises(UserError, match=f"--{name} is empty"):
        score(*images, **{name: ""})
    with pytest.raises(UserError, match="--cache_dir gs://a/b: "):
        score(*images, cache_dir="gs://a/b")


def test_a_damaged_note_of_known_graphs_is_left_aside(score, images, monkeypatch, tmp_path):
    monkeypatch.setenv("ES_DDPM_CACHE", str(tmp_path))
    monkeypatch.setattr(Graph, "has_inception_nodes", True)
    Path("known_graphs.json").write_text("x")
    with pytest.warns(UserWarning, match="known_graphs.json is damaged.* left aside"):
        assert graph_identity(load_graph("small.pb")) == "unverified"


def test_no_warning_is_told_twice(score, images, monkeypatch, tmp_path):
    """Though the network's identity is asked for by statistics and by results."""
    monkeypatch.setenv("ES_DDPM_CACHE", str(tmp_path))
    monkeypatch.setattr(Graph, "has_inception_nodes", True)
    Path("known_graphs.json").write_text("x")
    width = load_graph("small.pb").dimensions
    np.savez("ref.npz", arr_0=images[0], mu=np.zeros(width), sigma=np.eye(width))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        score("ref.npz", images[1])
    assert len([one for one in caught if "known_graphs.json" in str(one.message)]) == 1


def test_the_last_image_of_a_folder_is_looked_at_first(score, images, capsys):
    Path("set").mkdir()
    for index, image in enumerate(images[1]):
        Image.fromarray(image).save(f"set/{index}.png")
        Image.fromarray(image).save(f"set/{index}.jpg")
    score(images[0], "set")
    last = Path("set/99.png")
    Image.new("RGB", (9, 8)).save(last)
    refused_early(score, capsys, r"set/99\.png is 9x8", images[0], "set")
    last.write_bytes(Path("set/7.png").read_bytes()[:-30])
    refused_early(score, capsys, r"SAMPLE: cannot read the image set/99\.png", images[0], "set")
    last.unlink()
    last.mkdir()
    refused_early(score, capsys, r"SAMPLE: cannot read set/99\.png", images[0], "set")
    last.rmdir()
    os.mkfifo(last)
    refused_early(score, capsys, r"set/99\.png: it is a pipe", images[0], "set")
    last.unlink()
    jpeg = Path("set/7.jpg").read_bytes()
    Path("set/99.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    refused_early(score, capsys, r"cannot read the image set/99\.jpg", images[0], "set")


def test_an_array_shorter_than_its_header_is_refused_first(score, images, capsys):
    np.save("a.npy", images[1])
    Path("a.npy").write_bytes(Path("a.npy").read_bytes()[:-1])
    refused_early(score, capsys, r"SAMPLE: a\.npy is not a complete", images[0], "a.npy")


def test_swapped_reference_and_samples_are_refused(score, images, capsys):
    np.savez("ref.npz", arr_0=images[0], mu=np.zeros(24), sigma=np.eye(24))
    np.savez("samples.npz", arr_0=images[1])
    score("ref.npz", "samples.npz")
    refused_early(score, capsys, "are the two swapped", "samples.npz", "ref.npz")
    with np.load("ref.npz") as file:
        np.savez("other.npz", **file, feature_network="0" * 64)  # which are left aside
    refused_early(score, capsys, "are the two swapped", "samples.npz", "other.npz")


def test_library_calls_at_their_edges(score, images, capsys):
    reference, samples = images
    plain = score(reference, samples, metrics=("fid",))[0]
    assert score(reference, samples, metrics="fid")[0] == plain
    assert score(torch.from_numpy(reference), torch.from_numpy(samples))[0] == plain
    mirrored = samples[:, :, ::-1]
    assert score(reference, mirrored)[0] == score(reference, mirrored.copy())[0]
    refused_early(score, capsys, "unknown setting metric; valid are", *images, metric="fid")
    refused_early(score, capsys, "SAMPLE: the path is empty", reference, "")
    refused_early(score, capsys, "SAMPLE is a list: give a path", reference, [1, 2])


def test_a_warning_is_printed_once(score, images):
    small = images[0][:20]
    _, err = score(images[0], small, small, small)
    assert err.count("20 images for 24-dimensional features") == 1


def _with_nan(array):
    array.flat[-1] = np.nan
    return array


DAMAGES = {
    "pool": ("pool", _with_nan),
    "images": ("pool", lambda array: array[:-1]),
    "features": ("pool", lambda array: array[:, :-1]),
    "mean": ("pool_mean", lambda array: array + 1),
    "moments": ("spatial_rows", _with_nan),
    "width of moments": ("spatial_rows", lambda array: array[:, :-1]),
    "rows of moments": ("spatial_rows", lambda array: array[:-1]),
    "spatial": ("spatial", _with_nan),
    "spatial features": ("spatial", lambda array: array[:, :-1]),
    "images of spatial features": ("spatial", lambda array: array[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_is_made_anew(score, images, damage):
    expected, _ = score(*images, cache_dir="cache", bootstrap=2)  # which keeps spatial features
    name, changed = DAMAGES[damage]
    for path in Path("cache").iterdir():
        with np.load(path) as file:
            arrays = dict(file)
        if name in arrays:
            np.savez(path, **{**arrays, name: changed(arrays[name])})
    with pytest.warns(UserWarning, match="holds other numbers than it should"):
        got, _ = score(*images, cache_dir="cache", bootstrap=2)
    assert got == expected


def inception_nodes(weights: np.ndarray) -> Graph:
    nodes = [
        Node("mixed_10/join", "Concat", (), {}),
        Node("w", "Const", (), {"value": weights}),
        Node("softmax/logits/MatMul", "MatMul", ("x", "w"), {}),
    ]
    return Graph("graph.pb", "a" * 64, {one.name: one for one in nodes})


def test_only_the_published_file_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ES_DDPM_CACHE", "cache")
    Path("graph.pb").write_bytes(b"of the right nodes")
    inception = inception_nodes(np.zeros((2048, 1008), np.float32))
    assert graph_identity(inception) == "unverified"
    assert graph_identity(inception_nodes(np.zeros((24, 8), np.float32))) == "other"
    # By size and MD5 …
    monkeypatch.setattr(features, "GRAPH_BYTES", 18)
    assert graph_identity(inception) == "unverified"
    monkeypatch.setattr(features, "GRAPH_MD5", "4dd0b9b7d9ae5d6ea2b8cf5f4b2a6a11")
    assert graph_identity(inception) == "unverified"
    # … or as what was once downloaded.
    remember_graph("graph.pb")
    assert graph_identity(inception) == "unverified"  # its digest is said to be another
    digest = "e" * 64
    (tmp_path / "cache" / "known_graphs.json").write_text(
        f'{{"{features.GRAPH_NAME}": "{digest}"}}'
    )
    known = Graph(inception.path, digest, inception.nodes)
    assert graph_identity(known) == "published"


WEIGHTS = constant("w", np.ones((2, 3), np.float32))
HEAD = [
    node("ExpandDims", "Identity", ["x"], T=1),
    WEIGHTS,
    node("softmax/logits/MatMul", "MatMul", ["pool_3", "w"], T=1),
]
KERNEL = constant("k", np.ones((1, 1, 3, 2), np.float32))
LAYER = {"T": 1, "padding": b"SAME"}
RELU = node("mixed_6/conv", "Relu", ["ExpandDims"])


def mean_over(*axes: int, keep_dims: bool = False) -> list[bytes]:
    """A pool that is the mean over these axes of [N, H, W, 3]."""
    axis = constant("axes", np.array(axes, np.int32))
    return [axis, node("pool_3", "Mean", ["mixed_6/conv", "axes"], T=1, keep_dims=keep_dims)]


@pytest.mark.parametrize(
    "nodes, words",
    [
        (
            [
                node("pool_3", "Identity", ["mixed_6/conv"]),
                node("mixed_6/conv", "Relu", ["pool_3"]),
            ],
            "depends on itself",
        ),
        (
            [
                node("pool_3", "Identity", ["mixed_6/conv"]),
                node("mixed_6/conv", "Identity", ["pool_3"]),
            ],
            "depends on itself",
        ),
        (
            [
                KERNEL,
                node("mixed_6/conv", "Conv2D", ["ExpandDims", "k"], strides=[1, 0, 0, 1], **LAYER),
                node("pool_3", "Relu", ["mixed_6/conv"]),
            ],
            "strides",
        ),
        (
            [
                node("k", "Const"),
                node("mixed_6/conv", "Conv2D", ["ExpandDims", "k"], strides=[1] * 4, **LAYER),
                node("pool_3", "Relu", ["mixed_6/conv"]),
            ],
            "k has no numbers",
        ),
        ([node("mixed_6/conv", "Relu"), node("pool_3", "Identity")], "pool_3 has no input"),
        ([RELU, node("pool_3", "Relu")], "the Relu node pool_3 has no input"),
        ([RELU, node("pool_3", "BiasAdd")], "the BiasAdd node pool_3 has no input"),
        ([RELU, node("pool_3", "BiasAdd", ["w", "w"])], "pool_3"),
        ([RELU, node("pool_3", "Identity", ["w"])], "w does not depend on the images"),
        ([RELU, node("pool_3", "Relu", ["w"])], "pool_3"),
        ([RELU, *mean_over(0, 1, 2, 3)], r"gives \[\] for 2 images"),
        ([RELU, *mean_over(1, 2, 3)], r"gives \[2\] for 2 images"),
        ([RELU, *mean_over(1, 2)], r"gives 3 features of an image, its classifier takes 2"),
    ],
)
def test_graphs_that_cannot_be_run_are_one_line(score, images, capsys, nodes, words):
    Path("bad.pb").write_bytes(graph(*HEAD, *nodes))
    refused_early(score, capsys, words, *images, inception_path="bad.pb")


def test_features_are_those_of_one_image_each(score, images):
    """Of one image, a mean over the batch is what it should be."""
    weights = constant("w", np.ones((3, 2), np.float32))
    mean = mean_over(0, 1, 2, keep_dims=True)
    Path("bad.pb").write_bytes(graph(HEAD[0], HEAD[2], weights, RELU, *mean))
    with pytest.raises(UserError, match=r"gives \[1, 1, 1, 3\] for 2 images, which are not"):
        score(*images, inception_path="bad.pb")


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (["x", "s"], np.array([8, 8, 8], np.int32)),
        (["x", "s"], np.array(8, np.int32)),
        (["x", "s"], np.array([8, 0], np.int32)),
        (["x", "s"], np.array([8, 2**31 - 1], np.int32)),
        (["x"], np.array([8, 8], np.int32)),
        (["x", "none"], np.array([8, 8], np.int32)),
        (["x", "empty"], np.array([8, 8], np.int32)),
    ],
)
@pytest.mark.parametrize("resize", ["published", "clean"])
def test_graphs_that_resize_to_no_size_are_one_line(score, images, inputs, size, resize):
    nodes = [constant("s", size), node("empty", "Identity")]
    resized = node("resize", "ResizeBilinear", ["ExpandDims", *inputs[1:]], T=1)
    pool = [node("mixed_6/conv", "Relu", ["resize"]), node("pool_3", "Relu", ["resize"])]
    Path("bad.pb").write_bytes(graph(*HEAD, *nodes, resized, *pool))
    with pytest.raises(
        UserError, match=r"bad\.pb: (resize resizes to|there is no node|empty has|the)"
    ):
        score(*images, inception_path="bad.pb", resize=resize)


def test_features_that_are_no_numbers_are_known_first(score, images, capsys):
    pool = [node("n", "Neg", ["mixed_6/conv"], T=1), node("pool_3", "Sqrt", ["n"], T=1)]
    size = int(np.prod(images[0].shape[1:]))
    weights = constant("w", np.ones((size, 2), np.float32))
    Path("nan.pb").write_bytes(graph(HEAD[0], HEAD[2], weights, RELU, *pool))
    words = "the features of image 0 of .* are not finite"
    refused_early(score, capsys, words, *images, inception_path="nan.pb")


def test_a_batch_of_one_keeps_its_axis(score, images):
    """Where all axes of length 1 go."""
    squeezed = [node("p", "Mean", ["mixed_6/conv", "axes"], T=1, keep_dims=True)]
    squeezed += [
        constant("axes", np.array([1, 2], np.int32)),
        node("pool_3", "Squeeze", ["p"], T=1),
    ]
    weights = constant("w", np.ones((3, 2), np.float32))
    Path("s.pb").write_bytes(graph(HEAD[0], HEAD[2], weights, RELU, *squeezed))
    figures = [
        score(*images, inception_path="s.pb", batch_size=size)[0]["fid"].value
        for size in (1, 29, 30)
    ]
    assert figures == pytest.approx([figures[-1]] * 3, rel=1e-9) and figures[0] > 0


def test_what_the_network_makes_of_a_set_is_known_before_the_features(score, images, capsys):
    score(images[0], images[1], cache_dir="cache")
    with np.load(next(Path("cache").iterdir())) as file:
        widths = file["pool_mean"].size, file["spatial_mean"].size
    names = ("mu", "sigma"), ("mu_s", "sigma_s")
    given = {}
    for (mean, covariance), width in zip(names, (widths[0], widths[1] + 1), strict=True):
        given |= {mean: np.zeros(width), covariance: np.eye(width)}
    np.savez("ref.npz", arr_0=images[0], **given)
    words = f"ref.npz has statistics of {widths[1] + 1}-dimensional features, the graph gives"
    metrics = ("fid", "sfid")  # for which it would need no image of the reference
    refused_early(score, capsys, words, "ref.npz", images[1], metrics=metrics)
    for name, first in ("one", 1), ("other", 6):
        np.savez(f"{name}.npz", arr_0=images[0][:6], arr_1=np.arange(first, first + 6))
    words = "--metrics fid_per_class: other.npz: no class has 2 images among"
    refused_early(score, capsys, words, "one.npz", "other.npz", metrics="fid_per_class")
    assert "fid_per_class" not in score("one.npz", "other.npz", metrics=("all",))[0]


def test_a_worker_s_error_names_the_reference(score, images):
    Path("set").mkdir()
    for index, image in enumerate(images[0]):
        Image.fromarray(image).save(f"set/{index}.png")
    data = bytearray(Path("set/20.png").read_bytes())
    data[60:70] = bytes(10)
    Path("set/20.png").write_bytes(data)
    source = open_set("set", flag="REF")
    engine = {"path": "small.pb", "backend": "torch", "precision": "float32", "resize": "published"}
    options = {
        "name": "set",
        "batch_size": 8,
        "keep_spatial": False,
        "stamp": stamp_of(source.source),
    }
    with pytest.raises(UserError, match=r"^REF: cannot read the image set/20\.png"):
        extract_on_devices(source, ["cpu"], engine, dimensions=24, store=None, **options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": "64"}, "^batch_size '64': its type must be int$"),
        ({"metrics": 5}, "^metrics 5: it must be a name, or several"),
        ({"cache_dir": 3}, "^cache_dir 3: its type must be str . None$"),
        ({"allow_mixed_precision": "no"}, "^allow_mixed_precision 'no': its type must be bool$"),
        ({"metrics": np.array("fid")}, "^metrics array.*: it must be a name, or several"),
        ({"metrics": [np.array([1, 2])]}, r"^metrics \[1 2\]: choose from"),
        ({"batch_size": True}, "^batch_size True: its type must be int$"),
        ({"cache_dir": "a\0b"}, "^cache_dir 'a.x00b': it has a character that no name has$"),
        ({"launch": None}, "^unknown setting launch; valid are"),
        ({"tell": print}, "^unknown setting tell; valid are"),
        ({"device": "meta"}, "^device meta: not available here"),
    ],
)
def test_keywords_of_another_kind_are_one_line(score, images, settings, words):
    options = {"inception_path": Path("small.pb"), "backend": "torch", "metrics": ["fid"]}
    assert evaluate(*images, **options, batch_size=np.int64(8)).settings.batch_size == 8
    for several in ({"fid"}, iter(["fid"]), np.array(["fid"])):
        assert Settings(metrics=several).metrics == ("fid",)
    with pytest.raises(UserError, match=words):
        evaluate(*images, **{**options, **settings})


def test_library_errors_leave_paths_as_they_are(score, images):
    with pytest.raises(UserError, match=r"^samples: there is no file runs/--n/SAMPLE/REF\.npz$"):
        evaluate(images[0], "runs/--n/SAMPLE/REF.npz", inception_path="small.pb")


def test_weights_that_cannot_be_found_are_one_line(tmp_path):
    loop = [node("w", "Identity", ["v"]), node("v", "Identity", ["w"])]
    both = [node("mixed_6/conv", "Relu", ["ExpandDims"]), node("pool_3", "Relu", ["ExpandDims"])]
    for weights in (loop, [node("w", "Const")]):
        path = tmp_path / "bad.pb"
        path.write_bytes(graph(HEAD[0], HEAD[2], *both, *weights))
        with pytest.raises(UserError, match="has no weights"):
            load_graph(str(path))
    os.mkfifo(tmp_path / "pipe.pb")
    with pytest.raises(UserError, match=r"--inception_path: .*it is a pipe"):
        load_graph(str(tmp_path / "pipe.pb"))


def test_references_are_made_of_sound_files_only(score, images, capsys):
    make = functools.partial(make_reference, inception_path="small.pb", backend="torch")
    np.savez("labels.npz", arr_0=images[0], arr_1=np.arange(30) + 300)
    content = bytearray(Path("labels.npz").read_bytes())
    content[content.index(np.int64(329).tobytes())] ^= 1
    Path("labels.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"IMAGES: arr_1 in labels\.npz is not .*CRC-32"):
        make("labels.npz", "out.npz", keep=1)
    Path("set").mkdir()
    for index, image in enumerate(images[0]):
        Image.fromarray(image[: 8 if index == 29 else None]).save(f"set/{index:02}.png")
    with pytest.raises(UserError, match=r"IMAGES: set/29\.png is "):
        make("set", "out.npz")
    with pytest.raises(UserError, match="--seed -1: it must be at least 0"):
        make("set", "out.npz", seed=-1)
    assert "features of set" not in capsys.readouterr().err
    assert not Path("out.npz").exists()


def test_arrays_that_cannot_be_written_are_scored_without_a_remark(score, images, recwarn):
    sets = [image_set.copy() for image_set in images]
    for image_set in sets:
        image_set.flags.writeable = False
    assert score(*sets, metrics=("fid", "precision"))[0].keys() == {"fid", "precision"}
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]
