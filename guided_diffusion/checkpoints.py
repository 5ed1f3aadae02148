"""Reading and writing checkpoints: safely, whole or not at all, with their flags beside them.

A sidecar is a small JSON file next to a checkpoint (`model000100.json` for `model000100.pt`) that
holds the kind of network, its flags and the T' of early-stopped training. A `.safetensors` file
has the same in its metadata. A folder of diffusers is read as a checkpoint with its sidecar, too.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence

import torch

from esddpm_io.atomic import atomic_path, write_json
from esddpm_io.errors import UserError, of_type
from esddpm_io.files import exists, is_blob, open_binary
from esddpm_io.optional import import_extra
from guided_diffusion.diffusers_folder import is_diffusers, read_folder, read_tensors

KINDS = ("model", "classifier", "sr", "vae")
_NAMED = 3  # tensors that an error names, of each sort

_ZIP_MAGIC = b"PK\x03\x04"
SAFETENSORS = ".safetensors"
_METADATA_KEY = "es_ddpm"  # of the sidecar's JSON inside a safetensors file
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format's own reader


def load_object(path: str, *, flag: str) -> object:
    """Whatever `torch.save` wrote to `path`, tensors on the CPU, without running code from it.

    Tensors of a file on a disk are mapped, not read, until they are used. Raises UserError, naming
    `flag`, if the file is missing, truncated, no checkpoint, or holds more than plain data.
    """
    if str(path).endswith(SAFETENSORS):
        return _load_safetensors(path, flag=flag)
    with open_binary(path, flag=flag) as stream:
        try:
            magic = stream.read(len(_ZIP_MAGIC))
            stream.seek(0)
            is_zip = zipfile.is_zipfile(stream)
            stream.seek(0)
        except IsADirectoryError as error:
            raise UserError(f"{flag}: {path} is a folder, not a checkpoint") from error
        if magic == _ZIP_MAGIC and not is_zip:
            raise UserError(f"{flag}: {path} is truncated: fetch or copy it again")
        mapped = is_zip and not is_blob(path)
        try:
            return torch.load(
                str(path) if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped
            )
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"{flag}: {_load_problem(path, magic, error)}") from error


def _load_safetensors(path: str, *, flag: str) -> dict[str, torch.Tensor]:
    import_extra("safetensors", f"{flag}: {path}")
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    with open_binary(path, flag=flag) as stream:
        try:
            return load(stream.read()) if is_blob(path) else load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{flag}: {_load_problem(path, b'?', error)}") from error


def _metadata(path: str) -> dict:
    """Of a safetensors file: it begins with the length of a JSON text (uint64) and that text."""
    with open_binary(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        except ValueError:  # the tensors' reader says what is wrong with the file
            return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _load_problem(path: str, magic: bytes, error: Exception) -> str:
    if not magic:
        return f"{path} is empty: fetch or copy it again"
    if "GLOBAL" in str(error):
        return (
            f"{path} holds more than plain data, and loading that would run code from the file; "
            "only state dicts of tensors are read"
        )
    return f"{path} is damaged or not a checkpoint: fetch or copy it again"


def read_checkpoint(path: str, *, flag: str) -> dict[str, torch.Tensor]:
    """The state dict of a network, on the CPU; raises UserError, naming `flag`, if it is none.

    That of a training framework's {"state_dict": …} and of a DistributedDataParallel is found, and
    that of the U-Net in a folder of diffusers.
    """
    if is_diffusers(path):
        return read_tensors(path, flag=flag)
    return network_state(load_object(path, flag=flag), path, flag=flag)


def network_state(content: object, path: str, *, flag: str) -> dict[str, torch.Tensor]:
    """`read_checkpoint` of what is in the file already."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, dict) and content.keys() == {"state", "param_groups"}:
        raise UserError(
            f"{flag}: {path} is the state of an optimiser; the network is in the model… or ema… "
            "file beside it"
        )
    if not _is_state_dict(content):
        parts = content if isinstance(content, dict) else {}
        inside = [name for name, part in parts.items() if _is_state_dict(part)]
        advice = f"; it holds {', '.join(inside)}: save one of them alone" if inside else ""
        raise UserError(f"{flag}: {path} is not a state dict (names with their tensors){advice}")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) for name in content)
        and all(isinstance(value, torch.Tensor) for value in content.values())
    )


def load_weights(model: torch.nn.Module, path: str, *, flag: str) -> None:
    """Load the state dict at `path` into `model`.

    Raises UserError if names or shapes differ: it names some of the tensors, the published
    checkpoint that the file looks like, and the flags that would fit.
    """
    state_dict = read_checkpoint(path, flag=flag)
    check_fit(model, state_dict, path, flag=flag)
    model.load_state_dict(state_dict)


def check_fit(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], path: str, *, flag: str
) -> None:
    """UserError, as of `load_weights`, unless `state_dict` has the names and shapes of `model`."""
    problems = _differences(model.state_dict(), state_dict)
    if problems:
        raise UserError(
            f"{flag}: {path} does not fit the model flags: {'; '.join(problems)}"
            f"{_what_fits(path, state_dict)}"
        )


def fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors' names, dtypes, shapes and bytes, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _differences(
    expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> list[str]:
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    reshaped = [
        f"{name} is {_shape(given[name])} and not {_shape(expected[name])}"
        for name in expected
        if name in given and expected[name].shape != given[name].shape
    ]
    return [
        f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for names, what in (
            (missing, "missing"),
            (surplus, "too many"),
            (reshaped, "of another shape"),
        )
        if names
    ]


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _what_fits(path: str, state_dict: Mapping[str, torch.Tensor]) -> str:
    from guided_diffusion.settings.recognition import Recognised, identify

    sidecar = read_sidecar(path)
    if sidecar is not None and sidecar["kind"] in ("model", "classifier", "sr"):
        found = Recognised(sidecar["kind"], sidecar["flags"], sidecar["flags"])
        return f". Its sidecar says it is a {_KIND_NAMES[found.kind]}: {found.command_line()}"
    if sidecar is not None:
        return f". Its sidecar says it is a {sidecar['kind']}"
    found = identify(state_dict)
    if found is None:
        return ". No flags of ours build such a network"
    like = f" like {_either(found.published)}" if found.published else ""
    unknown = f" (shapes do not tell {', '.join(found.open_flags)})" if found.open_flags else ""
    flags = found.command_line() or "the default flags"
    return f". It looks like a {_KIND_NAMES[found.kind]}{like}: {flags}{unknown}"


_KIND_NAMES = {
    "model": "diffusion model",
    "classifier": "classifier",
    "sr": "super-resolution model",
}


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def save_checkpoint(obj: object, path: str, sidecar: Mapping[str, object] | None = None) -> None:
    """`torch.save`, atomically; or, for a name in .safetensors, a state dict with its sidecar."""
    with atomic_path(path) as temporary:
        if str(path).endswith(SAFETENSORS):
            _save_safetensors(obj, str(temporary), sidecar)
            return
        try:
            with open(temporary, "wb") as stream:
                torch.save(obj, stream)
        except RuntimeError as error:
            # torch's zip writer fails in its own words after the error of the disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _save_safetensors(obj: object, path: str, sidecar: Mapping[str, object] | None) -> None:
    if not _is_state_dict(obj):
        raise ValueError("only a state dict of tensors can be written as safetensors")
    import_extra("safetensors", "a .safetensors file")
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in obj.items()}
    save_file(tensors, path, {_METADATA_KEY: json.dumps(sidecar)} if sidecar else None)


def sidecar_path(path: str) -> str:
    """Where the sidecar of the checkpoint at `path` is."""
    return os.path.splitext(path)[0] + ".json"


def write_sidecar(
    path: str,
    flags: Mapping[str, object],
    *,
    kind: str = "model",
    early_stop_steps: int | None = None,
) -> None:
    """Write the sidecar of the checkpoint at `path`.

    `kind` is one of KINDS; `early_stop_steps` is T' if the network was trained on t < T' only.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    content = {"kind": kind, "flags": dict(flags), "early_stop_steps": early_stop_steps}
    write_json(sidecar_path(path), content)


def read_sidecar(path: str) -> dict | None:
    """The sidecar of the checkpoint at `path` (kind, flags, early_stop_steps), None without one.

    A file beside it goes before the metadata of a .safetensors file. That of a folder of diffusers
    says what its configs say, with the kind "diffusers".
    """
    if is_diffusers(path):
        return read_folder(path)
    sidecar = sidecar_path(path)
    if exists(sidecar):
        with open_binary(sidecar) as stream:
            text = stream.read()
    elif str(path).endswith(SAFETENSORS) and exists(path):
        sidecar = f"the metadata of {path}"
        text = _metadata(path).get(_METADATA_KEY)
    else:
        text = None
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{sidecar} is not valid JSON: {error}") from error
    content = {"early_stop_steps": None, **content} if isinstance(content, dict) else {}
    if (
        content.keys() != {"kind", "flags", "early_stop_steps"}
        or content["kind"] not in KINDS
        or not isinstance(content["flags"], dict)
    ):
        raise UserError(
            f"{sidecar} is not the sidecar of a checkpoint: move it away, or write it like "
            '{"kind": "model", "flags": {"noise_schedule": "linear"}, "early_stop_steps": null}, '
            f"kind one of {', '.join(KINDS)}"
        )
    of_type(f"{sidecar}: early_stop_steps", content["early_stop_steps"], int | None)
    return content
