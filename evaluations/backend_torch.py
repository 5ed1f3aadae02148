"""The PyTorch engine: executes the frozen graph's own nodes, without TensorFlow.

Tensors keep TensorFlow's axes (NHWC) throughout. Convolutions and pools see them through a
transposed view, which PyTorch recognises as its channels-last layout, so nothing is copied.
What follows a convolution and only scales or shifts channels is folded into it in float64.
"""

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from esddpm_io.errors import UserError, first_line
from evaluations.graph_file import IMAGES_NODE, POOL_NODE, SPATIAL_NODE, Graph, Node

Function = Callable[..., torch.Tensor]  # of the inputs of a node that are not constants
# Of one node: its attributes, and for each input the constant it is or None
Builder = Callable[["TorchEngine", Node, list[np.ndarray | None]], Function]

_BUILDERS: dict[str, Builder] = {}
_NORMALISATIONS = {
    "BatchNormWithGlobalNormalization",
    "FusedBatchNorm",
    "FusedBatchNormV2",
    "FusedBatchNormV3",
    "BiasAdd",
}
# What an operation that does not fit its attributes or inputs runs into
_UNFIT = (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError)
_PASSED_THROUGH = {"Identity", "CheckNumerics", "StopGradient"}


class TorchEngine:
    """Pool and spatial features of a frozen graph by PyTorch.

    device: as of `check_device`. precision: `float32`, `bfloat16` or, with CUDA, `float16`;
    resizing is float32 in any case. `UserError` naming the operation if the graph has one that is
    not known here.
    """

    name = "torch"

    def __init__(self, graph: Graph, precision: str = "float32", device: str = "auto"):
        self.device = check_device(device)
        self.dtype = getattr(torch, precision)
        _check_precision(precision, self.device)
        self.graph = graph
        self._outputs = [self._source(POOL_NODE), self._source(SPATIAL_NODE)]
        order = self._order()
        self._consumers: dict[str, int] = {}
        for name in order:
            for source in self._sources(name):
                self._consumers[source] = self._consumers.get(source, 0) + 1
        self._steps = self._plan(order)
        if missing := set(self._outputs) - {step[0] for step in self._steps}:
            raise UserError(f"{graph.path}: {', '.join(missing)} does not depend on the images")

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] -> outputs of the two nodes, float32 [N, h, w, channels] each."""
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            values = {IMAGES_NODE: torch.from_numpy(images).to(self.device).float()}
            for name, function, inputs, finished in self._steps:
                try:
                    values[name] = function(*(values[source] for source in inputs))
                except (RuntimeError, *_UNFIT) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise UserError(f"--batch_size {len(images)}: out of memory") from error
                    first = first_line(error)
                    raise UserError(
                        f"the graph failed on {images.shape} at {name}: {first}"
                    ) from error
                for source in finished:
                    del values[source]
            return tuple(values[name].float().cpu().numpy() for name in self._outputs)

    def tensor(self, constant: np.ndarray) -> torch.Tensor:
        """A constant on the engine's device; floats in float32."""
        if constant.dtype.kind == "f":
            constant = constant.astype(np.float32)
        return torch.from_numpy(np.array(constant)).to(self.device)

    def _source(self, reference: str) -> str:
        """The node behind an input, past nodes that hand on what they get."""
        node = self.graph.node(reference)
        seen = {reference}
        while node.op in _PASSED_THROUGH and node.name != IMAGES_NODE:
            if not node.inputs:
                raise UserError(f"{self.graph.path}: the {node.op} node {node.name} has no input")
            reference = node.inputs[0]
            if reference in seen:
                raise UserError(f"{self.graph.path}: {node.name} depends on itself")
            seen.add(reference)
            node = self.graph.node(reference)
        return node.name

    def _sources(self, name: str) -> list[str]:
        """The nodes that a node takes its data from (`^name` is control only)."""
        if name == IMAGES_NODE:
            return []
        node = self.graph.nodes[name]
        sources = [self._source(one) for one in node.inputs if not one.startswith("^")]
        if not sources and node.op != "Const":
            raise UserError(f"{self.graph.path}: the {node.op} node {name} has no input")
        return sources

    def _order(self) -> list[str]:
        """The nodes that the outputs need, each after its inputs."""
        order: dict[str, None] = {}
        waiting = list(self._outputs)
        open_nodes: set[str] = set()
        while waiting:
            name = waiting[-1]
            missing = [source for source in self._sources(name) if source not in order]
            if name in order or not missing:
                order[waiting.pop()] = None
            elif name in open_nodes:
                raise UserError(f"{self.graph.path}: {name} depends on itself")
            else:
                open_nodes.add(name)
                waiting += missing
        return list(order)

    def _plan(self, order: list[str]) -> list[tuple[str, Function, list[str], list[str]]]:
        """Steps (name, function, inputs, inputs not needed later), normalisation folded."""
        constants = {n for n in order if self.graph.nodes[n].op == "Const"}
        folded = self._foldable(order)
        convolutions: set[str] = set()
        steps = []
        for name in order:
            if name in constants or name == IMAGES_NODE or name in folded.values():
                continue
            sources = self._sources(name)
            if name in folded:
                convolution = folded[name]
                function = self._folded_convolution(name, convolution)
                sources = self._sources(convolution)
            else:
                function = self._function(name)
            # Of a convolution that nothing else uses a new array would only take time.
            if self.graph.nodes[name].op == "Relu" and sources[0] in convolutions:
                function = torch.relu_ if self._is_used_once(sources[0]) else function
            if self.graph.nodes[name].op == "Conv2D" or name in folded:
                convolutions.add(name)
            steps.append((name, function, [s for s in sources if s not in constants]))
        return self._with_lifetimes(steps)

    def _is_used_once(self, name: str) -> bool:
        return self._consumers[name] == 1 and name not in self._outputs

    def _with_lifetimes(self, steps):
        last = {}
        for index, (_, _, inputs) in enumerate(steps):
            last.update(dict.fromkeys(inputs, index))
        return [
            (
                name,
                function,
                inputs,
                [s for s in dict.fromkeys(inputs) if last[s] == i and s not in self._outputs],
            )
            for i, (name, function, inputs) in enumerate(steps)
        ]

    def _constants(self, name: str) -> list[np.ndarray | None]:
        nodes = [self.graph.nodes[source] for source in self._sources(name)]
        return [self.graph.constant(node.name) if node.op == "Const" else None for node in nodes]

    def _function(self, name: str) -> Function:
        node = self.graph.nodes[name]
        if node.op not in _BUILDERS:
            raise UserError(
                f"--backend torch: {self.graph.path} uses the operation {node.op} (node {name}), "
                f"which is not among those known here ({', '.join(sorted(_BUILDERS))}); use "
                "--backend tensorflow"
            )
        return self._build(name, _BUILDERS[node.op])

    def _build(self, name: str, build: Builder) -> Function:
        node = self.graph.nodes[name]
        try:
            _check_steps(node)
            return build(self, node, self._constants(name))
        except UserError:
            raise
        except _UNFIT as error:
            raise UserError(
                f"--backend torch: {self.graph.path}: the {node.op} node {name} lacks an "
                f"attribute or a constant input ({error})"
            ) from error

    def _foldable(self, order: list[str]) -> dict[str, str]:
        """Normalisations and the convolutions, used by nothing else, that they fold into."""
        folded = {}
        for name in order:
            node = self.graph.nodes[name]
            if node.op not in _NORMALISATIONS or name == IMAGES_NODE:
                continue
            source = self._sources(name)[0]
            if self.graph.nodes[source].op == "Conv2D" and self._is_used_once(source):
                folded[name] = source
        return folded

    def _folded_convolution(self, name: str, convolution: str) -> Function:
        def build(engine: TorchEngine, node: Node, constants: list) -> Function:
            scale, shift = _scale_and_shift(self.graph.nodes[name], self._constants(name))
            return _convolution(engine, node, constants[1].astype(np.float64) * scale, shift)

        return self._build(convolution, build)


def check_device(name: str) -> torch.device:
    """The device of that name; `UserError` if it is not there. Takes no memory on a GPU.

    `auto` is CUDA where there is one, else the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        if device.type == "cuda":
            there = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (device.index or 0) >= there:
                raise RuntimeError(f"CUDA devices there are: {there}")
        else:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not available here ({first_line(error)})") from error
    return device


def _check_precision(precision: str, device: torch.device) -> None:
    if device.type != "cpu" or precision == "float32":
        return
    if precision == "float16":
        raise UserError("--precision float16 needs a GPU: use bfloat16 on a CPU")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            "this processor has no bfloat16 arithmetic: float32 is faster here", stacklevel=2
        )


def _builder(*ops: str) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(ops, build))
        return build

    return register


def _scale_and_shift(
    node: Node, constants: list[np.ndarray | None]
) -> tuple[np.ndarray | float, np.ndarray]:
    """float64 per channel: what a normalisation multiplies by and what it then adds."""
    parameters = [None if c is None else c.astype(np.float64) for c in constants]
    if node.op == "BiasAdd":
        return 1.0, parameters[1]
    if node.op == "BatchNormWithGlobalNormalization":
        _, mean, variance, beta, gamma = parameters
        scale = 1.0 / np.sqrt(variance + node.attributes["variance_epsilon"])
        if node.attributes["scale_after_normalization"]:
            scale = scale * gamma
    else:
        if node.attributes.get("is_training", True):
            raise TypeError("is_training is set: a frozen graph must not normalise by batch")
        _, gamma, beta, mean, variance = parameters
        scale = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-4))
    return scale, beta - mean * scale


@_builder(*sorted(_NORMALISATIONS))
def _normalisation(engine: TorchEngine, node: Node, constants: list) -> Function:
    _check_layout(node)
    scale, shift = (engine.tensor(np.asarray(c)) for c in _scale_and_shift(node, constants))
    return lambda x: torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


@_builder("Conv2D")
def _plain_convolution(engine: TorchEngine, node: Node, constants: list) -> Function:
    return _convolution(engine, node, constants[1].astype(np.float64), None)


def _convolution(
    engine: TorchEngine, node: Node, kernel: np.ndarray, bias: np.ndarray | None
) -> Function:
    """Convolution with kernel float64 [h, w, in, out] and bias float64 [out]."""
    _check_layout(node)
    weight = engine.tensor(kernel.transpose(3, 2, 0, 1).copy()).to(engine.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else engine.tensor(bias).to(engine.dtype)
    dilation = tuple(node.attributes.get("dilations") or [1, 1, 1, 1])[1:3]
    stride = tuple(node.attributes["strides"][1:3])
    size = [1 + (k - 1) * d for k, d in zip(kernel.shape[:2], dilation, strict=True)]

    def convolve(x: torch.Tensor) -> torch.Tensor:
        x, padding = _padded(x.to(engine.dtype).permute(0, 3, 1, 2), node, size, stride, 0.0)
        return F.conv2d(x, weight, bias, stride, padding, dilation).permute(0, 2, 3, 1)

    return convolve


@_builder("MaxPool")
def _max_pool(engine: TorchEngine, node: Node, constants: list) -> Function:
    _check_layout(node)
    size, stride = node.attributes["ksize"][1:3], node.attributes["strides"][1:3]

    def pool(x: torch.Tensor) -> torch.Tensor:
        x, padding = _padded(x.permute(0, 3, 1, 2), node, size, stride, -torch.inf)
        return F.max_pool2d(x, size, stride, padding).permute(0, 2, 3, 1)

    return pool


@_builder("AvgPool")
def _average_pool(engine: TorchEngine, node: Node, constants: list) -> Function:
    _check_layout(node)
    size, stride = node.attributes["ksize"][1:3], node.attributes["strides"][1:3]

    def pool(x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        if x.shape[2:] == tuple(size):
            return x.mean(dim=(2, 3), keepdim=True).permute(0, 2, 3, 1)
        padded, padding = _padded(x, node, size, stride, 0.0)
        if padded is x:
            pooled = F.avg_pool2d(x, size, stride, padding, count_include_pad=False)
            return pooled.permute(0, 2, 3, 1)
        # Uneven padding was added by hand: leave it out of the mean by the share of real pixels.
        real, _ = _padded(torch.ones_like(x[:1, :1]), node, size, stride, 0.0)
        pooled = F.avg_pool2d(padded, size, stride) / F.avg_pool2d(real, size, stride)
        return pooled.permute(0, 2, 3, 1)

    return pool


def _padded(
    x: torch.Tensor, node: Node, size: list[int], stride: list[int], fill: float
) -> tuple[torch.Tensor, tuple[int, int]]:
    """NCHW `x` and the padding that the operation is to add, by TensorFlow's VALID or SAME.

    SAME puts an odd pixel at the end; PyTorch cannot, so `x` then comes padded with `fill`.
    """
    kind = node.attributes["padding"]
    if kind == b"VALID":
        return x, (0, 0)
    if kind != b"SAME":
        raise UserError(f"--backend torch: padding {kind.decode()} of {node.name} is not known")
    totals = [
        max((-(-length // step) - 1) * step + extent - length, 0)
        for length, step, extent in zip(x.shape[2:], stride, size, strict=True)
    ]
    if all(total % 2 == 0 for total in totals):
        return x, (totals[0] // 2, totals[1] // 2)
    (top, left), (height, width) = (total // 2 for total in totals), totals
    return F.pad(x, (left, width - left, top, height - top), value=fill), (0, 0)


def _check_steps(node: Node) -> None:
    """A window or a step of 0 is none."""
    for name in ("strides", "ksize", "dilations"):
        if min(node.attributes.get(name) or [1]) < 1:
            raise ValueError(f"{name} {node.attributes[name]}")


def _check_layout(node: Node) -> None:
    layout = node.attributes.get("data_format", b"NHWC")
    if layout != b"NHWC":
        raise UserError(f"--backend torch: {node.name} is {layout.decode()}, NHWC expected")


@_builder("ResizeBilinear")
def _resize(engine: TorchEngine, node: Node, constants: list) -> Function:
    height, width = engine.graph.resize_size(node)
    aligned = bool(node.attributes.get("align_corners"))
    centred = bool(node.attributes.get("half_pixel_centers"))

    @functools.lru_cache(maxsize=4)
    def weights(length: int, out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        arrays = interpolation_weights(length, out, aligned, centred)
        return tuple(torch.from_numpy(array).to(engine.device) for array in arrays)

    def interpolate(x: torch.Tensor, axis: int, out: int) -> torch.Tensor:
        low, high, share = weights(x.shape[axis], out)
        first, second = x.index_select(axis, low), x.index_select(axis, high)
        shape = [1, 1, 1, 1]
        shape[axis] = out
        # A product and a sum, each rounded, as TensorFlow has it: no fused multiply-add.
        return second.sub_(first).mul_(share.view(shape)).add_(first)

    def resize(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:3] == (height, width):
            return x
        return interpolate(interpolate(x.float(), 2, width), 1, height)

    return resize


def interpolation_weights(
    length: int, out: int, align_corners: bool = False, half_pixel_centers: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TensorFlow's bilinear resize of one axis from `length` to `out`, bit for bit.

    Lower and upper index int64 [out], and the upper one's share float32 [out]. The published
    graph's form has neither half-pixel centres nor aligned corners: position = i * scale.
    """
    one = np.float32(1)
    if align_corners and out > 1:
        scale = np.float32(length - 1) / np.float32(out - 1)
    else:
        scale = np.float32(length) / np.float32(out)
    position = np.arange(out, dtype=np.float32)
    if half_pixel_centers:
        position = (position + one / 2) * scale - one / 2
    else:
        position = position * scale
    floor = np.floor(position)
    low = np.clip(floor, 0, length - 1).astype(np.int64)
    high = np.minimum(floor.astype(np.int64) + 1, length - 1).clip(0)
    return low, high, (position - floor).astype(np.float32)


@_builder("Concat", "ConcatV2")
def _concat(engine: TorchEngine, node: Node, constants: list) -> Function:
    axis = int(constants[0] if node.op == "Concat" else constants[-1])
    return lambda *parts: torch.cat(parts, dim=axis)


@_builder("Reshape")
def _reshape(engine: TorchEngine, node: Node, constants: list) -> Function:
    shape = [int(length) for length in constants[1]]
    return lambda x: x.reshape(shape)


@_builder("Squeeze")
def _squeeze(engine: TorchEngine, node: Node, constants: list) -> Function:
    # Without axes all of length 1 go, but a batch of one image stays one.
    axes = tuple(node.attributes.get("squeeze_dims") or ())
    return lambda x: x.squeeze(axes or tuple(range(1, x.dim())))


@_builder("Mean")
def _mean(engine: TorchEngine, node: Node, constants: list) -> Function:
    axes = tuple(int(axis) for axis in np.atleast_1d(constants[1]))
    keep = bool(node.attributes.get("keep_dims"))
    return lambda x: x.mean(dim=axes, keepdim=keep)


@_builder("Pad")
def _pad(engine: TorchEngine, node: Node, constants: list) -> Function:
    # PyTorch counts from the last axis.
    amounts = [int(amount) for pair in constants[1][::-1] for amount in pair]
    return lambda x: F.pad(x, amounts)


@_builder("MatMul")
def _matmul(engine: TorchEngine, node: Node, constants: list) -> Function:
    weights = constants[1].T if node.attributes.get("transpose_b") else constants[1]
    if node.attributes.get("transpose_a"):
        raise TypeError("transpose_a is set")
    weight = engine.tensor(weights).to(engine.dtype)
    return lambda x: x.to(weight.dtype) @ weight


@_builder("Cast")
def _cast(engine: TorchEngine, node: Node, constants: list) -> Function:
    dtype = torch.from_numpy(np.empty(0, node.attributes["DstT"])).dtype
    return lambda x: x.to(dtype)


_UNARY = {
    "Relu": F.relu,
    "Relu6": F.relu6,
    "Elu": F.elu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softmax": lambda x: torch.softmax(x, dim=-1),
    "Square": torch.square,
    "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt,
    "Neg": torch.neg,
    "Exp": torch.exp,
}
_BINARY = {
    "Add": torch.add,
    "AddV2": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "RealDiv": torch.div,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "SquaredDifference": lambda a, b: torch.square(a - b),
}


@_builder(*_UNARY)
def _unary(engine: TorchEngine, node: Node, constants: list) -> Function:
    return _UNARY[node.op]


@_builder(*_BINARY)
def _binary(engine: TorchEngine, node: Node, constants: list) -> Function:
    function = _BINARY[node.op]
    first, second = (None if c is None else engine.tensor(c) for c in constants)
    if first is not None:
        return lambda x: function(first.to(x.dtype), x)
    if second is not None:
        return lambda x: function(x, second.to(x.dtype))
    return function
