"""The example of every verb runs, and every verb's help is one screen."""
import json
import shlex
from pathlib import Path

import pytest

from minilora.cli.main import VERBS, main, verb_named

# verb: packages without which its example cannot run
NEEDS = {verb: ["tokenizers"] for verb in ("train", "eval", "generate", "embed")}

SCHEMAS = Path(__file__).resolve().parents[1] / "data" / "command_line_schemas.json"  # the keys that every report has


@pytest.fixture(autouse=True)
def a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_runs(verb, there, capsys):
    for package in NEEDS.get(verb, ()):
        pytest.importorskip(package)
    lines = [line for line in verb_named(verb).EPILOG.splitlines() if line.startswith("  minilora ")]
    assert lines, "an EPILOG has a line that begins with '  minilora '"
    assert any(shlex.split(line)[1] == verb for line in lines)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == verb and "--json" not in words:
            words.append("--json")
        assert main(words) == 0, (line, capsys.readouterr())
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err  # not on a terminal
        if words[0] == verb:
            check_schema(verb, json.loads(out))


def check_schema(verb, report):
    """Whoever reads the object relies on its keys: another number of the schema if one goes."""
    assert report["schema"] == f"minilora.{verb}/1"
    stored = json.loads(SCHEMAS.read_text())[report["schema"]]
    assert any(set(keys) <= report.keys() for keys in stored), list(report)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_one_screen(verb, capsys):
    assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30, f"{len(lines)} lines"
    assert max(map(len, lines)) <= 120


def test_the_overview_is_one_screen(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
