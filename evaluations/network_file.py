"""A feature network that is no frozen graph: a .pt or .pt2 file, and a TOML that describes it.

`.pt` is TorchScript, `.pt2` comes from `torch.export`; both take float32 [N, 3, height, width] and
give features [N, D]. The TOML has the same name and these entries, all of them required:

    name = "dinov2_vitl14"           # what the figures are called by
    features = 1024                  # D
    size = [224, 224]                # height and width that the network takes
    resize = "bicubic"               # one of FILTERS, or "none": images must have that size
    range = [0.0, 1.0]               # what 0 and 255 become, before mean and std
    mean = [0.485, 0.456, 0.406]
    std = [0.229, 0.224, 0.225]
"""

import hashlib
import json
import math
import os
import tomllib
from dataclasses import dataclass

import numpy as np

from esddpm_io.errors import UserError
from esddpm_io.files import open_binary
from evaluations.resizing import FILTERS, PUBLISHED_RESIZE, resized

SUFFIXES = (".pt", ".pt2")
_RESIZES = (*FILTERS, "none")
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Description:
    """What the TOML says; `UserError` for values that make no sense."""

    name: str
    features: int
    size: tuple[int, int]
    resize: str
    range: Numbers
    mean: Numbers
    std: Numbers

    def __post_init__(self):
        sensible = {
            "name": isinstance(self.name, str) and self.name.strip() == self.name != "",
            "features": _is_count(self.features),
            "size": _are_numbers(self.size, 2) and all(map(_is_count, self.size)),
            "resize": self.resize in _RESIZES,
            "range": _are_numbers(self.range, 2) and self.range[0] < self.range[1],
            "mean": _are_numbers(self.mean, 3),
            "std": _are_numbers(self.std, 3) and min(self.std) > 0,
        }
        for name, good in sensible.items():
            if not good:
                raise UserError(f"{name} = {getattr(self, name)!r}: {_EXPECTED[name]} expected")

    @classmethod
    def of(cls, entries: dict[str, object]) -> "Description":
        """From the entries of a TOML, all of which it must have and no others."""
        known = list(cls.__annotations__)
        if missing := [name for name in known if name not in entries]:
            raise UserError(f"it does not say {', '.join(missing)}")
        if unknown := [name for name in entries if name not in known]:
            raise UserError(f"unknown {', '.join(unknown)}: there are {', '.join(known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()})

    def as_toml(self) -> str:
        return "".join(
            f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in vars(self).items()
        )

    def prepared(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 3] as the network takes them: float32 [N, 3, height, width]."""
        if self.resize != "none":
            pixels = resized(images, self.size, self.resize)
        elif images.shape[1:3] == self.size:
            pixels = images.astype(np.float32)
        else:
            raise UserError(
                f"images of {images.shape[2]}x{images.shape[1]}: {self.name} takes "
                f"{self.size[1]}x{self.size[0]} and its file says resize = none"
            )
        low, high = self.range
        pixels = pixels * np.float32((high - low) / 255) + np.float32(low)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class NetworkFile:
    """A network in a file. `digest` is the SHA-256 of the file and of its TOML together."""

    path: str
    digest: str
    description: Description
    outputs = frozenset[str]()  # beside the pool features: see `Graph.outputs`

    @property
    def dimensions(self) -> int:
        return self.description.features

    def check(self, backend: str, precision: str, resize: str) -> None:
        """`UserError` for settings that are for frozen graphs only."""
        who = f"{self.path} is a network for PyTorch"
        if backend == "tensorflow":
            raise UserError(f"--backend tensorflow: {who}, use torch or auto")
        if precision != "float32":
            raise UserError(f"--precision {precision}: {who} in a file, which runs in float32")
        if resize != PUBLISHED_RESIZE:
            raise UserError(f"--resize {resize}: {who} whose TOML says how images are resized")


def is_network_file(path: str | os.PathLike) -> bool:
    return os.path.splitext(path)[1] in SUFFIXES


def description_path(path: str | os.PathLike) -> str:
    return f"{os.path.splitext(path)[0]}.toml"


def read_network(path: str | os.PathLike, *, flag: str = "--inception_path") -> NetworkFile:
    """The network at `path` as its TOML describes it; `UserError` naming `flag`. Loads no torch."""
    beside = description_path(path)
    try:
        with open_binary(path, flag=flag) as stream:
            digest = hashlib.file_digest(stream, "sha256")
        with open_binary(beside, flag=flag) as stream:
            text = stream.read()
    except OSError as error:
        raise UserError(f"{flag}: cannot read {error.filename}: {error.strerror}") from error
    digest.update(text)
    try:
        description = Description.of(tomllib.loads(text.decode()))
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{flag}: {beside}, which describes the network: {error}") from error
    return NetworkFile(str(path), digest.hexdigest(), description)


_EXPECTED = {
    "name": "a name",
    "features": "a whole number from 1 on",
    "size": "[height, width]",
    "resize": " or ".join(_RESIZES),
    "range": "two rising numbers",
    "mean": "three numbers",
    "std": "three positive numbers",
}


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _are_numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
