"""Ctrl-C and SIGTERM: written down, obeyed once, and what the program had for them respected."""
import signal
import subprocess
import sys
import threading

import pytest

from minilora.train import interruption
from minilora.train.interruption import Interrupted, Interruption

CHILD = """
import time
from minilora.train.interruption import Interruption
with Interruption() as stop:
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not stop.asked and time.monotonic() < deadline:
        time.sleep(0.005)
    print("asked", stop.asked, flush=True)
"""


@pytest.fixture(autouse=True)
def handlers():
    """Set the handlers back that a test sets; gives a function to set them."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield signal.signal
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_process_that_gets_a_signal_ends_after_what_it_does(number):
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == "asked True\n" and "Interrupted: interrupted" in err and process.returncode


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_is_written_down_and_raised_at_the_end(number):
    done = []
    with pytest.raises(Interrupted), Interruption() as stop:
        assert not stop.asked
        send(number)
        done.append(stop.asked)
    assert done == [True]


def test_several_of_sigterm_are_one():
    with pytest.raises(Interrupted), Interruption() as stop:
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)  # and a first Ctrl-C is no second one
    assert stop.asked


def test_ctrl_c_that_comes_twice_in_a_moment_is_one():
    with pytest.raises(Interrupted), Interruption():
        send(signal.SIGINT, signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "ONE", 0.0)
    with pytest.raises(KeyboardInterrupt, match="twice") as caught, Interruption():
        send(signal.SIGINT, signal.SIGINT)
        pytest.fail("it went on")
    assert not isinstance(caught.value, Interrupted)


def test_a_signal_that_is_ignored_stays_ignored(handlers):
    handlers(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as stop:
        send(signal.SIGINT)
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_of_the_program_is_called_in_the_end(handlers):
    calls = []
    handlers(signal.SIGTERM, lambda number, frame: calls.append(number))
    with pytest.raises(Interrupted), Interruption():
        send(signal.SIGTERM)
        assert not calls
    assert calls == [signal.SIGTERM]


def test_a_handler_that_ends_the_program_does_so(handlers, monkeypatch):
    for number in interruption.SIGNALS:
        handlers(number, lambda number, frame: sys.exit(77))
    for number in interruption.SIGNALS:
        with pytest.raises(SystemExit, match="77"), Interruption():
            send(number)
    monkeypatch.setattr(interruption, "ONE", 0.0)
    with pytest.raises(SystemExit, match="77"), Interruption():
        send(signal.SIGINT, signal.SIGINT)


def test_handlers_are_as_before_afterwards():
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    with Interruption() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._note
    assert {number: signal.getsignal(number) for number in before} == before
    with pytest.raises(ZeroDivisionError), Interruption():
        send(signal.SIGTERM)
        1 / 0  # and it is this error that comes out
    with pytest.raises(Interrupted), Interruption():
        send(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_nothing_is_set_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGINT), []

    def run():
        with Interruption() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.asked))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_one_inside_another():
    """A run within a run, of a search over settings say: the inner one ends, then the outer one."""
    with pytest.raises(Interrupted), Interruption() as outer:
        with pytest.raises(Interrupted), Interruption():
            send(signal.SIGINT)
        assert outer.asked
