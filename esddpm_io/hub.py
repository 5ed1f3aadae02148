"""Models of the Hugging Face Hub as folders."""

import functools
import re

from esddpm_io.errors import UserError, first_line
from esddpm_io.optional import import_extra

HUB = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# What of a repository is fetched: no images, optimiser states or weights of other frameworks.
_FETCHED = ["*.json", "*.safetensors", "*.bin"]


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
