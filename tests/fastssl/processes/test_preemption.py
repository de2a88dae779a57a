"""Which signals are remembered, and from when on."""

import os
import signal

import pytest

from fastssl.processes.preemption import StopRequest


@pytest.fixture
def default_signals():
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
def test_usr1_is_remembered_at_once_and_term_when_the_training_is_built():
    request = StopRequest()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert request.name is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request.name == "SIGUSR1"
    request.listen_to_sigterm()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # or this process would end
        os.kill(os.getpid(), number)
    assert request.name == "SIGUSR1"


@pytest.mark.usefixtures("default_signals")
def test_signals_do_what_they_did_before_when_the_listening_is_over():
    with StopRequest() as request:
        request.listen_to_sigterm()
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
