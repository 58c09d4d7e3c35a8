import signal

import pytest

from engine.process import stop_on_signal


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_handlers_are_put_back(kind):
    before = signal.getsignal(kind)
    asked = []
    with stop_on_signal(lambda: asked.append(1)):
        signal.raise_signal(kind)
        assert asked == [1]
    assert signal.getsignal(kind) == before


def interrupt_twice():
    with stop_on_signal(lambda: None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_interrupts():
    # A shell starts what runs in its background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)
