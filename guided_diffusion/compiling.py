"""torch.compile of a network, one compilation a run: all batches get the same shape and layout."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import torch

from esddpm_io.errors import UserError


class Compiled:
    """A compiled network that takes batches of at most `rows` rows.

    Tensors of the arguments, [n, …], are filled up with zeros to that many rows and brought into
    one memory layout; the rows of the zeros are cut off the output (a tensor, or a dict of them).
    Rows do not depend on each other, so neither does the output on the filling. More rows work
    too, at the price of another compilation.
    """

    def __init__(
        self,
        network: Callable,
        rows: int,
        layout: torch.memory_format,
        *,
        backend: str = "inductor",
        mode: str | None = None,
        options: dict | None = None,
    ):
        self.rows = rows
        self._layout = layout
        self._clones = mode == "reduce-overhead"
        how: dict[str, Any] = {"backend": backend, "mode": mode, "options": options}
        self._network: Callable = torch.compile(network, dynamic=False, **how)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {name: self._fill(value) for name, value in kwargs.items()}
        out = self._network(*(self._fill(value) for value in (x, *args)), **named)
        if isinstance(out, dict):
            return {name: self._cut(value, len(x)) for name, value in out.items()}
        return self._cut(out, len(x))

    def _fill(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if len(value) < self.rows:
            more = value.new_zeros(self.rows - len(value), *value.shape[1:])
            value = torch.cat([value, more])
        return value.contiguous(memory_format=self._layout) if value.ndim == 4 else value

    def _cut(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        # The next replay of a CUDA graph writes its output into the same memory.
        return value[:rows].clone() if self._clones else value[:rows]


def compile_for_sampling(network: torch.nn.Module, rows: int, device: torch.device) -> Compiled:
    """A network whose weights stay as they are: as CUDA graphs, or on a CPU built into the code."""
    if device.type == "cpu":
        return Compiled(network, rows, torch.channels_last, options={"freezing": True})
    return Compiled(network, rows, torch.channels_last, mode="reduce-overhead")


def check_compiler(device: str) -> None:
    """UserError if torch.compile lacks what it builds code for a `device` with.

    device: as `--device` names it. A CPU needs a C++ compiler, CUDA Triton and a C compiler, and
    both Python's headers.
    """
    if device == "cpu":
        kind, names = "C++", [os.environ.get("CXX", _cxx_of_torch())]
    else:
        kind, names = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        if importlib.util.find_spec("triton") is None:
            raise UserError("--compile: the package triton is not installed: leave --compile out")
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--compile: there is no {kind} compiler {' or '.join(names)} on this machine: install "
            "one, or leave --compile out"
        )
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        raise UserError(
            f"--compile: there is no {header}: install Python's headers (python3-dev), or leave "
            "--compile out"
        )


def _cxx_of_torch() -> str:
    """The compiler that torch takes where CXX does not name one."""
    return {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
