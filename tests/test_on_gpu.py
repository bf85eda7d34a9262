"""The script of a whole GPU run: what a failing part does to the others, what the report says, and what is in it."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import on_gpu
import pytest
from on_gpu import Part


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script over other stages in its place; returns the exit code and the report."""
    def call(stages, *arguments):
        monkeypatch.setattr(on_gpu, "stages", lambda options: stages)
        monkeypatch.setattr(on_gpu.signal, "signal", lambda *given: None)
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path), *arguments])
        return on_gpu.main(), json.loads((tmp_path / "report.json").read_text())
    return call


def part(name, code, limit=30, **more):
    return Part(name, limit, ["-c", code], **more)


OK = part("doctor", "print('well')")


def verdicts(report):
    return {one["name"]: one["verdict"] for one in report["parts"]}


def test_a_part_that_crashes_or_hangs_takes_no_other_along(run, tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code, report = run([[OK], [part("crash", "import os; os.abort()"), part("hang", child, limit=1), part("other", "")],
                        [part("last", "print(1)")]])
    assert code == 1 and "finished" in report
    assert verdicts(report) == {"doctor": "passed", "crash": "failed with exit code -6", "hang": "stopped: its time was up",
                                "other": "passed", "last": "passed"}
    for one in report["parts"]:
        assert {"started", "ended", "seconds", "exit code", "command", "tail"} <= one.keys()
    text = (tmp_path / "report.md").read_text()
    assert "| hang | 1." in text and "## last" in text and report["started"] in text and report["commit"] in text


def test_all_passed(run):
    code, report = run([[OK], [part("a", "")]], "--commit", "abc")
    assert code == 0 and report["commit"] == "abc"


def test_the_report_is_there_after_every_part(run, tmp_path):
    look = f"import json; print([p['name'] for p in json.load(open({str(tmp_path / 'report.json')!r}))['parts']])"
    _, report = run([[OK], [part("a", "")], [part("look", look)]])
    assert report["parts"][-1]["tail"] == ["['doctor', 'a']"]


def test_without_a_gpu_nothing_runs_and_the_reason_stands_there(run, tmp_path):
    code, report = run([[part("doctor", "import sys; sys.exit('GPU asked for, but CuPy is not installed')")], [part("a", "")]])
    assert code == 1
    assert verdicts(report)["a"] == "not run: GPU asked for, but CuPy is not installed"
    assert "CuPy is not installed" in (tmp_path / "report.md").read_text()


def test_when_the_time_is_up(run):
    code, report = run([[OK], [part("long", "import time; time.sleep(60)", limit=50)], [part("late", "")]], "--seconds", "6")
    assert code == 1
    assert verdicts(report) == {"doctor": "passed", "long": "stopped: its time was up", "late": "not run: 6 s were up"}


def test_some_parts_only(run):
    assert verdicts(run([[OK], [part("tests-a", ""), part("bench", "")]], "--only", "tests")[1]) == {"tests-a": "passed"}


def test_figures_are_taken_over(run, tmp_path):
    write = f"open({str(tmp_path / 'f.json')!r}, 'w').write('{{\"ratio\": 0.5}}')"
    _, report = run([[OK], [part("bench", write, figures="f.json")], [part("none", "", figures="no.json")]])
    figures = {one["name"]: one.get("figures") for one in report["parts"]}
    assert figures == {"doctor": None, "bench": {"ratio": 0.5}, "none": None}


@pytest.mark.parametrize(("last", "code", "verdict"), [
    ("95 passed, 4 skipped, 7 deselected in 3.2s", 0, "passed"),
    ("90 passed, 10 skipped in 3.2s", 0, "failed: 10 of 100 tests were skipped"),
    ("100 skipped in 3.2s", 0, "failed: 100 of 100 tests were skipped"),
    ("1 failed, 95 passed in 3.2s", 1, "failed with exit code 1"),
])
def test_many_skipped_tests_are_a_failure(last, code, verdict, tmp_path):
    (tmp_path / "log").write_text(f"....\n{last}\n")
    said = on_gpu.judged(Part("tests", 1, ["-m", "pytest"]), tmp_path / "log", code, False)
    assert said["verdict"] == verdict and sum(said["tests"].values()) in (96, 99, 100)


OPTIONS = SimpleNamespace(out=Path("out"), quick=False, device="gpu", only=[])


def test_every_test_is_in_one_part():
    listed = [on_gpu.ROOT / place for _, places in on_gpu.tests(OPTIONS) for place in places]
    found = [path for place in listed for path in ([place] if place.is_file() else place.rglob("test_*.py"))]
    here = {path for path in (on_gpu.ROOT / "tests").rglob("test_*.py") if "parity" not in path.parts}
    assert len(found) == len(set(found)) and set(found) == here


def test_what_a_part_starts_is_there_and_a_gpu_is_insisted_on():
    parts = [part for stage in on_gpu.stages(OPTIONS) for part in stage]
    assert parts[0].name == "doctor" and len({part.name for part in parts}) == len(parts)
    for one in parts:
        assert "pytest" in one.command or (on_gpu.ROOT / one.command[0]).is_file(), one
        assert "pytest" in one.command or "gpu" in one.command or one.name in ("low_rank", "rows"), one  # they know no other
    assert on_gpu.environment(OPTIONS)["MINILORA_REQUIRE_GPU"] == "1"


def test_the_skeleton_runs_without_a_gpu(tmp_path):
    """As somebody starts it; the benches need torch, and are left out."""
    command = [sys.executable, "tests/on_gpu.py", "--device", "cpu", "--quick", "--out", tmp_path, "--only", "doctor",
               "tests-training", "--seconds", "200"]
    done = on_gpu.subprocess.run(command, cwd=on_gpu.ROOT, capture_output=True, text=True, timeout=240)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, (done.stdout, done.stderr, report)
    assert verdicts(report) == {"doctor": "passed", "tests-training": "passed"}
    doctor, training = report["parts"]
    assert training["tests"]["passed"] > 20 and "add_matmul of rank 1" in doctor["figures"]["microseconds"]
