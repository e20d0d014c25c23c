"""Law: an interrupt that comes while something must not be cut short acts when that is done, and
not at all where none came.
"""

import os
import signal
import threading

import pytest

from finrepro.runtime.interrupts import HELD, held_back


@pytest.fixture(autouse=True)
def as_in_a_campaign():
    """Started in the background, a process ignores SIGINT."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in HELD}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_acts_at_the_end(number: signal.Signals):
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), number)
        done.append("whole")
    assert done == ["whole"]
    with pytest.raises(KeyboardInterrupt):  # and the handlers are those of before
        os.kill(os.getpid(), number)


def test_without_one_nothing_happens_and_a_fault_comes_through():
    with held_back():
        pass
    with pytest.raises(ValueError, match="own"), held_back():
        raise ValueError("own")


def test_it_acts_also_after_a_fault_that_somebody_would_handle():
    with pytest.raises(KeyboardInterrupt), held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("own")


def test_it_waits_for_the_outer_one():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
        done.append("whole")
    assert done == ["whole"]


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with held_back():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
