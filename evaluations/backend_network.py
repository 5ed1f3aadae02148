"""Networks in files, by PyTorch: running them, and exporting a module as such a file."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError, first_line
from evaluations.backend_torch import check_device
from evaluations.network_file import Description, NetworkFile, description_path, is_network_file

_TRIED = 3  # images of the batch that an export is tried on: not the number that it was traced with
_TOLERANCE = 1e-4  # of the largest feature: what another order of sums may change


class NetworkEngine:
    """Features of a `NetworkFile`, float32; there are no spatial ones (width 0).

    device: as of `check_device`. `UserError` for a file that is no network or gives other than
    [N, D] features.
    """

    name = "torch"

    def __init__(self, network: NetworkFile, device: str = "auto"):
        self._device = check_device(device)
        self._network = network
        try:
            self._run = _load(network.path, self._device)
        except Exception as error:  # torch raises all kinds for a file that is not its own
            raise UserError(
                f"--inception_path: {network.path} cannot be loaded: {first_line(error)}"
            ) from error

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] -> features float32 [N, D] and no spatial features [N, 0]."""
        pixels = torch.from_numpy(self._network.description.prepared(images))
        try:
            features = _features(self._run, pixels.to(self._device))
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch_size {len(images)}: out of memory") from error
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"{self._network.path} failed on {list(pixels.shape)}: {first_line(error)}"
            ) from error
        expected = len(images), self._network.dimensions
        if features.shape != expected:
            raise UserError(
                f"{self._network.path} gives features {list(features.shape)}, its TOML says "
                f"{list(expected)}"
            )
        return features, np.empty((len(images), 0), np.float32)


def export_network(module: torch.nn.Module, path: str | os.PathLike, about: Description) -> None:
    """Write `module` to `path` (.pt or .pt2) for the evaluator, and `about` beside it as a TOML.

    module: float32 [N, 3, height, width], prepared as `about` says, -> features [N, D], for any N.
    `UserError` if that cannot be done or the file does not give the module's own features.
    """
    path = Path(path)
    assert is_network_file(path), path
    module = module.eval().cpu()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(_TRIED, 3, *about.size, generator=generator)
    expected = _features(module, batch)
    if expected.shape != (_TRIED, about.features):
        raise UserError(
            f"{about.name} gives features {list(expected.shape)}, {[_TRIED, about.features]} "
            "expected"
        )
    with atomic_path(path) as temporary:
        try:
            _save(module, batch[:2], temporary)
            found = _features(_load(str(temporary), torch.device("cpu")), batch)
        except Exception as error:  # torch raises all kinds for a module that it cannot follow
            raise UserError(
                f"{about.name} cannot be exported to {path}: {first_line(error)}"
            ) from error
        if np.abs(found - expected).max() > _TOLERANCE * np.abs(expected).max():
            raise UserError(f"{about.name} gives other features once it is exported to {path}")
    with atomic_path(description_path(path)) as temporary:
        temporary.write_text(about.as_toml(), encoding="utf-8")


def _features(run: Callable, pixels: torch.Tensor) -> np.ndarray:
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = run(pixels)
    if not isinstance(features, torch.Tensor):
        raise RuntimeError(f"it gives a {type(features).__name__}, one tensor is expected")
    return features.float().cpu().numpy()


def _save(module: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    with _silent():
        if path.suffix == ".pt":
            torch.jit.trace(module, example).save(str(path))
            return
        batch = torch.export.Dim("batch")
        torch.export.save(
            torch.export.export(module, (example,), dynamic_shapes=({0: batch},)), path
        )


def _load(path: str, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    with _silent():
        if path.endswith(".pt"):
            return torch.jit.load(path, map_location=device).eval()
        program = torch.export.load(path)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """TorchScript is deprecated, and torch logs a traceback of what it then raises."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
