"""Addresses of the Hub, and packages that may be missing."""

import sys

import pytest

from esddpm_io.errors import UserError
from esddpm_io.hub import fetched
from esddpm_io.optional import import_extra


def test_paths_are_left_alone():
    assert fetched("folder/model.pt") == "folder/model.pt"


@pytest.mark.parametrize("address", ["hf://owner", "hf://owner/name@", "hf://a/b/c", "hf:///name"])
def test_what_is_no_address_is_told(address):
    with pytest.raises(UserError, match=f"^--model_path: {address} is not of the form hf://owner"):
        fetched(address)


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf://me/it needs .* huggingface_hub: pip install 'es-dd"):
        fetched("hf://me/it")
    with pytest.raises(UserError, match="x needs the package no_such_package"):
        import_extra("no_such_package", "x")
