"""What the tests of all command lines share."""

import signal

import pytest


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """The command lines set handlers: give pytest its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
