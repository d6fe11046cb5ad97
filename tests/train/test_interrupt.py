from __future__ import annotations

import os
import signal
import threading

import pytest

from minigpt.train.interrupt import StopRequest, TrainingInterruptedError


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested and stop.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_ctrl_c_aborts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was ignored")


def test_ctrl_c_after_sigterm_aborts_and_a_second_sigterm_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_get_no_handler_and_no_error() -> None:
    requested = []

    def work() -> None:
        with StopRequest() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]


def test_the_exit_code_is_the_shells() -> None:
    assert TrainingInterruptedError(signal.SIGINT, "x").exit_code == 130
    assert TrainingInterruptedError(signal.SIGTERM, "x").exit_code == 143
