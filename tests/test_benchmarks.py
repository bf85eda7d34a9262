"""The harness of the benchmarks: sides in processes of their own, of which one may stop."""
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "benchmarks"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import alternate

def stops_at_once():
    raise MemoryError("no room")

def stops_later():
    calls = []
    def run(n):
        calls.append(n)
        if len(calls) > 3:
            raise MemoryError("no room any more")
        return {{"seconds": 2.0}}
    return run

def sides(device, quick):
    good = {{"seconds": 1.0, "said": [device, quick]}}
    return {{"good": lambda: lambda n: good, "at once": stops_at_once, "later": stops_later}}

def report(results):
    return alternate.compare(results, [("good / later", "good", "later"), ("good / good", "good", "good")])

alternate.WARM_UP = 1
alternate.run(__file__, "A test.", sides, report, rounds=3, steps=4, devices=("gpu", "cpu"))
"""


def run(tmp_path, *arguments):
    script, figures = tmp_path / "bench_test.py", tmp_path / "figures.json"
    script.write_text(SCRIPT)
    command = [sys.executable, script, "--rest", "0", "--json", figures, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done, json.loads(figures.read_text())


def test_a_side_that_stops_leaves_the_others(tmp_path):
    done, figures = run(tmp_path, "--device", "cpu")
    assert done.returncode == 1 and "stopped and left out: at once, later" in done.stderr and "MemoryError" in done.stderr
    assert figures["stopped"] == ["at once", "later"]
    assert len(figures["sides"]["good"]) == 3 and figures["sides"]["good"][0]["said"] == ["cpu", False]
    assert [one["comparison"] for one in figures["comparisons"]] == ["good / good"]


def test_quick_and_only(tmp_path):
    done, figures = run(tmp_path, "--quick", "--only", "good")
    assert done.returncode == 0, done.stderr
    assert figures["settings"]["rounds"] == 1 and figures["sides"]["good"][0]["said"] == ["gpu", True]


def test_no_round_begins_when_the_time_is_up(tmp_path):
    done, figures = run(tmp_path, "--only", "good", "--seconds", "0")
    assert done.returncode == 0 and len(figures["sides"]["good"]) == 1 and "1 rounds" in done.stdout


def test_products_run_on_the_stand_in(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "bench_gpu_products.py", "--device", "cpu", "--json", figures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[2:])) <= 80
    products = json.loads(figures.read_text())["products"]
    assert all(sides.keys() == {"GemmEx", "Lt", "CuPy"} and sides["Lt"][0] > 0.0 for sides in products.values())


def test_the_phases_of_a_step_fit_a_terminal(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "bench_gpu_host.py", "--device", "cpu", "--quick", "--only", "minilora",
               "--json", figures]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["sides"]
    assert list(found) == ["minilora, LoRA", "minilora, full"]
    for (one,) in found.values():
        phases = [one[phase] for phase in ("rows", "gather", "forward", "loss", "backward", "step")]
        assert all(seconds > 0.0 for seconds in phases) and 0.2 < sum(phases) / one["seconds"] < 5.0
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and max(map(len, rows)) <= 80
