"""The frame of the command line, with a verb that exists for these tests alone."""
import argparse
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from minilora.cli import main as front, options, output
from minilora.cli.main import main
from minilora.errors import ConfigError, DivergedError

EPILOG = "example:\n  minilora toy base adapter=0.5 -o new"


def add_arguments(parser):
    parser.add_argument("base", metavar="BASE", type=Path)
    parser.add_argument("adapters", metavar="ADAPTER[=WEIGHT]", nargs="+", type=options.weighted)
    options.add_output(parser)
    options.add_json(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=int, help="100 %% of them")
    group.add_argument("--energy", type=float)
    parser.add_argument("--target", nargs="+", default=["q", "v"])
    parser.add_argument("--layer", action="append")
    parser.add_argument("--method", choices=("cat", "svd"), default="cat")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--name", default="naïve \"x\"\\\x07")


def run(args):
    if args.name == "raise":
        raise RAISED[0]
    output.say(args, "a note\x1b[2J")
    output.show(args, {key: str(v) if key in ("base", "adapters") else v for key, v in vars(args).items()},
                f"{args.rank}\n{args.name}")
    return 0


RAISED = []


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    module = types.ModuleType("minilora.cli.toy")
    module.EPILOG, module.add_arguments, module.run = EPILOG, add_arguments, run
    monkeypatch.setitem(sys.modules, "minilora.cli.toy", module)
    monkeypatch.setattr(front, "VERBS", {"toy": "try the frame", "train": "an other verb"})


FULL = ["toy", "base", "a", "-o", "out", "--rank", "3"]


def reported(capsys, *words):
    assert main(["toy", *map(str, words), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_output_goes_where_it_belongs(capsys):
    assert main([*FULL, "--name", "é\x1b[31m\u202e"]) == 0
    assert capsys.readouterr() == ("3\né\\x1b[31m\\u202e\n", "a note\\x1b[2J\n")


def test_json_is_one_object_with_a_schema(capsys):
    report = reported(capsys, "base", "a", "-o", "out", "--energy", "nan")
    assert report["schema"] == "minilora.toy/1" and report["energy"] is None and report["out"] == "out"
    assert report["words"][:2] == ["base", "a"]


def test_words_may_stand_on_both_sides_of_the_output(capsys):
    report = reported(capsys, "base", "a=0.5", "-o", "out", "b=-2", "--rank", 1)
    assert report["adapters"] == str([(Path("a"), 0.5), (Path("b"), -2.0)])


@pytest.mark.parametrize(("words", "status", "said"), [
    ([], 2, "verbs: toy, train"),
    (["tyo"], 2, "there is no verb 'tyo': did you mean 'toy'?"),
    (["--json"], 2, "the verb comes first"),
    (["\x1b[2J"], 2, "'\\x1b[2J'"),
    (["toy"], 2, "usage: minilora toy BASE ADAPTER[=WEIGHT]... -o OUT [options]"),
    ([*FULL, "--rnak", "3", "--methd=svd"], 2, "no option --rnak: did you mean '--rank'?; there is no option --methd: did"),
    (["toy", "--otu", "x"], 2, "--out"),
    ([*FULL, "--rank", "x"], 2, "invalid int value"),
    ([*FULL, "--energy", "1"], 2, "not allowed with argument"),
    ([*FULL, "--method", "svt"], 2, "invalid choice"),
    ([*FULL, "-z"], 2, "-z"),
    (["toy", "base", "a=x", "-o", "out", "--rank", "3"], 2, "expected ADAPTER or ADAPTER=WEIGHT"),
    (["toy", "base", "a=nan", "-o", "out", "--rank", "3"], 2, "finite"),
    (["toy", "base", "a", "-o", "out"], 2, "missing: --rank or --energy"),
    (["toy", "base"], 2, "missing: ADAPTER[=WEIGHT], -o OUT, --rank or --energy\nusage"),
    ([*FULL, "--config"], 2, "expected one argument"),
    ([*FULL, "--config", "missing.toml"], 1, "missing.toml: No such file"),
    ([*FULL, "--config", "x.yaml"], 2, ".toml or .json"),
])
def test_what_is_wrong_is_told(words, status, said, capsys):
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == "" and said in err and "\x1b" not in err and "Traceback" not in err


@pytest.mark.parametrize(("error", "status", "said"), [
    (ConfigError("one\nand \x1b[1m"), 1, "minilora toy: one\nand \\x1b[1m\n"),
    (DivergedError("nan"), 4, "minilora toy: nan\n"),
    (KeyboardInterrupt(), 130, "minilora toy: interrupted\n"),
    (KeyboardInterrupt("go on with: x"), 130, "minilora toy: go on with: x\n"),
    (PermissionError(13, "Permission denied", "/x"), 1, "minilora toy: /x: Permission denied\n"),
    (OSError("plain"), 1, "minilora toy: plain\n"),
    (MemoryError(), 1, "minilora toy: out of memory\n"),
    (SystemExit(0), 0, ""),
])
def test_errors_have_their_exit_codes(error, status, said, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RAISED", [error])
    assert main([*FULL, "--name", "raise"]) == status
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_the_program_is_a_traceback(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RAISED", [KeyError("bug")])
    with pytest.raises(KeyError):
        main([*FULL, "--name", "raise"])


def test_help_is_short_and_goes_to_stdout(capsys):
    for words in (["toy", "--help"], ["toy", "base", "-h"]):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert err == "" and EPILOG in out and "100 % of them" in out and "--config" in out
    assert main(["--help"]) == 0
    assert "toy    try the frame" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_config_is_below_the_flags(kind, tmp_path, capsys):
    values = {"rank": 5, "target": ["a", "b"], "clip": False, "dry_run": True, "method": "svd", "base": "b", "layer": ["l"]}
    path = tmp_path / f"c.{kind}"
    if kind == "json":
        path.write_text(json.dumps({**values, "name": None, "toy": {"rank": 6}, "train": {"x": 1}}))
    else:
        lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items()]
        path.write_bytes("\ufeff".encode() + "\r\n".join([*lines, "[toy]", "rank = 6", "[train]", "x = 1", ""]).encode())
    report = reported(capsys, "base", "a", "-o", "out", "--config", path)
    assert report["rank"] == 6 and report["target"] == ["a", "b"] and report["clip"] is False and report["dry_run"] is True
    assert report["method"] == "svd" and report["layer"] == ["l"]
    report = reported(capsys, "base", "a", "-o", "out", f"--config={path}", "--energy", 0.5, "--clip", "--target", "c")
    assert report["rank"] is None and report["energy"] == 0.5 and report["clip"] is True and report["target"] == ["c"]


@pytest.mark.parametrize(("text", "said"), [
    ("rnak = 3", "rnak is no option of minilora toy: did you mean 'rank'?"),
    ("rank = 3.0\nclip = 1\ntarget = 'q'\nname = 3\nenergy = true", "rank: expected a whole number, got 3.0; clip: "
     "expected true or false, got 1; target: expected a list, got 'q'; "
     "name: expected a text, got 3; energy: expected a number, got True"),
    ("method = 'svt'", "expected one of cat, svd, got 'svt': did you mean 'svd'?"),
    ("adapters = ['a=x']", "adapters: 'a=x': expected ADAPTER"),
    ("[tyo]\nrank = 3", "tyo is no option of minilora toy: did you mean 'toy'?"),
    ("toy = 3", "[toy]: expected a section"),
    ("config = 'x'", "config is no option"),
    ("rank = ", "no TOML"),
    ("a = " + "[" * 5000, "no TOML"),
])
def test_a_wrong_config_is_refused_with_all_its_faults(text, said, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(text)
    assert main([*FULL, "--config", str(tmp_path / "c.toml")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_a_config_with_two_that_exclude_each_other(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("rank = 3\nenergy = 1")
    words = ["toy", "base", "a", "-o", "out", "--config", str(tmp_path / "c.toml")]
    assert main(words) == 2
    assert "energy and rank exclude each other" in capsys.readouterr().err
    assert main([*words, "--rank", "2"]) == 0


def test_a_config_that_is_no_text(tmp_path, capsys):
    for name, content in {"a.toml": b"\xff", "b.json": b"{", "c.json": b"[]", "d.toml": b"#" * (2 << 20)}.items():
        (tmp_path / name).write_bytes(content)
        assert main([*FULL, "--config", str(tmp_path / name)]) in (1, 2)
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["base", "a=0.5", "b", "-o", "out", "--energy", "1e-3", "--layer", "é", "--layer", "\x1b", "--dry-run", "--no-clip"],
    ["base", "a", "-o", "o\\ut", "--rank", "3", "--name", "\U0001f600\"\x7f", "--json", "--target", "a", "b"],
])
def test_print_config_can_be_given_back(words, tmp_path, capsys):
    assert main(["toy", *words, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert out.isascii() and err == ""
    (tmp_path / "c.toml").write_text(out)
    assert main(["toy", "--config", str(tmp_path / "c.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == out
    parsed = [vars(front.arguments("toy", given)) for given in (words, ["--config", str(tmp_path / "c.toml")])]
    for one in parsed:
        del one["words"], one["config"]
    assert parsed[0] == parsed[1]


def test_print_config_shows_the_defaults_of_a_verb_that_is_given_nothing(capsys):
    assert main(["toy", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[toy]" and "# out =" in lines and "# base =" in lines and 'target = ["q", "v"]' in lines


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["minilora.cli.toy"], "run", lambda args: warnings.warn("look\x07") or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(FULL) == 0
    assert capsys.readouterr() == ("", "minilora: warning: look\\x07\n")


def test_progress_is_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(output, "LINE_EVERY", 0.0)
    for quiet in (False, True):
        with output.progress(argparse.Namespace(quiet=quiet), "layers\x1b", 2) as bar:
            bar.advance()
    assert capsys.readouterr() == ("", "layers\\x1b: 1 of 2\n")


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress(argparse.Namespace(quiet=False), "layers", 2) as bar:
        bar.advance(2)
    out, err = capsys.readouterr()
    assert out == "" and "layers" in err


def test_cells_of_tables_stay_on_their_line():
    assert output.table(["name", "n"], [["a\nb\x1b", 1.5]]).split("\n") == ["name        n", "-" * 13, "a\\nb\\x1b  1.5"]


def test_a_path_with_a_sign_in_it_is_a_path(tmp_path):
    (tmp_path / "a=2").mkdir()
    assert options.weighted(str(tmp_path / "a=2")) == (tmp_path / "a=2", 1.0)
    assert options.weighted(str(tmp_path / "a=2=3")) == (tmp_path / "a=2", 3.0)


PROCESS = "import sys; from minilora.cli.main import main; sys.exit(main({words!r}))"


def process(words, *flags, **environment):
    return [sys.executable, *flags, "-c", PROCESS.format(words=words)], {**os.environ, **environment}


def test_a_reader_that_goes_is_no_error(tmp_path):
    line, environment = process(["--help"])
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        err = child.stderr.read()
        assert child.wait() == 141 and err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_for_the_output():
    line, environment = process(["--help"])
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr and \
        "Exception" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes by the shell's words")
def test_an_output_that_is_closed():
    line, environment = process(["--help"])
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *line], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ascii_streams_and_optimised_python_and_errors_for_warnings():
    line, environment = process(["é\u202e"], "-O", "-W", "error", PYTHONIOENCODING="ascii")
    done = subprocess.run(line, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stderr.isascii() and b"\\xe9\\u202e" in done.stderr
