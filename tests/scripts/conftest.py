"""What the tests of all command lines share."""

import signal

import pytest

from tests.tiny_sampling import TinyFiles


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyFiles:
    """Tiny networks and images, and tiny.toml that names them."""
    files = TinyFiles(tmp_path_factory.mktemp("tiny"))
    files.preset()
    return files


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """The command lines set handlers: give pytest its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
