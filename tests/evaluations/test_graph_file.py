"""Reading frozen graphs without TensorFlow, held against TensorFlow's own reading."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esddpm_io.errors import UserError
from evaluations.graph_file import read_graph
from tests.evaluations.graph_writer import constant, field, graph, node, small_graph, varint


def read(tmp_path, data: bytes):
    path = tmp_path / "graph.pb"
    path.write_bytes(data)
    return read_graph(path)


def test_reads_what_tensorflow_reads(tmp_path):
    tf = pytest.importorskip("tensorflow").compat.v1
    data = small_graph()
    ours = read(tmp_path, data)
    theirs = tf.GraphDef.FromString(data)
    assert list(ours.nodes) == [n.name for n in theirs.node]
    for expected in theirs.node:
        got = ours.nodes[expected.name]
        assert (got.op, got.inputs) == (expected.op, tuple(expected.input))
        assert set(got.attributes) == set(expected.attr)
        for name, attribute in expected.attr.items():
            kind = attribute.WhichOneof("value")
            value = got.attributes[name]
            if kind == "tensor":
                np.testing.assert_array_equal(value, tf.make_ndarray(attribute.tensor))
            elif kind == "list":
                assert value == list(attribute.list.i)
            elif kind == "type":
                assert value == tf.as_dtype(attribute.type).as_numpy_dtype
            else:
                assert value == getattr(attribute, kind)


@pytest.mark.parametrize(
    "value",
    [
        np.full((2, 3), 1.5, np.float32),  # one value stands for all
        np.zeros((4,), np.float32),  # none stands for zeros
        np.array([1, -2, 3], np.int32),
        np.array([[2.5, -1.0]], np.float16),
        np.array([True, False, True]),
        np.array(-(2**40), np.int64),
        np.arange(40, dtype=np.float64),
    ],
)
def test_tensors_as_tensorflow_writes_them(tmp_path, value):
    tf = pytest.importorskip("tensorflow").compat.v1
    with tf.Graph().as_default() as built:
        tf.constant(value, name="value")
    definition = built.as_graph_def()
    got = read(tmp_path, definition.SerializeToString()).constant("value")
    np.testing.assert_array_equal(got, value)
    assert got.dtype == value.dtype
    # The same numbers in the fields made for one by one, which older writers use.
    proto = definition.node[0].attr["value"].tensor
    proto.CopyFrom(tf.make_tensor_proto(value.ravel().tolist(), value.dtype, value.shape))
    got = read(tmp_path, definition.SerializeToString()).constant("value:0")
    np.testing.assert_array_equal(got, value)


def test_constants_are_found_through_identities(tmp_path):
    data = graph(
        constant("weights", np.arange(3, dtype=np.float32)),
        node("weights/read", "Identity", ["weights"], T=1),
        node("x", "Relu", ["weights"], T=1),
    )
    got = read(tmp_path, data)
    np.testing.assert_array_equal(got.constant("weights/read"), [0, 1, 2])
    with pytest.raises(UserError, match="x is a Relu"):
        got.constant("x")


def test_missing_empty_and_truncated_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--inception_path: there is no file .*none\.pb"):
        read_graph(tmp_path / "none.pb")
    with pytest.raises(UserError, match="not a frozen graph"):
        read(tmp_path, b"")
    data = small_graph()
    for end in (1, len(data) // 2, len(data) - 3):
        with pytest.raises(UserError, match=r"graph\.pb is not a complete frozen graph"):
            read(tmp_path, data[:end])
    with pytest.raises(UserError, match="wire type"):
        read(tmp_path, varint(1 << 3 | 7) + b"\0")
    with pytest.raises(UserError, match="64 bits"):
        read(tmp_path, field(1, b"\xff" * 12))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.integers(0, 3000).map(lambda i: i))
def test_no_bytes_give_a_traceback(tmp_path_factory, noise):
    """Random files, and the small graph with one byte changed, read or are refused in a line."""
    if isinstance(noise, int):
        data = bytearray(small_graph())
        data[noise % len(data)] ^= 0x15
        noise = bytes(data)
    path = tmp_path_factory.getbasetemp() / "noise.pb"
    path.write_bytes(noise)
    try:
        read_graph(path)
    except UserError as error:
        assert "noise.pb" in str(error)
