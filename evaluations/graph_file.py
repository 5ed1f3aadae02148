"""Reading a frozen TensorFlow graph (.pb) without TensorFlow.

A .pb file is one serialised GraphDef message. Its wire format is small: a message is a row of
fields, each a varint key (field number << 3 | wire type) and a value. The numbers below are those
of tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape}.proto, which the format
promises never to change.
"""

import dataclasses
import hashlib
import math
import os
import struct
from collections.abc import Iterator

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import open_binary
from evaluations.resizing import PUBLISHED_RESIZE

# The nodes that the metrics are defined on
IMAGES_NODE = "ExpandDims"  # fed with float NHWC pixels 0-255
POOL_NODE = "pool_3"
SPATIAL_NODE = "mixed_6/conv"
LOGITS_NODE = "softmax/logits/MatMul"  # its second input holds the classifier's weights

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

# DataType numbers of tensorflow/core/framework/types.proto that hold plain numbers
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    19: np.dtype("<f2"),
}
_DT_STRING = 7
_LONGEST_SIDE = 1 << 14  # of images in a network
_MOST_VALUES = 1 << 27  # of a tensor that is told by one value; the largest real one has 2 million

# What reading a file that is no graph, or half a one, runs into
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error)


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation: its `inputs` name other nodes (`name`, `name:1`, or `^name` for control).

    `attributes` holds ints, floats, bools, bytes, lists of ints, and NumPy arrays for tensors; a
    type attribute is a NumPy dtype, or None for a type that is not a plain number.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A frozen graph: `nodes` by name in file order, `path` and the SHA-256 of the file."""

    path: str
    digest: str
    nodes: dict[str, Node]

    @property
    def softmax_weights(self) -> np.ndarray:
        """The classifier's weights, float32 [pool features, classes]; no bias goes with them."""
        return self.constant(self.nodes[LOGITS_NODE].inputs[1])

    outputs = frozenset({"spatial", "classifier"})  # what metrics may need beside pool features

    @property
    def dimensions(self) -> int:
        """Of the pool features."""
        return len(self.softmax_weights)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the graph resizes images to; `UserError` if it does not."""
        resizes = [node for node in self.nodes.values() if node.op == "ResizeBilinear"]
        if len(resizes) != 1:
            raise UserError(
                f"--resize: {self.path} does not say the size that it works at (it has "
                f"{len(resizes)} ResizeBilinear nodes): leave it published"
            )
        return self.resize_size(resizes[0])

    def resize_size(self, node: Node) -> tuple[int, int]:
        """Height and width that a ResizeBilinear node resizes to; `UserError` if there is none."""
        size = self.constant(node.inputs[1]) if len(node.inputs) > 1 else np.empty(0)
        if size.shape != (2,) or not (size.min() > 0 and size.max() <= _LONGEST_SIDE):
            raise UserError(
                f"{self.path}: {node.name} resizes to {size.tolist()}: [height, width] expected, "
                f"of 1 to {_LONGEST_SIDE}"
            )
        return int(size[0]), int(size[1])

    def check(self, backend: str, precision: str, resize: str) -> None:
        """`UserError` for settings that this graph cannot meet."""
        if resize != PUBLISHED_RESIZE:
            _ = self.input_size

    @property
    def has_inception_nodes(self) -> bool:
        """Whether this is the 2015 Inception network by its nodes, whatever its weights."""
        return "mixed_10/join" in self.nodes and self.softmax_weights.shape == (2048, 1008)

    def constant(self, name: str) -> np.ndarray:
        """The value of the Const node `name`, through any Identity before it.

        `UserError` if there is no such node, or no value in it.
        """
        seen: set[str] = set()
        node = self.node(name)
        while node.op == "Identity":
            if node.name in seen:
                raise UserError(f"{self.path}: {node.name} depends on itself")
            seen.add(node.name)
            if not node.inputs:
                raise UserError(f"{self.path}: the Identity node {node.name} has no input")
            node = self.node(node.inputs[0])
        if node.op != "Const":
            raise UserError(f"{self.path}: {name} is a {node.op}, a Const was expected")
        value = node.attributes.get("value")
        if not isinstance(value, np.ndarray):
            raise UserError(f"{self.path}: the Const {node.name} has no numbers")
        return value

    def node(self, reference: str) -> Node:
        """The node that an input names, as `name` or `name:0`; `UserError` if there is none."""
        name, _, output = reference.partition(":")
        if output not in ("", "0"):
            raise UserError(f"{self.path}: output {output} of {name} is not supported")
        if name not in self.nodes:
            raise UserError(f"{self.path}: there is no node {name}")
        return self.nodes[name]


def read_graph(path: str | os.PathLike) -> Graph:
    """Read the frozen graph at `path`; `UserError` if it is missing or broken."""
    flag = "--inception_path"
    try:
        with open_binary(path, flag=flag) as stream:
            data = stream.read()
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror}") from error
    try:
        nodes = [_node(value) for number, value in _fields(data) if number == 1]
    except _BROKEN as error:
        raise UserError(f"{flag}: {path} is not a complete frozen graph ({error})") from error
    if not nodes:
        raise UserError(f"{flag}: {path} is not a frozen graph (it has no nodes)")
    digest = hashlib.sha256(data).hexdigest()
    return Graph(str(path), digest, {node.name: node for node in nodes})


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The integer that starts at `position`, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of one message; nested messages and fixed numbers stay bytes."""
    data = memoryview(data)
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > len(data):
            raise ValueError("it ends early")
        yield number, data[position : position + length]
        position += length


def _signed(value: int) -> int:
    """A varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def _text(value: int | memoryview) -> str:
    return bytes(value).decode()


def _node(data: memoryview) -> Node:
    name, op, inputs, attributes = "", "", [], {}
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            op = _text(value)
        elif number == 3:
            inputs.append(_text(value))
        elif number == 5:  # map<string, AttrValue>: an entry is a message of key and value
            entry = dict(_fields(value))
            attributes[_text(entry[1])] = _attribute(entry[2])
    return Node(name, op, tuple(inputs), attributes)


def _attribute(data: memoryview) -> object:
    """The one field that an AttrValue sets."""
    for number, value in _fields(data):
        if number in _ATTRIBUTE_KINDS:
            return _ATTRIBUTE_KINDS[number](value)
    return None


def _integers(data: memoryview) -> list[int]:
    """The ints of an AttrValue.ListValue, packed or one by one; other lists come out empty."""
    return [i for number, value in _fields(data) if number == 3 for i in _repeated_int(value)]


def _repeated_int(value: int | memoryview) -> list[int]:
    if isinstance(value, int):
        return [_signed(value)]
    out, position = [], 0
    while position < len(value):
        one, position = _varint(value, position)
        out.append(_signed(one))
    return out


def _shape(data: memoryview) -> tuple[int, ...]:
    dims = [dict(_fields(value)) for number, value in _fields(data) if number == 2]
    return tuple(_signed(dim.get(1, 0)) for dim in dims)


# TensorProto fields that carry values one by one, and how their bytes read (None: varints)
_VALUE_FIELDS = {5: "<f4", 6: "<f8", 7: None, 10: None, 11: None, 13: None}


def _tensor(data: memoryview) -> np.ndarray | bytes | None:
    """The array of a TensorProto; the bytes of a string tensor; None for other types."""
    dtype_number, shape, content, values = 0, (), None, []
    for number, value in _fields(data):
        if number == 1:
            dtype_number = value
        elif number == 2:
            shape = _shape(value)
        elif number == 4:
            content = value
        elif number == 8:
            content = bytes(value)
        elif number in _VALUE_FIELDS:
            kind = _VALUE_FIELDS[number]
            values += _repeated_int(value) if kind is None else np.frombuffer(value, kind).tolist()
    if dtype_number == _DT_STRING:
        return content
    dtype = _DTYPES.get(dtype_number)
    if dtype is None:
        return None
    if content is not None:
        return np.frombuffer(content, dtype).reshape(shape)
    if dtype_number == 19:  # half precision comes as the bits of each number
        values = np.array(values, np.uint16).view(np.float16)
    return _spread(np.array(values, dtype), shape)


def _spread(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values fill the shape in order; the last one is repeated to its end, none means zeros."""
    size = math.prod(shape)
    if not 0 <= size <= _MOST_VALUES or min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {list(shape)}")
    full = np.zeros(size, values.dtype)
    full[: len(values)] = values
    if len(values):
        full[len(values) :] = values[-1]
    return full.reshape(shape)


# AttrValue: 1 list, 2 bytes, 3 int, 4 float, 5 bool, 6 type, 7 shape, 8 tensor
_ATTRIBUTE_KINDS = {
    1: _integers,
    2: bytes,
    3: _signed,
    4: lambda value: struct.unpack("<f", value)[0],
    5: bool,
    6: _DTYPES.get,
    7: _shape,
    8: _tensor,
}
