"""demos/qlora.py as a user runs it, on what it makes up."""
import functools

import demo_runs
import pytest
from demo_runs import inside, report_in, widest, words

SIDES = ["float32", "bfloat16", "int8", "nf4", "loftq"]
run = functools.partial(demo_runs.run, "qlora")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new"
    done = run("--quick", "--epochs", 1, "--out", folder)
    assert done.returncode == 0, done.stderr
    return done, report_in(folder), folder


def test_says_what_it_does(finished):
    done, report, _ = finished
    assert [line[:2] for line in done.stdout.splitlines() if line[1:3] == ". "] == ["1.", "2.", "3."]
    assert widest(done.stdout) <= 80 and widest(done.stderr or ".") <= 80 and "Warning" not in done.stderr
    assert report["status"] == "finished" and [record["side"] for record in report["sides"]] == SIDES
    for record in report["sides"]:
        assert f"{100 * record['accuracy']:.1f} +- " in done.stdout
    assert "beside frozen weights of few bits" in words(done.stdout)


def test_figures_that_must_agree(finished):
    _, report, _ = finished
    sides = {record["side"]: record for record in report["sides"]}
    d = 32
    weights = 2 * (4 * d * d + 2 * d * 2 * d)
    for record in sides.values():
        assert record["weights"] == weights and record["steps"] == len(range(0, 300, 16)) and record["step_seconds"] > 0
        assert record["trained_bytes"] == 4 * record["trained"] and len(record["evaluations"]) >= 4
        assert {record["other_bytes"], record["trained"]} == {sides["float32"]["other_bytes"], sides["float32"]["trained"]}
    bits = {side: 8 * record["weight_bytes"] / weights for side, record in sides.items()}
    assert bits["float32"] == 32 and bits["bfloat16"] == 16 and bits["nf4"] == bits["loftq"] < 4.2 < bits["int8"] < 9
    errors = [sides[side]["error"] for side in SIDES]
    assert errors[0] == 0.0 == sides["float32"]["start_distance"] and errors[1] < errors[2] < errors[4] < errors[3] < 0.1


def test_wrong_usage_is_one_line_and_code_2(tmp_path):
    done = run("--sides", "nf4,nf5,nf4", "--turns", 0, "--out", tmp_path)
    assert done.returncode == 2
    for part in ("there is no 'nf5'", "names a side twice", "--turns must be at least 1", "--model is missing",
                 "--data is missing"):
        assert part in done.stderr
    done = run("--quick", "--model", "x", "--out", tmp_path)
    assert done.returncode == 2 and "leave out --model" in done.stderr


def test_one_side_alone(tmp_path, monkeypatch, capsys):
    code, report = inside("qlora", monkeypatch, tmp_path)("--quick", "--epochs", 0.1, "--sides", "nf4")
    assert code == 0 and [record["side"] for record in report["sides"]] == ["nf4"]
