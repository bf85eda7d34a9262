"""docs/command_line.md: all verbs, and its commands run."""
import json
import re
import shlex
from pathlib import Path

import pytest

from minilora.cli import terms
from minilora.cli.main import VERBS, main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_has_every_verb_in_the_order_of_the_help():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(VERBS)


def test_the_table_has_every_exit_code():
    codes = {value for name in terms.__all__ if type(value := getattr(terms, name)) is int}
    assert set(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE))) == codes


def test_the_session_runs(there, capsys):
    (session, shown) = blocks("console")
    for line in session.splitlines() + shown.splitlines()[:1]:
        assert main(shlex.split(line.removeprefix("$ "))[1:]) == 0, (line, capsys.readouterr())
        out, _ = capsys.readouterr()
    for line in shown.splitlines()[1:-1]:
        assert line in out.splitlines() or "ada76cd0" in line, line


def test_the_config_is_taken(tmp_path, capsys):
    pytest.importorskip("tomllib")
    (toml,) = blocks("toml")
    (tmp_path / "run.toml").write_text(toml)
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--rank", "16", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {'model = "base"', 'data = "data"', "rank = 16", "learning-rate = 0.0002"} <= set(lines)


def test_the_object_is_one():
    (text,) = blocks("json")
    assert json.loads(text)["schema"] == "minilora.diff/1"
