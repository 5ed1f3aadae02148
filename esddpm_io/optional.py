"""Packages that not everybody needs."""

import importlib
import types

from esddpm_io.errors import UserError


def import_extra(
    package: str, what: str, install: str = "'es-ddpm[diffusers]'"
) -> types.ModuleType:
    """A package, loaded now; UserError that says `what` needs it, and how to get it, if missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.rpartition(".")[2]
        raise UserError(f"{what} needs the package {name}: pip install {install}") from error
