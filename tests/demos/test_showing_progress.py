"""One line that is drawn again on a terminal, a plain line now and then elsewhere, and never an exception."""
import doctest
import io
import os
import re
import types

import demo_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st

progress = demo_runs.piece("progress")
Progress = progress.Progress


class Clock:
    """Stands in for the module `time`: a second passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True

    def lines(self):
        return [line for line in self.getvalue().split("\r") if line.strip()]


def resize(monkeypatch, columns):
    monkeypatch.setattr(Terminal, "fileno", lambda self: 0)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda number: os.terminal_size((columns, 24)))


def test_doctest():
    assert doctest.testmod(progress).attempted and not doctest.testmod(progress).failed


def test_plain_lines_are_sparse_and_the_last_one_always_comes(clock):
    stream = io.StringIO()
    with Progress("training", 100, interval=10.0, stream=stream) as bar:
        for step in range(1, 101):
            clock.now += 0.25
            bar.advance(text=f"loss {step}")
    assert stream.getvalue().splitlines() == [
        "training  loss 40  0:15 left  4.0 steps/s", "training  loss 80  0:05 left  4.0 steps/s",
        "training  loss 100  in 0:25  4.0 steps/s"]


def test_interval_0_prints_every_advance_and_inf_only_the_end(clock):
    for interval, count in ((0, 5), (float("inf"), 1)):
        stream = io.StringIO()
        bar = Progress("x", 5, "rows", interval, stream)
        for _ in range(5):
            clock.now += 1.0
            bar.advance()
        assert len(stream.getvalue().splitlines()) == count
        assert stream.getvalue().endswith("x  in 0:05  1.0 rows/s\n")


def test_a_terminal_gets_one_line_which_is_removed(clock):
    stream = Terminal()
    with Progress("training", 100, stream=stream) as bar:
        for step in range(100):
            clock.now += 0.03
            bar.advance(text=f"loss {step}")
    shown = stream.getvalue()
    assert "\n" not in shown and shown.endswith(" \r")
    assert 20 < len(stream.lines()) < 30  # ten a second, not one for each step
    assert re.fullmatch(r"training: \d+%\|#+ *\| 0:0\d left, 33.3 steps/s, loss \d+", stream.lines()[-1].rstrip())


def test_what_goes_first_where_there_is_no_room(clock, monkeypatch):
    def shown(columns):
        resize(monkeypatch, columns)
        stream = Terminal()
        bar = Progress("training", 10, stream=stream)
        clock.now += 5.0
        bar.advance(5, "epoch 5/10  loss 0.125")
        (line,) = stream.lines()
        assert len(line) <= columns - 1
        return line
    assert shown(80) == "training: 50%|########         | 0:05 left, 1.0 steps/s, epoch 5/10  loss 0.125"
    assert shown(66) == "training: 50%, 0:05 left, 1.0 steps/s, epoch 5/10  loss 0.125"
    assert shown(60) == "training: 50%, 0:05 left, epoch 5/10  loss 0.125"
    assert shown(40) == "training: 50%, epoch 5/10  loss 0.125"
    assert shown(30) == "epoch 5/10  loss 0.125"
    assert shown(11) == "loss 0.125"


def test_a_terminal_that_grows_smaller_is_asked_each_time(clock, monkeypatch):
    stream, bar = Terminal(), None
    for columns in (100, 50):
        resize(monkeypatch, columns)
        bar = bar or Progress("training", 10, stream=stream)
        clock.now += 5.0
        bar.advance(2, "loss 0.125")
    assert [len(line.rstrip()) < columns for line, columns in zip(stream.lines(), (100, 50))] == [True, True]


@given(label=st.text(max_size=50), text=st.text(max_size=120), total=st.integers(-2, 50), amounts=st.lists(st.integers(-1, 30)),
       unit=st.text(max_size=30), terminal=st.booleans())
def test_whatever_it_is_given_it_stays_within_a_line(label, text, total, amounts, unit, terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress(label, total, unit, 0, stream) as bar:
        for amount in amounts:
            bar.advance(amount, text)
    lines = stream.getvalue().split("\r" if terminal else "\n")
    assert all(len(line) <= 80 - terminal and line.isprintable() for line in lines)
    assert terminal or len(lines) == len(amounts) + 1


def test_letters_that_the_stream_has_not():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")  # kept: it would close what it wraps
    Progress("Zürich", 1, stream=stream).advance(text="Verlust → 0")
    assert raw.getvalue().startswith(b"Z?rich  Verlust ? 0  ")


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")])
def test_a_stream_that_fails_ends_the_display_and_not_the_loop(error):
    stream = Broken(error)
    with Progress("training", 3, interval=0, stream=stream) as bar:
        for _ in range(3):
            bar.advance(text="loss")
    assert (bar.done, stream.calls) == (3, 1)


def test_no_stream_and_a_closed_one(monkeypatch):
    closed = io.StringIO()
    closed.close()
    with Progress("training", 1, interval=0, stream=closed) as bar:
        bar.advance()
    monkeypatch.setattr(progress.sys, "stderr", None)  # as pythonw has it
    with Progress("training", 1, interval=0) as bar:
        bar.advance()


def test_ctrl_c_goes_through_and_the_line_is_removed():
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        with Progress("training", 10, stream=stream) as bar:
            bar.advance(text="loss 1")
            raise KeyboardInterrupt
    assert stream.getvalue().endswith(" \r")


def test_ctrl_c_in_the_middle_of_the_writing():
    class Interrupted(Terminal):
        def write(self, text):
            super().write(text)
            if "loss" in text:
                raise KeyboardInterrupt

    stream = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        with Progress("training", 10, stream=stream) as bar:
            bar.advance(text="loss 1")
    assert stream.getvalue().endswith(" \r")


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
