"""A whole run on a machine with a GPU, CuPy and torch, without a network: at most 8 minutes, one folder, one report.

    python tests/on_gpu.py --out runs/gpu                     everything
    python tests/on_gpu.py --only doctor tests                some parts
    python tests/on_gpu.py --device cpu --quick               its skeleton without a GPU: shows that every part starts

The most important parts come first. Each has a limit of its own, and the tests are several processes side by side, so that one
that hangs or crashes does not take the others along. report.json and report.md are written anew after every part: a run that is
cut off still says what it has. Exit code 0: every part ran and passed; 1: not so; the report names what is missing.

Where git is missing, say which commit it is: --commit, or a file COMMIT beside setup.cfg.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
TAIL = 40  # lines of a part's output that the report shows
AGAIN = [  # what is new, and what failed in a run before: the shortest way to an answer
    "tests/kernels/test_gpu_products.py", "tests/kernels/test_graphs.py",
    "tests/lora/algebra/test_lora_combine.py::test_difference_with_one_scaling_is_exact_to_the_bit",
    "tests/lora/algebra/test_lora_factors.py::test_dense_is_the_delta_of_a_layer", "tests/test_programs.py",
    "tests/ops/test_norm.py", "tests/kernels/test_gpu_overrides.py",
]
MOST_SKIPPED = 0.05  # of the tests of a part, without its failing


class Part(NamedTuple):
    """A command that answers something; `limit` in seconds. `figures` is the JSON that it writes into the folder, if any."""

    name: str
    limit: float
    command: list
    figures: str = ""


def stages(options):
    """Lists of parts that run side by side, one list after the other. Without the first, no other has a sense."""
    out, quick = options.out, ["--quick"] * options.quick
    where = ["--device", options.device]

    def bench(name, limit, script, *more):
        return [Part(name, limit, [BENCHMARKS / script, *where, *quick, *more, "--json", out / f"{name}.json"], f"{name}.json")]

    def kernels(name):
        """Timed by events and graphs of the card: without one there is nothing to show."""
        figures = f"{name}.json"
        command = [BENCHMARKS / f"bench_gpu_{name}.py", *quick, "--json", out / figures]
        return [] if options.device == "cpu" else [Part(name, 40, command, figures)]

    def demo(name, limit, *more):
        folder = out / name
        return [Part(name, limit, ["demos/synthetic_shift.py", *where, *more, "--out", folder], f"{name}/report.json")]

    return [
        bench("doctor", 60, "gpu_doctor.py"),
        [Part("again", 70, pytest(options, spread(), AGAIN))],
        demo("main-quick", 40, "--quick"),
        [Part(f"tests-{name}", 200, pytest(options, spread(), places)) for name, places in tests(options)],
        [] if options.quick else demo("main", 60),
        bench("step", 110, "bench_gpu_step.py", "--rounds", "10", "--steps", "300", "--seconds", "40"),
        bench("gpt2", 110, "bench_gpu_gpt2.py", "--seconds", "40"),
        bench("host", 40, "bench_gpu_host.py"),
        bench("products", 40, "bench_gpu_products.py"),
        kernels("low_rank"),
        kernels("rows"),
        bench("launches", 90, "gpu_launches.py"),
    ]


def spread():
    """pytest-xdist's options where it is installed: all tests in one part, over processes that take the next that is free.

    On 16 cores and one H100 all 8,086 took 141 s over 14 processes; a single part of the other kind took longer.
    """
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-p", "xdist", "-n", str(max(2, (os.cpu_count() or 2) - 2))]


def tests(options):
    """(name, files): of about equal length on a card; the parity tests, which need the same peft, are not among them."""
    if options.quick:
        return [("training", ["tests/test_training.py"]), ("launches", ["tests/kernels/test_launches.py"])]
    top = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    rooms = sorted(path.name for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py")) and path.name != "parity")
    whole = [("top", top), *((room, [f"tests/{room}"]) for room in rooms if room != "ops")]
    table = "tests/ops/test_ops.py"  # the table of all operations: half of all tests
    others = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    parts = [*whole, ("ops-table", [table]), ("ops", [path for path in others if path != table])]
    return [("all", [place for _, places in parts for place in places])] if spread() else parts


def pytest(options, more, places):
    marked = "gpu and not parity" if options.device == "gpu" else "not gpu and not slow and not parity and not nvrtc"
    return ["-m", "pytest", "-m", marked, "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60",
            "-p", "hypothesispytest", "--durations=5", *more, *places]


def environment(options):
    """That of all parts: minilora from this checkout, no writing into it, and no test that skips itself for want of a GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = "" if os.environ.get("PYTHONPYCACHEPREFIX") else "1"  # bytecode goes elsewhere, or nowhere
    own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": kept, "PYTHONUNBUFFERED": "1", "CI": "true", "MPLBACKEND": "Agg",
           "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a machine's own plugins may not know these tests
           "MPLCONFIGDIR": str(options.out / "matplotlib"), "CUPY_CACHE_DIR": str(options.out / "cupy-cache")}
    return {**os.environ, **own, **({"MINILORA_REQUIRE_GPU": "1"} if options.device == "gpu" else {})}


# -- running ----------------------------------------------------------------------------------------------------------


class Running:
    """A part in a process group of its own, its output in a file."""

    def __init__(self, part, options, limit):
        self.part, self.log, self.limit = part, options.out / f"{part.name}.log", limit
        self.record = {"name": part.name, "command": " ".join(map(str, part.command)), "started": now(), "limit": round(limit)}
        self.began = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, part.command)], cwd=ROOT, env=environment(options), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def finished(self):
        """Whether it has ended, by itself or because its time is up."""
        spent = time.monotonic() - self.began
        if self.process.poll() is None and spent < self.limit:
            return False
        timed_out = self.process.poll() is None
        self.stop()
        self.record |= {"ended": now(), "seconds": round(spent, 1), "exit code": self.process.returncode}
        self.record |= judged(self.part, self.log, self.process.returncode, timed_out)
        return True

    def stop(self):
        """End the whole group: the part, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def judged(part, log, code, timed_out):
    """What a part's end means: "passed", or why not; the last lines of its output; and its figures, if it wrote any."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = {"tail": lines[-TAIL:], "verdict": "passed" if code == 0 else f"failed with exit code {code}"}
    if timed_out:
        said["verdict"] = "stopped: its time was up"
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", lines[-1] if lines else "")}
    if counts and "pytest" in part.command:
        said["tests"] = counts
        if code == 0 and counts.get("skipped", 0) > MOST_SKIPPED * sum(counts.values()):
            said["verdict"] = f"failed: {counts['skipped']} of {sum(counts.values())} tests were skipped"
    if part.figures:
        with contextlib.suppress(OSError, ValueError):
            said["figures"] = json.loads((log.parent / part.figures).read_text(encoding="utf-8"))
    return said


def run(options, report):
    """Every stage in turn, as long as there is time; the report is written after every part."""
    end = time.monotonic() + options.seconds
    reason = ""
    for number, parts in enumerate(stages(options)):
        parts = [part for part in parts if not options.only or any(part.name.startswith(word) for word in options.only)]
        left = end - time.monotonic()
        if left < 5 and not reason:
            reason = f"not run: {options.seconds:.0f} s were up"
        if reason:
            report["parts"] += [{"name": part.name, "verdict": reason} for part in parts]
            write(options, report)
            continue
        running = [Running(part, options, min(part.limit, left)) for part in parts]
        try:
            while running:
                for one in [one for one in running if one.finished()]:
                    running.remove(one)
                    report["parts"].append(one.record)
                    print(f"{one.part.name:<16}{one.record['seconds']:>7.1f} s  {one.record['verdict']}", flush=True)
                    write(options, report)
                time.sleep(0.1)
        finally:
            for one in running:
                one.stop()
        if number == 0 and parts and report["parts"][-1]["verdict"] != "passed":
            reason = "not run: " + (report["parts"][-1]["tail"] or ["the doctor failed"])[-1]
    report["finished"] = now()
    write(options, report)
    return all(part["verdict"] == "passed" for part in report["parts"])


# -- the report -------------------------------------------------------------------------------------------------------


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def commit(options):
    if options.commit:
        return options.commit
    with contextlib.suppress(OSError):
        return (ROOT / "COMMIT").read_text(encoding="utf-8").strip()
    with contextlib.suppress(OSError):
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True)
        if said.returncode == 0:
            return said.stdout.strip()
    return "unknown: say it with --commit"


def write(options, report):
    """Both forms of the report, each in one piece: whoever reads during the run sees a whole one."""
    for name, text in (("report.json", json.dumps(report, indent=1)), ("report.md", as_text(report))):
        draft = options.out / f".{name}"
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, options.out / name)


def as_text(report):
    doctor = next((part for part in report["parts"] if part["name"] == "doctor"), {})
    facts = doctor.get("figures", {}).get("facts", {})
    lines = ["# A run on the " + report["device"], "", f"- started: {report['started']}",
             f"- finished: {report.get('finished', 'not yet, or cut off')}", f"- commit: {report['commit']}",
             *(f"- {name}: {value}" for name, value in facts.items()),
             "", "| part | s | verdict | tests |", "|---|---:|---|---|"]
    for part in report["parts"]:
        counts = ", ".join(f"{n} {word}" for word, n in part.get("tests", {}).items())
        lines.append(f"| {part['name']} | {part.get('seconds', '')} | {part['verdict']} | {counts} |")
    for part in report["parts"]:
        if "tail" in part:
            lines += ["", f"## {part['name']}", "", f"`{part['command']}`", "", "```text", *part["tail"], "```"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for reports and logs (%(default)s)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu shows the skeleton (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and a few tests: shows that every part starts")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help="parts whose names begin so")
    parser.add_argument("--seconds", type=float, default=480.0, help="for the whole run (%(default)s)")
    parser.add_argument("--commit", help="which commit this is, where git cannot say")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *signal_and_frame: sys.exit(143))  # not before the parts have been stopped
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"device": options.device, "quick": options.quick, "started": now(), "commit": commit(options), "parts": []}
    write(options, report)
    passed = run(options, report)
    print(f"{'passed' if passed else 'NOT passed'}: {options.out / 'report.md'}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
