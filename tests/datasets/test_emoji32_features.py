"""The feature network: augmentation, and the frozen graph against the network it came from."""

import numpy as np
import pytest
import torch

from datasets.emoji32_features import FeatureNet, augment, freeze, main, run_frozen
from esddpm_io.errors import UserError

CLASSES = 4


@pytest.fixture(scope="module")
def net() -> FeatureNet:
    """Untrained, but with batch norms that do something."""
    torch.manual_seed(0)
    net = FeatureNet(CLASSES)
    for norm in net.norms:
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 2.0)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_(0.0, 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def graph(net) -> bytes:
    pytest.importorskip("tensorflow")
    return freeze(net)


def structured_images(n: int, size: int) -> np.ndarray:
    """Smooth colour gradients, uint8 [n, size, size, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    slopes = rng.normal(0, 1, (n, 1, 1, 3, 2))
    waves = np.sin(4 * (slopes[..., 0] * y[..., None] + slopes[..., 1] * x[..., None]))
    return np.rint(127.5 + 127.5 * waves).astype(np.uint8)


def test_frozen_graph_gives_the_networks_values(net, graph):
    images = structured_images(5, 32)
    nodes = ["pool_3", "mixed_6/conv", "softmax/logits/MatMul", "softmax/logits", "softmax"]
    pool, spatial, product, logits, softmax = run_frozen(graph, images, nodes)
    with torch.no_grad():
        features, expected = net(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    assert pool.shape == (5, 1, 1, 128) and spatial.shape == (5, 8, 8, 128)
    assert (spatial >= 0).all() and (spatial > 0).any()
    np.testing.assert_allclose(pool.reshape(5, -1), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits, product)
    np.testing.assert_allclose(softmax, expected.softmax(1), rtol=1e-4)


def test_frozen_graph_takes_any_size(graph):
    large = np.repeat(np.repeat(structured_images(2, 32), 2, axis=1), 2, axis=2)
    (pool,) = run_frozen(graph, large, ["pool_3"])
    (expected,) = run_frozen(graph, large[:, ::2, ::2], ["pool_3"])
    np.testing.assert_allclose(pool, expected, rtol=1e-5, atol=1e-6)


def test_frozen_graph_holds_the_softmax_weights_where_evaluators_look(net, graph):
    import tensorflow as tf

    nodes = {node.name: node for node in tf.compat.v1.GraphDef.FromString(graph).node}
    assert list(nodes["softmax/logits/MatMul"].input) == ["pool_3/_reshape", "softmax/weights"]
    weights = tf.make_ndarray(nodes["softmax/weights"].attr["value"].tensor)
    np.testing.assert_array_equal(weights, net.classify.weight.detach().numpy().T)
    assert tf.make_ndarray(nodes["softmax/biases"].attr["value"].tensor).shape == (CLASSES,)


def test_augmentation_moves_mirrors_and_recolours_but_keeps_white():
    pixels = torch.full((512, 3, 32, 32), 255.0)
    assert torch.equal(augment(pixels, torch.Generator().manual_seed(0)), pixels)
    pixels[:, :, 10, 4] = 0.0
    out = augment(pixels, torch.Generator().manual_seed(0))
    inked = (out < 255).any(dim=1)
    assert (inked.sum(dim=(1, 2)) == 1).all()  # moved, not smeared
    rows, columns = inked.nonzero()[:, 1], inked.nonzero()[:, 2]
    assert rows.unique().tolist() == list(range(7, 14))
    assert columns.unique().tolist() == [*range(1, 8), *range(24, 31)]
    assert out.amin(dim=(1, 2, 3)).unique().numel() > 1
    assert out.min() >= 0


def test_wrong_data_is_named_before_training(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, arr_0=np.zeros((4, 64, 64, 3), np.uint8), arr_1=np.zeros(4, np.int64))
    with pytest.raises(UserError, match=r"--data: .*uint8 \[N, 32, 32, 3\]"):
        main(["--data", str(path), "--out", str(tmp_path / "out.pb")])
    with pytest.raises(UserError, match=r"--data.*nothing.npz"):
        main(["--data", str(tmp_path / "nothing.npz")])
    assert not (tmp_path / "out.pb").exists()


def test_a_short_training_writes_a_graph(tmp_path):
    pytest.importorskip("tensorflow")
    images = structured_images(20, 32)
    np.savez(tmp_path / "it.npz", arr_0=images, arr_1=np.arange(20) % CLASSES)
    out = tmp_path / "out.pb"
    main(["--data", str(tmp_path / "it.npz"), "--out", str(out), "--epochs", "1"])
    (pool,) = run_frozen(out.read_bytes(), images, ["pool_3"])
    assert pool.shape == (20, 1, 1, 128) and np.isfinite(pool).all()
