"""Generators as functions of latents: their images are made, by index, when they are needed.

A target names one: MODULE:FACTORY or FILE.py:FACTORY, which is called once with the device, a
TorchScript .pt or torch.export .pt2 file, or a pipeline of diffusers (a folder, hf://owner/name).
docs/bring_your_own.md says what it takes and gives.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esddpm_io.errors import UserError
from esddpm_io.files import absolute, fingerprint_file
from esddpm_io.images import ImageSource, check_image_array
from guided_diffusion.checkpoints import fingerprint
from guided_diffusion.pixels import to_uint8
from guided_diffusion.rng import RandomStreams, derived_seed, random_labels
from guided_diffusion.sampling.pipelines import is_pipeline, load_pipeline

FLAG = "--generator"
ABOUT_FILE = "generator.json"  # beside the network, in a .pt or .pt2 archive
_FILE_ENDINGS = (".pt", ".pt2")
_IMAGES_AT_ONCE = 16
_DEPTH = 3  # a decorator, the function, what it holds; the networks are inside
_MOST_OUT_OF_RANGE = 10.0  # networks overshoot [-1, 1] a little; more is another range


@dataclasses.dataclass(frozen=True)
class Generator:
    """A function on a device and what it says of itself.

    function: latents [n, *latent_shape], N(0, 1), and with num_classes labels int64 [n], to images:
    float [n, 3, H, W] in [-1, 1] or uint8 [n, H, W, 3]. batch_size: n. contents: a hash of its
    source, attributes and networks. name: for messages, after the flag.
    """

    function: Callable[..., torch.Tensor]
    latent_shape: tuple[int, ...]
    num_classes: int | None
    batch_size: int
    device: torch.device
    contents: str
    name: str
    _first: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def first_block(self, seed: int) -> np.ndarray:
        """Block 0 of a seed, made once: settings ask for sizes before samples are drawn."""
        if seed not in self._first:
            self._first[seed] = self.images(seed, 0)
        return self._first[seed]

    @torch.inference_mode()
    def images(self, seed: int, block: int) -> np.ndarray:
        """Images block × batch_size … (block + 1) × batch_size - 1 of a seed, uint8 [n, H, W, 3].

        What the function draws from torch itself is of the seed and the block, too.
        """
        start, stop = block * self.batch_size, (block + 1) * self.batch_size
        like = torch.empty(self.batch_size, *self.latent_shape, device=self.device)
        given = [RandomStreams(seed, start, stop, "latents").randn(like)]
        if self.num_classes is not None:
            labels = random_labels(seed, start, stop, self.num_classes)
            given.append(torch.from_numpy(labels).to(self.device))
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), _telling_where(self.name):
            torch.manual_seed(derived_seed(seed, block))
            made = self.function(*given)
        return self._checked(made, start)

    def _checked(self, made: object, start: int) -> np.ndarray:
        what, n = f"{self.name}: what it gave", self.batch_size
        if not isinstance(made, torch.Tensor):
            raise UserError(f"{what} is a {type(made).__name__}, it must be a tensor")
        if made.dtype == torch.uint8:
            pixels = made.cpu().numpy()
            check_image_array(pixels.shape, pixels.dtype, what, count=n)
            return pixels
        if not made.is_floating_point() or made.dim() != 4 or made.shape[:2] != (n, 3):
            dtype = str(made.dtype).removeprefix("torch.")
            raise UserError(
                f"{what} is {dtype}{list(made.shape)}, it must be float [{n}, 3, height, width] in "
                f"[-1, 1] or uint8 [{n}, height, width, 3]"
            )
        highest = made.float().flatten(1).abs().amax(dim=1)
        bad = (~highest.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"{what} is NaN or infinite in image {start + bad[0]}")
        if highest.max() > _MOST_OUT_OF_RANGE:
            raise UserError(f"{what} has values of {highest.max():.4g}, they must be in [-1, 1]")
        return to_uint8(made)


class GeneratedImages(ImageSource):
    """`count` images of a generator and a seed; of any number the first are the same.

    A network's output for one latent differs in the last bit with the number of others beside it.
    So whole blocks of `batch_size` are made, whatever is read: image i has the same bits in all
    batches, processes and restarts on one kind of device.
    """

    def __init__(self, generator: Generator, count: int, seed: int):
        self._generator, self._count, self._seed = generator, count, seed
        self._kept: tuple[int, np.ndarray] | None = None
        self._first = generator.first_block(seed)
        self.shape = (count, *self._first.shape[1:])
        self.has_labels = generator.num_classes is not None

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self._generator.batch_size
        first = start // size
        blocks = [self._block(number) for number in range(first, -(-stop // size))]
        return np.concatenate(blocks)[start - first * size : stop - first * size]

    def _block(self, number: int) -> np.ndarray:
        if number == 0:
            return self._first
        if self._kept is None or self._kept[0] != number:
            images = self._generator.images(self._seed, number)
            if images.shape != self._first.shape:
                raise UserError(
                    f"{self._generator.name}: images of {number} are {list(images.shape)}, the "
                    f"first {list(self._first.shape)}"
                )
            self._kept = number, images
        return self._kept[1]

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        classes = self._generator.num_classes
        return None if classes is None else random_labels(self._seed, start, stop, classes)

    def fingerprint(self) -> str:
        return self._generator.contents


def full_target(target: str) -> str:
    """The target with the absolute path of its file, if it names one: for processes elsewhere."""
    file, colon, factory = target.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{absolute(file)}:{factory}"
    on_disk = target.endswith(_FILE_ENDINGS) or os.path.isdir(target)
    return absolute(target) if on_disk else target


@functools.cache
def load_generator(target: str, device: torch.device) -> Generator:
    """The generator that a target names, on the device, loaded once a process.

    UserError, naming --generator, for a target that is none, and for what goes wrong inside, with
    the place in the user's file.
    """
    name = f"{FLAG} {target}"
    if is_pipeline(target):
        with _telling_where(name):
            function, seen = load_pipeline(target, device, FLAG)
        return generator_of(function, device, name, seen)
    if target.endswith(_FILE_ENDINGS):
        with _telling_where(name):
            function = _load_file(target, device)
        return generator_of(function, device, name, fingerprint_file(target, flag=FLAG))
    with _telling_where(name):
        factory = load_function(target, FLAG)
        function = factory(device)
    source = getattr(inspect.getmodule(factory), "__file__", None)
    seen = fingerprint_file(source, flag=FLAG) if source else ""
    return generator_of(function, device, name, f"{target.rpartition(':')[2]}\0{seen}")


def generator_of(
    function: Callable[..., torch.Tensor], device: torch.device, name: str, seen: str = ""
) -> Generator:
    """A user's function with its attributes checked; seen: a hash of its source.

    Networks that it is or holds tell it apart, too.

    UserError, beginning with `name`, for a function that lacks `latent_shape`, and for attributes
    of other kinds than they must be.
    """
    shape = getattr(function, "latent_shape", None)
    classes = getattr(function, "num_classes", None)
    size = getattr(function, "batch_size", _IMAGES_AT_ONCE)
    if not callable(function):
        raise UserError(f"{name}: what the factory gave, {function!r}, cannot be called")
    if not isinstance(shape, (tuple, list, torch.Size)) or not all(map(_is_count, shape)):
        raise UserError(
            f"{name}: the generator needs an attribute latent_shape, such as (512,), of whole "
            f"numbers from 1, not {shape!r}"
        )
    for attribute, value in (("num_classes", classes or 1), ("batch_size", size)):
        if not _is_count(value):
            raise UserError(f"{name}: {attribute} must be a whole number from 1, not {value!r}")
    version = getattr(function, "version", "")
    parts = [seen, str(version), str(tuple(shape)), str(classes or 0), str(size)]
    with _telling_where(name):
        networks = {id(network): network for network in _networks(function)}
        parts += map(_weights, networks.values())
    contents = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Generator(function, tuple(shape), classes or None, size, device, contents, name)


def _networks(value: object, depth: int = _DEPTH) -> Iterator[torch.nn.Module]:
    """Those that a value is or holds: in attributes, in containers, and by names in its code."""
    if isinstance(value, torch.nn.Module):
        yield value
    elif depth:
        held = _held(value)
        for key in sorted(held, key=str):
            yield from _networks(held[key], depth - 1)


def _held(value: object) -> Mapping[Any, object]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    if isinstance(value, (type, types.ModuleType)):
        return {}
    held = dict(getattr(value, "__dict__", {}))  # what a decorator wraps is in it, too
    if isinstance(value, types.FunctionType):
        return {**held, **_named_in(value)}
    if type(value).__module__ == "builtins":
        return held
    # Of its class values and what is called; slots have their values in the instance.
    of_class = {
        name: one
        for base in reversed(type(value).__mro__)
        for name, one in vars(base).items()
        if name == "__call__" or not name.startswith("__")
    }
    for name, one in of_class.items():
        if isinstance(one, types.MemberDescriptorType):
            of_class[name] = getattr(value, name, None)
    return {**of_class, **held}


def _named_in(function: types.FunctionType) -> dict[str, object]:
    """What a function and those within it find in their closure and among their globals.

    An empty cell is left out: its name has no value yet, or in this case none at all.
    """
    code = [function.__code__]
    for one in code:  # grows by comprehensions, lambdas and inner functions
        code += [const for const in one.co_consts if isinstance(const, types.CodeType)]
    named = {name for one in code for name in one.co_names}
    held = {name: function.__globals__[name] for name in named & function.__globals__.keys()}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        with contextlib.suppress(ValueError):
            held[name] = cell.cell_contents
    return held


def _weights(network: torch.nn.Module) -> str:
    """A hash of its tensors, on whatever device they are."""
    tensors = {
        key: value.cpu()
        for key, value in network.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    return fingerprint(tensors)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def load_function(target: str, flag: str) -> Callable:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names.

    UserError, naming `flag`: no such module, file or function. An error inside the module passes
    through.
    """
    module_name, _, function_name = target.rpartition(":")
    if not module_name or not function_name:
        raise UserError(f"{flag}: {target!r} is not MODULE:FUNCTION, such as my_gan:load")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = getattr(_module(module_name, flag), function_name, None)
    if not callable(function):
        raise UserError(f"{flag}: {module_name} has no function {function_name}")
    return function


def _module(name: str, flag: str) -> types.ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"{flag}: cannot import {name} from {os.getcwd()}: {error}") from error
    if not Path(name).is_file():
        raise UserError(f"{flag}: there is no file {name}")
    spec = importlib.util.spec_from_file_location(absolute(name), name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where `inspect` looks for it
    spec.loader.exec_module(module)
    return module


def _load_file(path: str, device: torch.device) -> Callable[..., torch.Tensor]:
    """The network of a TorchScript or torch.export file, with what its `generator.json` says."""
    if not Path(path).is_file():
        raise UserError(f"{FLAG}: there is no file {path}")
    extra = {ABOUT_FILE: ""}
    if path.endswith(".pt2"):
        from torch.export.passes import move_to_device_pass

        program = torch.export.load(path, extra_files=extra)
        network = move_to_device_pass(program, device).module()
    else:
        network = torch.jit.load(  # type: ignore[no-untyped-call]
            path, map_location=device, _extra_files=extra
        )
    about = json.loads(extra[ABOUT_FILE] or "{}")
    return _with_attributes(network, about)


def _with_attributes(network: Callable, about: dict) -> Callable[..., torch.Tensor]:
    def call(*given: torch.Tensor) -> torch.Tensor:
        return network(*given)

    vars(call).update(about)
    return call


@contextlib.contextmanager
def _telling_where(name: str) -> Iterator[None]:
    """An error of the user's code in the block becomes one line, with the line that it is from."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except SystemExit as error:
        raise UserError(
            f"{name}: its code ended the process, as argparse does: it must not read the command "
            "line when it is imported or called"
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = str(Path(__file__).parents[1])
        library = (ours, sys.prefix, sys.base_prefix, torch.__path__[0], "<")
        own = [frame for frame in frames if not frame.filename.startswith(library)]
        where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        text = " ".join(str(error).split())
        raise UserError(f"{name}: {type(error).__name__}: {text}{where}") from error
