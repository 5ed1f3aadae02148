"""Models of the Hugging Face Hub as folders, and the optional packages that read them."""

import functools
import importlib
import re
import types

from esddpm_io.errors import UserError, first_line

HUB = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# What of a repository is fetched: no images, optimiser states or weights of other frameworks.
_FETCHED = ["*.json", "*.safetensors", "*.bin"]


def import_extra(package: str, what: str) -> types.ModuleType:
    """A package of the extra [diffusers]; UserError that says `what` needs it if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {package}: pip install 'es-ddpm[diffusers]'"
        ) from error


@functools.cache
def fetched(path: str, *, flag: str = "--model_path") -> str:
    """The folder of an address `hf://owner/name[@revision]` in the Hub's cache; other paths as is.

    What is not in the cache is downloaded. The folder is named by its commit, so that a run keeps
    what it began with. UserError, naming `flag`, for what is no address or cannot be fetched.
    """
    if not path.startswith(HUB):
        return path
    address = _ADDRESS.fullmatch(path)
    if address is None:
        raise UserError(f"{flag}: {path} is not of the form hf://owner/name[@revision]")
    hub = import_extra("huggingface_hub", f"{flag}: {path}")
    name, revision = address.groups()
    try:
        return hub.snapshot_download(name, revision=revision, allow_patterns=_FETCHED)
    except (OSError, ValueError) as error:  # its own errors are kinds of these
        raise UserError(f"{flag}: cannot fetch {path}: {first_line(error)}") from error
