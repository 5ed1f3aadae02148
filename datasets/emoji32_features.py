"""Train the feature network of emoji32 and freeze it as a graph that the evaluator reads.

    python datasets/emoji32_features.py --data datasets/emoji32.npz \\
        --out evaluations/precomputed/emoji32_features.pb

A small classifier of the ten categories plays the part that Inception plays for photographs: its
pooled features are what the Fréchet distance compares. The nodes carry Inception's names
(`ExpandDims`, `mixed_6/conv`, `pool_3`, `softmax/logits/MatMul`), so an evaluator made for the 2015
graph reads this one too. Distances in these features are no FID: compare them with each other only.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import run_main
from esddpm_io.help import CommandLine
from esddpm_io.images import check_image_array
from esddpm_io.npz import NpzReader
from esddpm_io.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32
# (node name, output channels, maximum-pooled by 2 after it); every convolution is 3 x 3.
LAYERS = (
    ("conv", 32, False),
    ("conv_1", 32, True),
    ("conv_2", 64, False),
    ("conv_3", 64, True),
    ("conv_4", 128, False),
    ("mixed_6/conv", 128, True),  # 8 x 8: the spatial features of sFID
    ("conv_5", 128, False),  # 4 x 4, averaged by pool_3
)
# Inception's scaling of 0-255 pixels, roughly [-1, 1).
PIXEL_OFFSET, PIXEL_SCALE = 128.0, 1.0 / 128.0
BN_EPSILON = 1e-3


class FeatureNet(nn.Module):
    """Classifier of emoji32: float NCHW pixels 0-255 -> (pooled [N, 128], logits [N, classes])."""

    def __init__(self, num_classes: int):
        super().__init__()
        channels = [3, *(width for _, width, _ in LAYERS)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=BN_EPSILON) for width in channels[1:])
        # No bias: the Inception score takes softmax(features @ weights), so these probabilities
        # are the classifier's own.
        self.classify = nn.Linear(channels[-1], num_classes, bias=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = (pixels - PIXEL_OFFSET) * PIXEL_SCALE
        for (_, _, pooled), conv, norm in zip(LAYERS, self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h)))
            h = F.max_pool2d(h, 2) if pooled else h
        features = h.mean(dim=(2, 3))
        return features, self.classify(features)

    def folded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer, kernel [3, 3, in, out] and bias [out] with the batch norm folded in."""
        layers = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            kernel = conv.weight.double() * scale[:, None, None, None]
            bias = norm.bias.double() - norm.running_mean.double() * scale
            layers.append((kernel.permute(2, 3, 1, 0), bias))
        return [(k.detach().float().numpy(), b.detach().float().numpy()) for k, b in layers]


def augment(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift by up to 3 pixels (white moves in), mirror, and recolour a batch of 0-255 pixels.

    Neither blur nor noise: features trained to overlook them would not see what sets generated
    images apart from drawn ones.
    """
    n, _, height, width = pixels.shape
    margin = 3
    padded = F.pad(pixels, [margin] * 4, value=255.0)
    out = torch.empty_like(pixels)
    offsets = torch.randint(0, 2 * margin + 1, (n, 2), generator=rng)
    for i, (top, left) in enumerate(offsets.tolist()):
        out[i] = padded[i, :, top : top + height, left : left + width]
    mirrored = torch.rand(n, generator=rng) < 0.5
    out[mirrored] = out[mirrored].flip(3)
    # The ink (255 - pixel) is scaled per channel, so white stays white.
    gain = 1.0 + 0.15 * (2 * torch.rand(n, 3, 1, 1, generator=rng) - 1)
    return 255.0 - ((255.0 - out) * gain).clamp(0.0, 255.0)


def train(
    images: np.ndarray, labels: np.ndarray, num_classes: int, epochs: int, lr: float, seed: int
) -> FeatureNet:
    """Train on uint8 [N, 32, 32, 3] and int labels [N]; returns the network in evaluation mode."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    batch = min(64, len(images))
    net = FeatureNet(num_classes).to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    target = torch.from_numpy(labels)
    # 60 % of the drawings are people: the square root of the inverse frequency keeps the rare
    # categories visible without letting the five skin-tone swatches dominate.
    weight = 1.0 / torch.bincount(target, minlength=num_classes).clamp_min(1).float().sqrt()
    weight = weight / weight[target].mean()
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    with Progress(epochs, "epoch", "features") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=rng)
            losses, correct = [], 0
            for start in range(0, len(order) - batch + 1, batch):
                index = order[start : start + batch]
                _, logits = net(augment(pixels[index].float(), rng))
                loss = F.cross_entropy(logits, target[index], weight, label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                correct += (logits.argmax(1) == target[index]).sum().item()
            accuracy = correct / (len(losses) * batch)
            progress.update(1, f"loss {np.mean(losses):.3f} accuracy {accuracy:.3f}")
    return net.eval()


def freeze(net: FeatureNet) -> bytes:
    """The network as a serialised TensorFlow GraphDef: constants and Inception's node names."""
    import tensorflow as tf

    raw = tf.raw_ops
    with tf.Graph().as_default() as graph:
        h = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="ExpandDims")
        size = tf.constant([SIZE, SIZE], name="ResizeBilinear/size")
        h = raw.ResizeBilinear(images=h, size=size, name="ResizeBilinear")
        h = raw.Sub(x=h, y=tf.constant(PIXEL_OFFSET, name="Sub/y"), name="Sub")
        h = raw.Mul(x=h, y=tf.constant(PIXEL_SCALE, name="Mul/y"), name="Mul")
        for (name, _, pooled), (kernel, bias) in zip(LAYERS, net.folded(), strict=True):
            kernel = tf.constant(kernel, name=f"{name}/conv2d_params")
            h = raw.Conv2D(
                input=h, filter=kernel, strides=[1] * 4, padding="SAME", name=f"{name}/Conv2D"
            )
            h = raw.BiasAdd(
                value=h, bias=tf.constant(bias, name=f"{name}/biases"), name=f"{name}/BiasAdd"
            )
            h = raw.Relu(features=h, name=name)
            if pooled:
                h = raw.MaxPool(
                    input=h,
                    ksize=[1, 2, 2, 1],
                    strides=[1, 2, 2, 1],
                    padding="VALID",
                    name=f"{name}/pool",
                )
        side, width = h.shape[1], h.shape[3]
        h = raw.AvgPool(
            value=h, ksize=[1, side, side, 1], strides=[1] * 4, padding="VALID", name="pool_3"
        )
        shape = tf.constant([-1, width], name="pool_3/_reshape/shape")
        h = raw.Reshape(tensor=h, shape=shape, name="pool_3/_reshape")
        weights = net.classify.weight.detach().numpy().T
        weights = tf.constant(weights, name="softmax/weights")
        h = raw.MatMul(a=h, b=weights, name="softmax/logits/MatMul")
        biases = tf.constant(np.zeros(weights.shape[1], np.float32), name="softmax/biases")
        h = raw.BiasAdd(value=h, bias=biases, name="softmax/logits")
        raw.Softmax(logits=h, name="softmax")
    return graph.as_graph_def().SerializeToString(deterministic=True)


def run_frozen(graph_def: bytes, images: np.ndarray, nodes: list[str]) -> list[np.ndarray]:
    """Outputs of `nodes` of a frozen graph for uint8 images [N, H, W, 3]."""
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef.FromString(graph_def)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        outputs = [f"{node}:0" for node in nodes]
        return session.run(outputs, {"ExpandDims:0": images.astype(np.float32)})


def check_frozen(net: FeatureNet, graph_def: bytes, images: np.ndarray) -> float:
    """Largest difference between the frozen graph's pooled features and the network's, relative
    to their range, on uint8 images [N, 32, 32, 3]."""
    (frozen,) = run_frozen(graph_def, images, ["pool_3"])
    with torch.no_grad():
        features, _ = net(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    features = features.numpy()
    return float(np.abs(frozen.reshape(features.shape) - features).max() / np.ptp(features))


def read_data(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of the data set."""
    with NpzReader(path, flag="--data") as reader:
        images, labels = reader.array("arr_0"), reader.array("arr_1").astype(np.int64)
    check_image_array(images.shape, images.dtype, f"--data: arr_0 of {path}", size=SIZE)
    return images, labels


def create_argparser() -> argparse.ArgumentParser:
    precomputed = ROOT / "evaluations" / "precomputed"
    parser = CommandLine(description=__doc__)
    parser.add_argument("--data", default=str(ROOT / "datasets" / "emoji32.npz"), help="emoji32")
    parser.add_argument("--out", default=str(precomputed / "emoji32_features.pb"), help="graph")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the drawings")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the one-cycle schedule")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, order and changes of the drawings"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    images, labels = read_data(args.data)
    started = time.monotonic()
    net = train(images, labels, int(labels.max()) + 1, args.epochs, args.lr, args.seed)
    graph_def = freeze(net)
    error = check_frozen(net, graph_def, images[:256])
    # Rounding in another order moves float32 features by some 1e-6 of their range.
    if error > 1e-4:
        raise RuntimeError(f"the frozen graph differs from the network by {error:.2e}")
    with atomic_path(args.out) as temporary:
        temporary.write_bytes(graph_def)
    print(
        f"{args.out}: {len(graph_def) / 1e6:.2f} MB, features agree with PyTorch to {error:.1e}, "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
