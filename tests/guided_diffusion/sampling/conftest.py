"""One set of tiny models and images for all tests of the engine."""

import signal

import pytest

from tests.tiny_sampling import TinyFiles


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyFiles:
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """The command lines set a handler for SIGTERM: give pytest its own back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
