"""What goes to a terminal fits it, what goes elsewhere stays as it is, nothing is lost, and no line to type is broken."""
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import terminal
from minilora.tables import table
from minilora.terminal import columns_of, fitting, room, wrapped


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_how_wide(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    closed = Terminal()
    closed.close()
    assert columns_of(Terminal()) == 80  # it has no file behind it
    assert columns_of(io.StringIO()) is None and columns_of(None) is None and columns_of(object()) is None
    monkeypatch.setattr(Terminal, "fileno", lambda self: 0)
    for said, taken in ((120, 120), (60, 60), (0, 80), (7, 40)):
        monkeypatch.setattr(terminal.os, "get_terminal_size", lambda number: os.terminal_size((said, 24)))
        assert columns_of(Terminal()) == taken
    for given_, taken in (("100", 100), ("", 7), ("wide", 7), ("0", 80), ("-1", 7)):
        monkeypatch.setenv("COLUMNS", given_)
        assert columns_of(Terminal()) == max(taken, 40), given_
    assert columns_of(io.StringIO()) is None


def test_a_closed_stream_is_no_terminal():
    stream = io.StringIO()
    stream.close()
    assert columns_of(stream) is None


@given(words=st.lists(st.text("ab.,", min_size=1, max_size=30), max_size=20), columns=st.integers(40, 120))
def test_words_stay_in_order_and_lines_fit(words, columns):
    text = " ".join(words)
    lines = wrapped(text, columns).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(text.split()) and max(map(len, lines)) <= columns
    assert wrapped(text, None) == text


def test_what_is_short_stays_and_a_long_word_is_whole():
    assert wrapped("  a   b\n\n c", 40) == "  a   b\n\n c"
    path = "/a" * 40
    assert wrapped(f"written to {path} and that is all", 40) == f"written to\n  {path}\n  and that is all"


def test_below_a_label():
    found = wrapped("sizes   one, two, three, four, five, six, seven", 40)
    assert found == "sizes   one, two, three, four, five,\n        six, seven"
    deep = "    note: a line that already stands a bit to the right"
    assert wrapped(deep, 40) == "    note: a line that already stands a\n      bit to the right"


@pytest.mark.parametrize("command", [
    "python -m pip install 'minilora[gpu13]'", "pip install 'minilora[models]'", "minilora merge base adapter -o out --force",
    "python demos/rank_sweep.py --lr 0.001 --n 20", "chmod u+w '/a folder/with a name'", "mpiexec -n 4 minilora train ...",
    "python -c \"import torch, os; print(1)\"", "minilora quantize BASE -o OUT --kind nf4"])
@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_line_to_type_is_never_broken(command, columns):
    for text in (f"there is something in the way of it: {command}", f"so type {command}; or do not, and live with it",
                 f"what helps is this: {command} (or another of the kind), or nothing", f"run `{command}` in that folder",
                 f"it is gone, {command}. Then begin anew, please, with what is left", f"x  reads it after:  {command}"):
        shown = wrapped(text, columns)
        assert command in shown and " ".join(shown.split()) == " ".join(text.split())
        assert all(len(line) <= columns for line in shown.split("\n") if command not in line)
        assert all(len(line) <= max(columns, len(command) + 12) for line in shown.split("\n"))


def test_a_sentence_about_a_program_is_no_command():
    text = "this is an old file, minilora reads no pickles, since reading one runs whatever is in it"
    assert max(map(len, wrapped(text, 40).split("\n"))) <= 40


# -- tables -----------------------------------------------------------------------------------------------------------


HEAD = ("layer", "n", "shape", "")
ROWS = [(f"model.layers.{i}.self_attn.q_proj.weight", str(i), "16 x 16", "same") for i in range(3)]


def test_a_table_is_as_wide_as_it_is_where_nobody_asks():
    lines = table([HEAD, *ROWS], (0, 3))
    assert room() is None and lines[1] == "-" * 56 and lines[2] == "model.layers.0.self_attn.q_proj.weight  0  16 x 16  same"
    with fitting(80):
        assert table([HEAD, *ROWS], (0, 3)) == lines
    with fitting(40), fitting(None):
        assert table([HEAD, *ROWS], (0, 3)) == lines


def test_names_are_shortened_in_the_middle():
    with fitting(50):
        lines = table([HEAD, *ROWS], (0, 3))
    assert max(map(len, lines)) == 50 and lines[2] == "model.layers.0...n.q_proj.weight  0  16 x 16  same"


def test_names_that_would_be_the_same_are_not_shortened():
    rows = [("a" * i + "b" + "a" * (44 - i), "1", "16 x 16", "same") for i in range(45)]
    with fitting(50):
        lines = table([HEAD, *rows], (0, 3))
    assert max(map(len, lines)) <= 50 and all(row[0] in "\n".join(lines) for row in rows)


def test_a_text_at_the_end_is_broken():
    with fitting(46):
        lines = table([("name", "about"), ("first", "it does this and that, and then the other thing"), ("b", "no")], (0, 1))
    assert lines[2:] == ["first  it does this and that, and then the", "       other thing", "b      no"]


def test_a_row_in_several_lines():
    head, row = ("layer", *(f"column {i}" for i in range(9))), ("model.layers.0", *(f"{i}.000" for i in range(9)))
    for columns in (40, 60, 80):
        with fitting(columns):
            lines = table([head, row], (0,))
        rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})
        assert max(map(len, lines)) <= columns and len(lines) == 2 * rule + 1 > 3
        assert " ".join(" ".join(lines[:rule]).split()) == " ".join(head) and " ".join(lines[rule + 1:]).split() == list(row)


CELLS = st.text("ab ", max_size=20).map(str.strip)


@given(rows=st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)),
       left=st.sets(st.integers(0, 4)), columns=st.integers(40, 100))
def test_any_table_fits(rows, left, columns):
    with fitting(columns):
        lines = table(rows, left)
    assert max(map(len, lines)) <= columns
