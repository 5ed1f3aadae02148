"""Writes frozen graphs without TensorFlow: small ones for tests, and the stand-in for Inception.

    python tests/evaluations/graph_writer.py OUT.pb

writes the stand-in: the nodes of the 2015 Inception graph (`tests/golden/inception_2015_nodes`)
with weights drawn by name. It is as large as the real graph (96 MB) and takes as long to run.
"""

import gzip
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
PRODUCER = 8  # of the graph: BatchNormWithGlobalNormalization was removed from 9 on
_DTYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.float64): 2,
    np.dtype(np.int32): 3,
    np.dtype(np.uint8): 4,
    np.dtype(np.int64): 9,
}
_TYPE_NAMES = {"DT_FLOAT": 1, "DT_INT32": 3, "DT_UINT8": 4, "DT_STRING": 7}
_TYPE_ATTRIBUTES = ("T", "dtype", "SrcT", "DstT", "Tidx", "Tshape", "Tdim", "Tpaddings", "U")


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(value: np.ndarray | bytes) -> bytes:
    """TensorProto of an array, or of a string scalar."""
    if isinstance(value, bytes):
        return field(1, 7) + field(2, b"") + field(8, value)
    shape = b"".join(field(2, field(1, length)) for length in value.shape)
    return field(1, _DTYPES[value.dtype]) + field(2, shape) + field(4, value.tobytes())


def attribute(name: str, value: object) -> bytes:
    """AttrValue of a Python value; a type attribute is a DataType number."""
    if name in _TYPE_ATTRIBUTES:
        data = field(6, value)
    elif isinstance(value, np.ndarray) or name == "value":
        data = field(8, tensor(value))
    elif isinstance(value, bool):
        data = field(5, int(value))
    elif isinstance(value, int):
        data = field(3, value)
    elif isinstance(value, float):
        data = varint(4 << 3 | 5) + struct.pack("<f", value)
    elif isinstance(value, list):
        data = field(1, field(3, b"".join(map(varint, value))))
    else:
        data = field(2, value)
    return field(5, field(1, name) + field(2, data))


def node(name: str, op: str, inputs: list[str] = (), **attributes) -> bytes:
    """One field of a GraphDef."""
    data = field(1, name) + field(2, op) + b"".join(field(3, source) for source in inputs)
    return field(1, data + b"".join(attribute(k, v) for k, v in sorted(attributes.items())))


def constant(name: str, value: np.ndarray | bytes) -> bytes:
    kind = 7 if isinstance(value, bytes) else _DTYPES[value.dtype]
    return node(name, "Const", dtype=kind, value=value)


def graph(*nodes: bytes) -> bytes:
    """A whole GraphDef."""
    return b"".join(nodes) + field(4, field(1, PRODUCER))


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that the name decides, float64."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def small_graph(size: int = 16, width: int = 12, classes: int = 5, **extra: bytes) -> bytes:
    """A graph with the published names that runs in a moment.

    Resizes to `size`, one convolution with batch norm and ReLU (mixed_6/conv), a maximum pool, an
    average pool with uneven padding, a branch and a concatenation; pool_3 has 2 * width numbers.
    """
    kernel = (normal("mixed_6/params", (3, 3, 3, width)) * 0.3).astype(np.float32)
    norm = "mixed_6/conv/batchnorm"
    statistics = {
        f"{norm}/mean": normal(f"{norm}/mean", (width,)) * 0.1,
        f"{norm}/variance": 0.5 + normal(f"{norm}/variance", (width,)) ** 2,
        f"{norm}/beta": normal(f"{norm}/beta", (width,)) * 0.3,
        f"{norm}/gamma": 1 + 0.2 * normal(f"{norm}/gamma", (width,)),
    }
    half = -(-size // 2)
    pool = {"ksize": [1, 2, 2, 1], "strides": [1, 2, 2, 1], "padding": b"SAME", "T": 1}
    return graph(
        node("ExpandDims", "Placeholder", dtype=1),
        constant("size", np.array([size, size], np.int32)),
        node("resize", "ResizeBilinear", ["ExpandDims", "size"], T=1, align_corners=False),
        constant("offset", np.array(128, np.float32)),
        node("Sub", "Sub", ["resize", "offset"], T=1),
        constant("factor", np.array(1 / 128, np.float32)),
        node("Mul", "Mul", ["Sub", "factor"], T=1),
        constant("params", kernel),
        node("mixed_6/Conv2D", "Conv2D", ["Mul", "params"], T=1, strides=[1] * 4, padding=b"SAME"),
        *(constant(name, value.astype(np.float32)) for name, value in statistics.items()),
        node(
            norm,
            "BatchNormWithGlobalNormalization",
            ["mixed_6/Conv2D", *statistics],
            T=1,
            variance_epsilon=0.001,
            scale_after_normalization=True,
        ),
        node("check", "CheckNumerics", [norm], T=1, message=b""),
        node("checked", "Identity", [norm, "^check"], T=1),
        node("mixed_6/conv", "Relu", ["checked"], T=1),
        node("max", "MaxPool", ["mixed_6/conv"], **pool),
        node("average", "AvgPool", ["mixed_6/conv"], **pool),
        constant("axis", np.array(3, np.int32)),
        node("join", "Concat", ["axis", "max", "average"], T=1, N=2),
        node(
            "pool_3",
            "AvgPool",
            ["join"],
            T=1,
            ksize=[1, half, half, 1],
            strides=[1] * 4,
            padding=b"VALID",
        ),
        constant("shape", np.array([-1, 2 * width], np.int32)),
        node("reshape", "Reshape", ["pool_3", "shape"], T=1, Tshape=3),
        constant("softmax/weights", normal("softmax", (2 * width, classes)).astype(np.float32)),
        node(
            "softmax/logits/MatMul",
            "MatMul",
            ["reshape", "softmax/weights"],
            T=1,
            transpose_a=False,
            transpose_b=False,
        ),
        *extra.values(),
    )


def standin_constant(name: str, attributes: dict, moving: dict[str, np.ndarray]):
    """The value of a constant of the stand-in, by its name."""
    if "value" in attributes:
        dtype = {"DT_FLOAT": np.float32, "DT_INT32": np.int32}[attributes["dtype"]]
        return np.array(attributes["value"], dtype)
    if attributes["dtype"] == "DT_STRING":
        jpeg = io.BytesIO()
        Image.new("RGB", (8, 8), (90, 120, 150)).save(jpeg, "JPEG")
        return jpeg.getvalue()
    if name in moving:
        return moving[name]
    shape = tuple(attributes["shape"])
    n = normal(name, shape)
    if name.endswith("conv2d_params"):
        value = n * np.sqrt(2 / np.prod(shape[:3]))
    elif name.endswith("beta"):
        value = 0.05 + 0.35 * n
    elif name.endswith("gamma"):
        value = np.ones(shape)
    else:
        value = n * {"softmax/weights": 0.06, "softmax/biases": 0.1}[name]
    return value.astype(np.float32)


def write_standin(path: Path) -> None:
    """Write the stand-in for the Inception graph, 96 MB."""
    with gzip.open(GOLDEN / "inception_2015_nodes.json.gz", "rt") as stream:
        nodes = json.load(stream)["nodes"]
    with np.load(GOLDEN / "inception_standin_batchnorm.npz") as file:
        moving = dict(file)
    parts = []
    for info in nodes:
        name, op, attributes = info["name"], info["op"], dict(info.get("attr", {}))
        if op == "Const":
            parts.append(constant(name, standin_constant(name, attributes, moving)))
            continue
        for key, value in attributes.items():
            if key in _TYPE_ATTRIBUTES:
                attributes[key] = _TYPE_NAMES[value]
            elif isinstance(value, str):
                attributes[key] = value.encode()
        if op not in ("DecodeJpeg", "Cast"):
            attributes["T"] = 1
        if op == "CheckNumerics":
            attributes.setdefault("message", b"")
        parts.append(node(name, op, info["inputs"], **attributes))
    Path(path).write_bytes(graph(*parts))


if __name__ == "__main__":
    write_standin(Path(sys.argv[1]))
