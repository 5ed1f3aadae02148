"""Both engines: the same features of any graph, and the published ones of the stand-in."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from esddpm_io.errors import UserError
from esddpm_io.images import ImageSource
from evaluations.backend_torch import TorchEngine, interpolation_weights
from evaluations.features import choose_engine, extract, features_of_batch, load_graph
from evaluations.inputs import ArrayImages
from tests.evaluations.graph_writer import (
    GOLDEN,
    constant,
    graph,
    node,
    normal,
    small_graph,
    write_standin,
)


def structured_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour ramps, uint8 [N, H, W, 3]; white noise would give degenerate features."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    slopes = rng.uniform(-300, 300, (count, 2, 1, 1, 3))
    ramps = slopes[:, 0] * y[..., None] + slopes[:, 1] * x[..., None]
    return np.clip(128 + ramps + 20 * rng.standard_normal(ramps.shape), 0, 255).astype(np.uint8)


def features_of(data: bytes, tmp_path, backend: str, images: np.ndarray, **options):
    path = tmp_path / "graph.pb"
    path.write_bytes(data)
    return features_of_batch(choose_engine(load_graph(str(path)), backend, **options), images)


def assert_same(got, expected, tolerance: float = 1e-5):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= tolerance * np.ptp(theirs)


@pytest.mark.parametrize("size, height, width", [(16, 16, 16), (16, 9, 21), (15, 32, 32)])
def test_engines_agree_on_a_small_graph(tmp_path, size, height, width):
    pytest.importorskip("tensorflow")
    images = structured_images(5, height, width)
    data = small_graph(size)
    got = features_of(data, tmp_path, "torch", images)
    assert got[0].shape == (5, 24)
    assert got[1].shape == (5, size * size * 7)
    assert_same(got, features_of(data, tmp_path, "tensorflow", images))


def head(*nodes: bytes, width: int) -> bytes:
    """`nodes`, which end in `pool_3` of `width` channels, between the images and the softmax."""
    return graph(
        node("ExpandDims", "Placeholder", dtype=1),
        *nodes,
        constant("softmax/weights", np.ones((width, 2), np.float32)),
        node(
            "softmax/logits/MatMul",
            "MatMul",
            ["pool_3", "softmax/weights"],
            T=1,
            transpose_a=False,
            transpose_b=False,
        ),
    )


def test_engines_agree_on_every_kind_of_node(tmp_path):
    """Strides, dilation, uneven padding, three kinds of normalisation, elementwise operations."""
    pytest.importorskip("tensorflow")

    def weights(name: str, *shape: int) -> bytes:
        return constant(name, (0.4 * normal(name, shape)).astype(np.float32))

    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    window = {"ksize": [1, 3, 2, 1], "strides": [1, 2, 3, 1], "T": 1}
    data = head(
        constant("scale", np.array(1 / 64, np.float32)),
        node("scaled", "Mul", ["scale", "ExpandDims"], T=1),
        weights("k1", 3, 2, 3, 6),
        node("conv1", "Conv2D", ["scaled", "k1"], T=1, strides=[1, 2, 1, 1], padding=b"SAME"),
        weights("bias", 6),
        node("mixed_6/conv", "BiasAdd", ["conv1", "bias"], T=1),  # an output may be folded
        node("bent", "Elu", ["mixed_6/conv"], T=1),
        constant("pad", np.array([[0, 0], [1, 2], [0, 3], [0, 0]], np.int32)),
        node("padded", "Pad", ["bent", "pad"], T=1, Tpaddings=3),
        weights("k2", 3, 3, 6, 6),
        node(
            "conv2",
            "Conv2D",
            ["padded", "k2"],
            T=1,
            strides=[1] * 4,
            dilations=[1, 2, 2, 1],
            padding=b"SAME",
        ),
        constant("gamma", ones * 1.5),
        constant("beta", ones * 0.2),
        constant("mean", ones * 0.1),
        constant("variance", ones * 2),
        node(
            "fused",
            "FusedBatchNormV3",
            ["conv2", "gamma", "beta", "mean", "variance"],
            T=1,
            U=1,
            epsilon=0.01,
            is_training=False,
        ),
        node("clipped", "Relu6", ["fused"], T=1),
        # conv3 is used twice, so nothing may be folded into it
        weights("k3", 1, 1, 6, 6),
        node("conv3", "Conv2D", ["clipped", "k3"], T=1, strides=[1] * 4, padding=b"VALID"),
        constant("zeros", zeros),
        node(
            "normal",
            "BatchNormWithGlobalNormalization",
            ["conv3", "mean", "variance", "beta", "gamma"],
            T=1,
            variance_epsilon=0.001,
            scale_after_normalization=False,
        ),
        node("sum", "AddV2", ["conv3", "normal"], T=1),
        node("max", "MaxPool", ["sum"], padding=b"SAME", **window),
        node("average", "AvgPool", ["sum"], padding=b"SAME", **window),
        constant("axis", np.array(-1, np.int32)),
        node("both", "ConcatV2", ["max", "average", "axis"], T=1, N=2, Tidx=3),
        constant("axes", np.array([1, 2], np.int32)),
        node("pool_3", "Mean", ["both", "axes"], T=1, Tidx=3, keep_dims=False),
        width=12,
    )
    images = structured_images(3, 17, 22)
    got = features_of(data, tmp_path, "torch", images)
    assert_same(got, features_of(data, tmp_path, "tensorflow", images))


@pytest.mark.parametrize("length", [1, 2, 7, 32, 64, 256, 299, 300, 501])
@pytest.mark.parametrize("aligned, centred", [(False, False), (True, False), (False, True)])
def test_resize_is_tensorflows_bit_for_bit(length, aligned, centred):
    tf = pytest.importorskip("tensorflow")
    out = 299 if length != 299 else 64
    images = structured_images(1, length, 5).astype(np.float32)
    expected = tf.raw_ops.ResizeBilinear(
        images=images, size=[out, 5], align_corners=aligned, half_pixel_centers=centred
    ).numpy()
    low, high, share = interpolation_weights(length, out, aligned, centred)
    first, second = images[:, low], images[:, high]
    np.testing.assert_array_equal(first + (second - first) * share[:, None, None], expected)


def test_unknown_operation_is_named(tmp_path):
    data = head(
        node("mixed_6/conv", "Cholesky", ["ExpandDims"], T=1),
        node("pool_3", "Relu", ["mixed_6/conv"], T=1),
        width=3,
    )
    with pytest.raises(UserError, match=r"Cholesky \(node mixed_6/conv\).*--backend tensorflow"):
        features_of(data, tmp_path, "torch", structured_images(1, 8, 8))


def test_graph_without_the_published_nodes_is_refused(tmp_path):
    (tmp_path / "graph.pb").write_bytes(graph(node("ExpandDims", "Placeholder", dtype=1)))
    with pytest.raises(UserError, match="no node pool_3, mixed_6/conv, softmax/logits/MatMul"):
        load_graph(str(tmp_path / "graph.pb"))


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_images_that_the_graph_does_not_take_are_refused(tmp_path, backend):
    if backend == "tensorflow":
        pytest.importorskip("tensorflow")
    kernel = constant("k", np.ones((9, 9, 3, 4), np.float32))
    data = head(
        kernel,
        node("mixed_6/conv", "Conv2D", ["ExpandDims", "k"], T=1, strides=[1] * 4, padding=b"VALID"),
        constant("axes", np.array([1, 2], np.int32)),
        node("pool_3", "Mean", ["mixed_6/conv", "axes"], T=1, Tidx=3, keep_dims=False),
        width=4,
    )
    with pytest.raises(UserError, match=r"the graph failed on \(1, 5, 5, 3\)"):
        features_of(data, tmp_path, backend, structured_images(1, 5, 5))


def test_half_precision_is_close_and_says_what_it_is(tmp_path):
    data, images = small_graph(), structured_images(6, 16, 16)
    full = features_of(data, tmp_path, "torch", images)
    with contextlib.nullcontext() if bfloat16_here() else pytest.warns(UserWarning):
        half = features_of(data, tmp_path, "torch", images, precision="bfloat16")
    assert 0 < np.abs(half[0] - full[0]).max() < 0.02 * np.ptp(full[0])
    with pytest.raises(UserError, match="float16 needs a GPU"):
        features_of(data, tmp_path, "torch", images, precision="float16", device="cpu")
    with pytest.raises(UserError, match="needs --backend torch"):
        features_of(data, tmp_path, "tensorflow", images, precision="bfloat16")
    with pytest.raises(UserError, match="--device nonesuch"):
        features_of(data, tmp_path, "torch", images, device="nonesuch")


def bfloat16_here() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Streamed(ImageSource):
    """Images that notice how many of them are read at once."""

    has_labels = False

    def __init__(self, images: np.ndarray):
        self.images, self.shape, self.most = images, images.shape, 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.most = max(self.most, stop - start)
        return self.images[start:stop]


def test_features_stream_and_do_not_depend_on_the_batch(tmp_path):
    (tmp_path / "graph.pb").write_bytes(small_graph(4))
    engine = TorchEngine(load_graph(str(tmp_path / "graph.pb")))
    source = Streamed(structured_images(40, 8, 8))
    small = extract(engine, source, name="x", batch_size=7, keep_spatial=True)
    assert source.most == 7
    whole = extract(engine, source, name="x", batch_size=64)
    np.testing.assert_allclose(small.pool, whole.pool, rtol=1e-5, atol=1e-6)
    assert whole.spatial is None
    assert small.spatial.shape == (40, 4 * 4 * 7)
    np.testing.assert_allclose(
        np.cov(small.pool, rowvar=False), whole.pool_gaussian.full_covariance(), atol=1e-6
    )
    np.testing.assert_allclose(
        small.spatial.mean(axis=0), whole.spatial_gaussian.mean, rtol=1e-5, atol=1e-6
    )


def test_features_that_are_not_finite_name_the_image(tmp_path):
    data = head(
        constant("zero", np.zeros((), np.float32)),
        node("mixed_6/conv", "RealDiv", ["ExpandDims", "zero"], T=1),
        constant("axes", np.array([1, 2], np.int32)),
        node("pool_3", "Mean", ["ExpandDims", "axes"], T=1, Tidx=3, keep_dims=False),
        width=3,
    )
    (tmp_path / "graph.pb").write_bytes(data)
    engine = TorchEngine(load_graph(str(tmp_path / "graph.pb")))
    source = ArrayImages(structured_images(3, 8, 8), flag="SAMPLE")
    with pytest.raises(UserError, match="image 0 of x are not finite"):
        extract(engine, source, name="x")


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    path = tmp_path_factory.mktemp("standin") / "classify_image_graph_def.pb"
    write_standin(path)
    yield path
    path.unlink()


def test_standin_features_are_the_published_ones(standin):
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        images = np.concatenate([file["reference"][:3], file["samples"][:3]])
    with np.load(GOLDEN / "evaluator_features.npz") as file:
        pool = np.concatenate([file["reference_pool"][:3], file["sample_pool"][:3]])
        spatial = np.concatenate([file["reference_spatial"][:3], file["sample_spatial"][:3]])
    graph_read = load_graph(str(standin))
    assert graph_read.has_inception_nodes
    assert_same(
        features_of_batch(choose_engine(graph_read, "torch"), images), (pool, spatial), 1e-4
    )


def test_standin_metrics_through_the_command_line(standin, tmp_path):
    """440 images through the full-size network: the one slow test, about a minute on 2 cores."""
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        for name in ("reference", "samples"):
            np.savez(tmp_path / f"{name}.npz", arr_0=file[name])
    run = subprocess.run(
        f"{sys.executable} -m evaluations.evaluator reference.npz samples.npz --backend torch "
        f"--json out.json --inception_path {standin}".split(),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(GOLDEN.parent.parent)} | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = json.loads((GOLDEN / "evaluator_metrics.json").read_text())
    names = ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    labels = [f"{name} (unverified graph)" for name in names]
    printed = dict(line.split(": ") for line in run.stdout.splitlines())
    assert list(printed) == labels
    saved = json.loads((tmp_path / "out.json").read_text())["results"][0]["metrics"]
    for label, (name, value) in zip(labels, expected.items(), strict=True):
        assert float(printed[label]) == pytest.approx(saved[name], rel=1e-5)
        slack = {"abs": 2 / 200} if name in ("precision", "recall") else {"rel": 1e-4}
        assert saved[name] == pytest.approx(value, **slack)
