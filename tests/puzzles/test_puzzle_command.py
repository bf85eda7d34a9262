"""``python -m minilora.puzzles``: a learner's way, and what can be the matter with a learner's files."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.puzzles.catalogue import PUZZLES, named, number_of, puzzle_of
from minilora.puzzles.command import main
from minilora.puzzles.files import file_name
from minilora.puzzles.puzzle import UNWRITTEN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *words):
    """Exit code, stdout and stderr of a command; no line is wider than 80."""
    status = main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def solve(path, puzzle=None, text=None):
    puzzle = puzzle or puzzle_of(path)
    path.write_text(puzzle.file(number_of(puzzle), puzzle.answer if text is None else text))


def real(*words, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, "-W", "error", "-m", "minilora.puzzles", *words], capture_output=True, text=True,
                          env=environment, check=False)


def test_all_are_solved_through_the_real_command():
    assert real("start").returncode == 0
    files = sorted(Path("puzzles").iterdir())
    assert [path.name for path in files] == [file_name(puzzle) for puzzle in PUZZLES.values()]
    for path in files:
        solve(path)
    done = real("check", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count(" passed  ") == len(PUZZLES)
    assert f"{len(PUZZLES)} of {len(PUZZLES)} passed: you have derived a LoRA layer" in done.stdout
    assert sorted(Path("puzzles").iterdir()) == files, "nothing else was written"


def test_the_list_needs_neither_numpy_nor_files():
    code = ("import sys; from minilora.puzzles.command import main; status = main([]); "
            "print(status, *sorted(name for name in sys.modules if name in ('numpy', 'minilora.engine', 'minilora.testing')))")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0"
    assert [line.split()[:2] for line in lines[:len(PUZZLES)]] == [[str(number_of(p)), p.name] for p in PUZZLES.values()]


def test_a_way_through(capsys):
    status, out, _ = said(capsys)
    assert status == 0 and "start writes a file for each" in out
    status, out, _ = said(capsys, "start")
    assert status == 0 and f"wrote {len(PUZZLES)} files into puzzles" in out and "check loss" in out
    status, out, _ = said(capsys, "check")
    assert status == 3 and out.count("not written yet") == len(PUZZLES) and out.endswith("hint loss\n")
    path = Path("puzzles/01_loss.py")
    path.write_text(path.read_text().replace(UNWRITTEN, "return 2.0 * (p - t) / len(p)"))
    status, out, _ = said(capsys, "check", "loss")
    assert status == 3 and "It divides by the number of rows" in out and "stuck?" in out
    assert said(capsys, "check", "loss") == (status, out, "")
    solve(path)
    status, out, _ = said(capsys, "check", "1")
    assert status == 0 and "1 of 1 passed\nthe same in the library: minilora/ops/loss.py: MSE\nnext: dx\n" in out
    status, out, _ = said(capsys)
    assert status == 0 and f"1 of {len(PUZZLES)} passed in puzzles" in out
    assert [line for line in out.splitlines() if line.endswith("  passed")] == [out.splitlines()[0]]
    assert said(capsys, "list", "puzzles")[1] == out
    os.chdir("puzzles")
    assert said(capsys, "check", "loss")[0] == 0, "also from inside the folder"


def test_a_file_that_is_run_grades_itself(capsys):
    said(capsys, "start", "--only", "dx,dA")
    for name, word in (("02_dx.py", "dx"), ("11_dA.py", "dA")):
        path = Path("puzzles", name)
        runpy.run_path(str(path), run_name="__main__")
        assert capsys.readouterr().out.startswith(f"{word}: not written yet\n")
        solve(path)
        runpy.run_path(str(path), run_name="__main__")
        assert capsys.readouterr().out == f"{word}: passed\n"


def test_nothing_is_wider_than_a_terminal(capsys):
    wide = [said(capsys, *words)[1] for words in ([], ["start"], ["list"], ["check"], ["--help"])]
    for name in PUZZLES:
        wide += [said(capsys, "show", name)[1], said(capsys, "show", name, "--solution")[1]]
        wide += [said(capsys, "hint", name, number)[1] for number in (1, 2, 3)]
    wide += [said(capsys, verb, "--help")[1] for verb in ("list", "start", "check", "hint", "show")]
    assert max(len(line) for text in wide for line in text.splitlines()) <= 80


def test_no_solution_is_shown_unless_it_is_asked_for(capsys):
    for puzzle in PUZZLES.values():
        line = (puzzle.answer if isinstance(puzzle.answer, str) else puzzle.answer[0]).split("\n")[-1]
        status, out, _ = said(capsys, "show", puzzle.name)
        assert status == 0 and UNWRITTEN in out and line not in out
        assert line in said(capsys, "show", puzzle.name, "--solution")[1]
        for number in (1, 2, 3):
            assert line not in said(capsys, "hint", puzzle.name, number)[1]


def test_start_never_overwrites(capsys):
    Path("mine").mkdir()
    Path("mine/02_dx.py").write_text("my own")
    Path("mine/03_dW.py").mkdir()
    Path("mine/05_linear.py").symlink_to("nowhere")
    status, out, _ = said(capsys, "start", "mine")
    assert status == 0 and "3 files were there and stay as they are" in out and f"wrote {len(PUZZLES) - 3} files" in out
    assert "check mine/01_loss.py" in out.replace(os.sep, "/")
    assert Path("mine/02_dx.py").read_text() == "my own" and Path("mine/03_dW.py").is_dir()
    assert os.readlink("mine/05_linear.py") == "nowhere"
    Path("mine/01_loss.py").write_text("changed")
    status, out, _ = said(capsys, "start", "mine")
    assert status == 0 and "wrote 0 files" in out and Path("mine/01_loss.py").read_text() == "changed"


def test_start_gives_one_after_the_other_or_some(capsys):
    for name in ("01_loss.py", "02_dx.py"):
        assert said(capsys, "start", "--next")[0] == 0 and Path("puzzles", name).is_file()
    assert len(list(Path("puzzles").iterdir())) == 2
    assert "check DA" not in said(capsys, "start", "week 2", "--only", "DA, 3,adam")[1]
    assert {path.name for path in Path("week 2").iterdir()} == {"03_dW.py", "11_dA.py", "23_adam.py"}
    said(capsys, "start")
    status, _, err = said(capsys, "start", "--next")
    assert status == 2 and "have a file in puzzles already" in err


@pytest.mark.parametrize(("words", "status", "text"), [
    (["chekc"], 2, "there is no word 'chekc': did you mean 'check'?"),
    (["--check"], 2, "there is no word '--check'"),
    (["\x1b[2J"], 2, "'\\x1b[2J'"),
    (["check"], 1, "there is no folder puzzles: python -m minilora.puzzles start makes it"),
    (["check", "dA"], 1, "puzzles/11_dA.py is not there: python -m minilora.puzzles start writes it"),
    (["check", "dZ"], 1, "there is no puzzle 'dZ'"),
    (["check", "legth"], 1, "did you mean 'length'?"),
    (["check", "99"], 1, "there is no puzzle '99'"),
    (["check", "."], 1, "no file in . has the name of a puzzle"),
    (["check", "nowhere/11_dA.py"], 1, "there is no file nowhere/11_dA.py"),
    (["check", "other.py"], 1, "has the name of no puzzle: call it NUMBER_NAME.py"),
    (["check", "--jsn"], 2, "did you mean '--json'"),
    (["check", "--config", "x"], 2, "there is no option --config"),
    (["list", "nowhere"], 2, "there is no folder nowhere: python -m minilora.puzzles start nowhere makes it"),
    (["list", "a", "b"], 2, "too many words"),
    (["start", "other.py"], 1, "cannot make the folder other.py"),
    (["start", "--only", "dA,xx"], 1, "there is no puzzle 'xx'"),
    (["start", "--only", ""], 1, "there is no puzzle ''"),
    (["start", "--only", "1", "--next"], 2, "exclude each other"),
    (["hint"], 2, "missing: NAME"),
    (["hint", "dA", "4"], 2, "invalid choice: 4"),
    (["hint", "dA", "one"], 2, "invalid int value"),
    (["hint", "nothing"], 1, "there is no puzzle 'nothing'"),
    (["show"], 2, "missing: NAME"),
    (["show", "dA", "--solutoin"], 2, "did you mean '--solution'"),
])
def test_wrong_use_is_told_in_one_clear_line(words, status, text, capsys):
    Path("other.py").write_text("")
    code, out, err = said(capsys, *words)
    assert code == status and out == "" and "\x1b" not in err
    assert text in err.replace(os.sep, "/").splitlines()[0] or text in err


LOSS = PUZZLES["loss"]
GOOD = LOSS.file(1, LOSS.answer)


@pytest.mark.parametrize(("source", "state", "text"), [
    (b"\xef\xbb\xbf" + GOOD.encode(), 0, "passed"),
    (GOOD.replace("\n", "\r\n").encode(), 0, "passed"),
    (GOOD.replace("\n", "\r").encode(), 0, "passed"),
    (GOOD.replace("    return", "\treturn").encode(), 0, "passed"),
    (b"# -*- coding: latin-1 -*-\n# \xe9\n" + GOOD.encode(), 0, "passed"),
    (GOOD.replace("\n\n\ndef", "\nprint('look', '\\x1b[2J')\n\n\ndef").encode(), 0, "look \\x1b[2J"),
    (GOOD.encode() + b"\nfor i in range(100000): print(i)\n", 0, "..."),
    (GOOD.encode() + b"\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int' = 1\n", 0, "passed"),
    (GOOD.encode() + b"\nif __name__ == '__main__':\n    raise SystemExit(1)\n", 0, "passed"),
    (b"", 3, "there is no loss_gradient in this file any more"),
    (b"loss_gradient = 3\n", 3, "is an int, and must be a function"),
    (b"def loss_gradient(p, t)\n    return p\n", 3, "puzzles/01_loss.py:1: SyntaxError: expected ':'"),
    (b"def loss_gradient(p, t):\n\tx = 1\n        return p\n", 3, "puzzles/01_loss.py:3: TabError"),
    (b"def loss_gradient(p, t):\nreturn p\n", 3, "puzzles/01_loss.py:2: IndentationError"),
    (b"\xe9\n", 3, "SyntaxError"),
    (b"x = '\0'\n", 3, "null bytes"),
    (b"import numpyy as np\n", 3, "puzzles/01_loss.py:1: ModuleNotFoundError: No module named 'numpyy'"),
    (b"import sys\nsys.exit(0)\n", 3, "puzzles/01_loss.py:2: the code ended the program"),
    (b"def loss_gradient(p, t):\n    quit()\n", 3, "puzzles/01_loss.py:2: the code ended the program"),
    (b"def loss_gradient(p, t):\n    return loss_gradient(p, t)\n", 3, "puzzles/01_loss.py:2: RecursionError"),
    (b"def loss_gradient(p, t):\n    return q\n", 3, "puzzles/01_loss.py:2: NameError: name 'q' is not defined"),
    (b"def loss_gradient(p, t):\n    raise ValueError('\\x1b[2J\\n' * 3)\n", 3, "ValueError: \\x1b[2J"),
    (b"def loss_gradient(p, t):\n    raise Exception\n", 3, "puzzles/01_loss.py:2: Exception\n"),
    (b"import random\ndef loss_gradient(p, t):\n    return random.choice([])\n", 3, "puzzles/01_loss.py:3: IndexError"),
    (b"import json\njson.loads('[')\n", 3, "puzzles/01_loss.py:2: JSONDecodeError"),
    (b"def loss_gradient(p, t):\n    ...\n", 3, "is its return missing?"),
    (b"async def loss_gradient(p, t):\n    return p\n", 3, "is a coroutine, and should be an array"),
    (b"def loss_gradient(p, t):\n    yield p\n", 3, "is a generator, and should be an array"),
])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_file_may_be_of_any_kind(source, state, text, capsys):
    Path("puzzles").mkdir()
    Path("puzzles/01_loss.py").write_bytes(source)
    status, out, err = said(capsys, "check")
    assert status == state and err == "" and text in out.replace(os.sep, "/"), out
    assert len(out.splitlines()) < 25 and "\x1b" not in out
    assert said(capsys, "check") == (status, out, err)
    assert os.listdir("puzzles") == ["01_loss.py"] and "minilora_puzzle" not in sys.modules


def test_an_edit_within_the_same_second_is_seen(capsys):
    Path("puzzles").mkdir()
    path = Path("puzzles/01_loss.py")
    for text, status in ((GOOD, 0), (GOOD.replace("2.0", "3.0"), 3), (GOOD, 0)):
        path.write_text(text)
        os.utime(path, (1, 1))
        assert said(capsys, "check")[0] == status


def test_a_folder_in_the_place_of_a_file(capsys):
    Path("puzzles/11_dA.py").mkdir(parents=True)
    status, out, err = said(capsys, "check", "dA")
    assert (status, out) == (1, "") and "11_dA.py is not a file" in err
    status, out, err = said(capsys, "check", "puzzles/11_dA.py")
    assert (status, out) == (1, "") and "no file in" in err
    assert said(capsys, "list")[0] == 0


def test_ctrl_c_in_a_loop_without_end(capsys):
    Path("puzzles").mkdir()
    Path("puzzles/01_loss.py").write_text("raise KeyboardInterrupt\n")
    status, out, err = said(capsys, "check")
    assert status == 130 and out == "" and "interrupted while" in err and "01_loss.py ran" in err.replace(os.sep, "/")


def test_an_unreadable_file_is_told(capsys, monkeypatch):
    Path("puzzles").mkdir()
    Path("puzzles/01_loss.py").write_text(GOOD)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    status, out, err = said(capsys, "check")
    assert status == 3 and "the file cannot be read: Permission denied" in out and err == ""


def test_many_files_of_a_course(capsys):
    for name, text in (("ann/11_dA.py", None), ("bob/11_dA (1).py", "dA = self.s * (dy @ B).T @ x * 2.0"),
                       ("bob/02_dx.py", "return dy @ W"), ("eve/deep/Eve-03_dW_final.py", UNWRITTEN)):
        path = Path("course", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        solve(path, text=text)
    Path("course/notes.py").write_text("raise SystemExit")
    Path("course/eve/__pycache__").mkdir()
    Path("course/eve/__pycache__/02_dx.py").write_text("")
    status, out, err = said(capsys, "check", "course", "--json")
    report = json.loads(out)
    assert status == 3 and err == ""
    assert set(report) == {"schema", "passed", "solved", "files"} and report["schema"] == "minilora.puzzles/1"
    assert [(Path(each["file"]).parts[1], each["puzzle"], each["status"]) for each in report["files"]] == [
        ("ann", "dA", "passed"), ("bob", "dx", "passed"), ("bob", "dA", "wrong"), ("eve", "dW", "unwritten")]
    assert set(report["files"][0]) == {"file", "puzzle", "number", "status", "words", "printed"}
    assert report["solved"] == 2 and not report["passed"] and "a factor 2 too many" in report["files"][2]["words"][0]
    assert said(capsys, "check", "course/ann", "course/bob/02_dx.py")[0] == 0
    report = json.loads(said(capsys, "list", "--json")[1])
    assert [row["puzzle"] for row in report["puzzles"]] == list(PUZZLES)


@pytest.mark.parametrize(("name", "puzzle"), [
    ("11_dA.py", "dA"), ("dA.py", "dA"), ("da.py", "dA"), ("ann_11_dA.py", "dA"), ("11-dA (2).py", "dA"), ("8_norm.py", "norm"),
    ("x11_dA.py", "dA"), ("layer_norm.py", None), ("11_dA.txt", None), ("dA2.py", None), ("11_dAx.py", None),
    ("loss.pyc", None), ("2024_dx.py", None), ("01_loss_v2.py", "loss"), ("pre_11_paths-final.py", "paths"),
])
def test_files_are_known_by_their_names(name, puzzle):
    found = puzzle_of(Path(name))
    assert (found and found.name) == puzzle


def test_a_name_in_any_case_or_a_number():
    names = "dA", "DA", "11", "011", "11_dA", "11_dA.py", "puzzles/11_dA.py"
    assert {named(name).name for name in names} == {"dA"}


def test_a_file_may_be_named_as_it_comes_to_mind(capsys):
    said(capsys, "start", "--only", "dA")
    for word in ("dA", "da", "11", "11_dA", "11_dA.py", "puzzles/11_dA.py", "./puzzles", "puzzles/"):
        status, out, err = said(capsys, "check", word)
        assert status == 3 and "puzzles/11_dA.py" in out.replace(os.sep, "/") and err == "", word
    status, _, err = said(capsys, "check", "puzzles/11_dA")
    assert status == 1 and "there is no file puzzles/11_dA: did you mean '11_dA.py'?" in err.replace(os.sep, "/")
    assert said(capsys, "hint", "puzzles/11_dA.py")[0] == 0
