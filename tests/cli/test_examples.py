"""The example of every verb runs, and every verb's help is one screen."""
import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from minilora.cli.main import VERBS, main, verb_named

# verb: packages without which its example cannot run
NEEDS = {verb: ["tokenizers"] for verb in ("train", "eval", "generate", "embed")}

SCHEMAS = Path(__file__).resolve().parents[1] / "data" / "command_line_schemas.json"  # the keys that every report has


@pytest.fixture(autouse=True)
def a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("verb", ["check", "train", "eval", "embed"])  # the others: test_verb_imports.py
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_what_a_terminal_shows_fits_it(verb, columns, there, monkeypatch):
    for package in NEEDS.get(verb, ()):
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # a picture takes a second
    monkeypatch.setenv("COLUMNS", str(columns))
    line = next(line for line in verb_named(verb).EPILOG.splitlines() if line.startswith(f"  minilora {verb}"))
    out, err = Terminal(), Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(shlex.split(line)[1:]) == 0, err.getvalue()
    for part in re.split("[\n\r]", out.getvalue() + err.getvalue()):
        assert len(part) <= columns or part.strip().startswith("minilora "), part


def test_an_error_is_broken_into_lines_on_a_terminal_only(there, capsys, monkeypatch):
    words = ["merge", "base", "adapter", "-o", "merged", "--dequantize", "float32", "--quiet"]
    assert main(words) == 1
    plain = capsys.readouterr().err
    assert max(map(len, plain.split("\n"))) > 80
    err = Terminal()
    with contextlib.redirect_stderr(err):
        assert main(words) == 1
    assert max(map(len, err.getvalue().split("\n"))) <= 80 and err.getvalue().split() == plain.split()


def test_json_on_a_terminal_is_that_of_a_pipe(there, capsys):
    words = ["diff", "adapter", "other", "--json"]
    assert main(words) == 3
    plain = capsys.readouterr().out
    out = Terminal()
    with contextlib.redirect_stdout(out):
        assert main(words) == 3
    assert out.getvalue() == plain


def test_a_piped_table_cuts_no_name(there, capsys):
    assert main(["diff", "adapter", "adapter"]) == 0
    assert "\nmodel.layers.0.self_attn.q_proj  " in capsys.readouterr().out


def check_schema(verb, report):
    """Whoever reads the object relies on its keys: another number of the schema if one goes."""
    assert report["schema"] == f"minilora.{verb}/1"
    stored = json.loads(SCHEMAS.read_text())[report["schema"]]
    assert any(set(keys) <= report.keys() for keys in stored), list(report)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_one_screen(verb, capsys):
    assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40, f"{len(lines)} lines"
    assert max(map(len, lines)) <= 80


def test_the_overview_is_one_screen(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_the_config_of_the_example_can_be_given_back(verb, there, capsys):
    pytest.importorskip("tomllib")
    for line in verb_named(verb).EPILOG.splitlines():
        if not line.startswith(f"  minilora {verb}"):
            continue
        assert main([*shlex.split(line, comments=True)[1:], "--print-config"]) == 0, capsys.readouterr()
        printed = capsys.readouterr().out
        (there / "c.toml").write_text(printed)
        assert main([verb, "--config", "c.toml", "--print-config"]) == 0, capsys.readouterr()
        assert capsys.readouterr().out == printed
