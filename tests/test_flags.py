"""Options in messages: from the command line the flag and nothing of Python's, from Python the argument and the flag."""
import re
from pathlib import Path

import pytest

from minilora.flags import on_command_line, option

PACKAGE = Path(__file__).resolve().parents[1] / "minilora"


def test_an_option_is_named_as_the_reader_types_it():
    assert option("resume=True", "--resume") == "resume=True (--resume)"
    with pytest.raises(ZeroDivisionError), on_command_line():
        assert option("resume=True", "--resume") == "--resume"
        1 / 0
    assert option("a=1", "--a 1") == "a=1 (--a 1)"


def test_no_message_spells_both_by_itself():
    """``name=value (--flag ...)`` in one text is what `option` is for."""
    both = re.compile(r"\w=[^ (]+,? (\(--[a-z]|on the command line)")
    found = [f"{path.relative_to(PACKAGE)}: {line.strip()}" for path in PACKAGE.rglob("*.py") if path.name != "flags.py"
             for line in path.read_text(encoding="utf-8").split("\n") if both.search(line)]
    assert not found
