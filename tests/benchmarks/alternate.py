"""Alternating runs: each side of a comparison in a process of its own, one at a time, in turn, round after round.

OpenBLAS (NumPy) keeps the other cores spinning for about 0.1 s after a product, and OpenMP (torch) for a few
milliseconds, so that in one process, or without a pause, one library would take cores from the other. Separate processes
with a rest before every turn measure each library as its users meet it, and alternation spreads slow and fast minutes of
the machine over all sides.

Run as a script, this file prints the machine and the versions.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[2]
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}  # read by glibc
WARM_UP = 5  # untimed steps at the start of every turn: they wake the thread pools and fill the caches


# -- a side: set up once, then timed in turns -------------------------------------------------------------------------


def timed(step, synchronize=lambda: None, loss=None):
    """From one step a function that runs n of them and gives the seconds of one; `loss`, if any, is called afterwards.

    `synchronize` waits for the device: a GPU only queues work, so the clock is read after it has finished.
    """
    def run(n):
        synchronize()
        start = time.perf_counter()
        for _ in range(n):
            step()
        synchronize()
        figures = {"seconds": (time.perf_counter() - start) / n}
        return figures if loss is None else {**figures, "loss": loss()}
    return run


def recorded(step):
    """A step of torch on a GPU as a CUDA graph: a function that replays it. Its optimizer must be capturable."""
    import torch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def turn(run, steps):
    """Run the untimed and then the timed steps. Adds what may explain the time.

    ``cpu``: seconds of all cores a step, which other processes disturb less than the time.
    ``faults``: page faults a step: memory that was given back to the system and asked for again, up to 1 us for 4 KB.
    ``others``: the share of all cores that other processes took meanwhile.
    """
    run(WARM_UP)
    wall, own, busy, faults = time.perf_counter(), time.process_time(), busy_seconds(), page_faults()
    figures = run(steps)
    faults = page_faults() - faults
    wall, own, busy = time.perf_counter() - wall, time.process_time() - own, busy_seconds() - busy
    others = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))
    return {**figures, "cpu": own / steps, "faults": faults / steps, "others": others}


def page_faults():
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def busy_seconds():
    """CPU time that all processes together have used; 0 where the system does not say (Linux does)."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return 0.0


def serve(setup):
    """The life of a worker: set up, then one turn for every line "steps" that comes in, answered by a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints stays out of the answers
    run = setup()
    turn(run, 1)  # what is made at the first step is made before the first turn
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(run, int(line))), file=answers, flush=True)


class Failed(Exception):
    """A side has stopped."""


class Worker:
    """A side in its own process. It answers when it is set up; called with a number of steps, it takes a turn."""

    def __init__(self, script, name, options):
        command = [sys.executable, str(script), "--worker", name]
        command += ["--threads", str(options.threads)] if options.threads else []
        command += ["--device", options.device] if hasattr(options, "device") else []
        command += ["--quick"] if getattr(options, "quick", False) else []
        command += [f"--{key}={getattr(options, key)}" for key in options.sizes]
        allocator = KEEP_MEMORY if options.keep_memory else {}
        self.name = name
        self.process = subprocess.Popen(command, env={**environment(), **allocator}, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the worker of {self.name!r} stopped with status {self.process.wait()}: its message is above")
        return line

    def __call__(self, steps):
        with contextlib.suppress(BrokenPipeError):  # `answer` says more
            print(steps, file=self.process.stdin, flush=True)
        return json.loads(self.answer())

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def environment():
    """The environment of a child process: it finds minilora in this checkout, installed or not."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def measure(script, sides, options):
    """Take turns: `rounds` times every side in order (in every second round in reverse). Returns a list a side.

    A side that stops is said to, and left out: the others go on.
    """
    results = {name: [] for name in sides}
    if options.one_process:
        sys.path.insert(0, str(ROOT))
    with contextlib.ExitStack() as stack:
        turns = {}

        def attempt(name, action):
            try:
                return action()
            except Failed as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
                del results[name]
                turns.pop(name, None)

        for name, setup in sides.items():
            if options.one_process:
                run = setup()
                turns[name] = lambda steps, run=run: turn(run, steps)
            else:
                turns[name] = Worker(script, name, options)
                stack.callback(turns[name].close)
        for name in list(turns) if not options.one_process else ():
            attempt(name, turns[name].answer)  # all set themselves up side by side; the first turn begins when all are ready
        began = time.monotonic()
        for number in range(options.rounds):
            if number and time.monotonic() - began > options.seconds:
                break
            for name in list(turns)[::-1 if number % 2 else 1]:
                time.sleep(options.rest)
                if figures := attempt(name, lambda name=name: turns[name](options.steps)):
                    results[name].append(figures)
    return results


# -- figures ----------------------------------------------------------------------------------------------------------


def median(rounds, key="seconds"):
    return statistics.median(result[key] for result in rounds)


def quartiles(rounds, key="seconds"):
    values = [result[key] for result in rounds]
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def compare(results, specifications):
    """One comparison for each (label, side, other side, goal or None, key) of which both sides were measured."""
    return [compare_two(results, *spec) for spec in specifications if spec[1] in results and spec[2] in results]


def compare_two(results, label, side, other, goal=None, key="seconds"):
    """The ratio of the medians, and the median of the ratios round by round. Below 1: `side` is faster."""
    pairs = [a[key] / b[key] for a, b in zip(results[side], results[other])]
    return {
        "comparison": label, "side": side, "other": other, "goal": goal,
        "ratio of medians": median(results[side], key) / median(results[other], key),
        "median of ratios": statistics.median(pairs),
        "ratio of minima": min(a[key] for a in results[side]) / min(b[key] for b in results[other]),
    }


def table(header, rows):
    """A Markdown table with aligned columns: the first to the left, numbers to the right."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def comparison_table(comparisons):
    def row(c):
        goal, ratio = c["goal"], c["ratio of medians"]
        verdict = "" if goal is None else f"{goal:.2f}", "" if goal is None else "yes" if ratio <= goal else "no"
        return [c["comparison"], f"{ratio:.3f}", f"{c['median of ratios']:.3f}", f"{c['ratio of minima']:.3f}", *verdict]
    header = ["time of minilora / time of the other", "ratio of medians", "median of ratios", "of minima", "goal", "reached"]
    return table(header, [row(c) for c in comparisons])


# -- machine ----------------------------------------------------------------------------------------------------------


def machine():
    """What the figures depend on, by name."""
    cpu, flags = processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "minilora": f"{version('minilora')}, commit {commit()}",
        "machine": f"{cpu}, {cores()} cores, {' '.join(flags)}, {platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": f"{version('numpy')}, {blas()}",
        "torch": torch_facts(),
        "peft": f"{version('peft')}, transformers {version('transformers')}",
        "load": "load average {:.2f} (1 min)".format(os.getloadavg()[0]) if hasattr(os, "getloadavg") else "unknown",
    }


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor():
    """The processor's name, and which of the wide instruction sets it has."""
    fields = {}
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    name = fields.get("model name") or platform.processor() or "unknown processor"
    return name, [flag for flag in ("avx2", "fma", "avx512f", "amx_tile") if flag in flags]


def version(package):
    if package == "minilora":
        import minilora
        return minilora.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit():
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def blas():
    import numpy
    built = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    text = f"{built['name']} {built['version']}"
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return text
    pools = (pool for pool in threadpool_info() if pool["user_api"] == "blas")
    return ", ".join([text, *(f"{p.get('architecture')} kernels, {p['num_threads']} threads" for p in pools)])


def torch_facts():
    try:
        import torch
    except ImportError:
        return "not installed"
    return ", ".join([torch.__version__, f"{torch.get_num_threads()} threads",
                      "MKL" if torch.backends.mkl.is_available() else "no MKL",
                      f"float32 products in {torch.get_float32_matmul_precision()} precision"])


def machine_from_child(threads=None):
    """`machine` as a child process sees it, so that this process loads no library and starts no threads."""
    command = [sys.executable, __file__, "--json", *(["--threads", str(threads)] if threads else [])]
    child = subprocess.run(command, env=environment(), check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(child.stdout)


def card(probe, device):
    """The card and the versions, as the script `probe` prints them, or an exit with one sentence that says what is missing.

    In a process of its own, because whoever asks a GPU holds memory on it until the process ends.
    """
    if device == "cpu":
        return {}
    child = subprocess.run([sys.executable, "-c", probe], env=environment(), text=True, capture_output=True)
    if child.returncode:
        sys.exit(child.stderr.strip().rpartition("\n")[2])
    return json.loads(child.stdout)


def show(facts):
    return "\n".join(f"{name + ':':<10}{value}" for name, value in facts.items())


# -- the command line of every script ---------------------------------------------------------------------------------


def arguments(description, rounds, steps=None, devices=(), sizes=()):
    """The options that the scripts share; with `devices`, also where to compute; with these or `sizes`, --quick."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side (%(default)s)")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="timed steps in a turn (%(default)s)")
        parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so many (%(default)s)")
        parser.add_argument("--rest", type=float, default=0.2, help="seconds of quiet before a turn (%(default)s)")
        parser.add_argument("--one-process", action="store_true", help="all sides in one process, to see what that costs")
        parser.add_argument("--keep-memory", action="store_true",
                            help="let the C library keep freed memory in all sides (glibc): no page faults in a step")
        parser.add_argument("--only", metavar="TEXT", default="", help="only sides with TEXT in their name")
        parser.add_argument("--worker", help=argparse.SUPPRESS)
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="where all sides compute (%(default)s)")
    for key in sizes:
        parser.add_argument(f"--{key}", type=int, default=sizes[key], help="(%(default)s)")
    if devices or sizes:
        parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 steps: shows that it runs, measures nothing")
    parser.set_defaults(sizes=list(sizes))
    parser.add_argument("--threads", type=int, help="cores that a side may use (all); Linux only")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    return parser


def keep_to(threads):
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # every thread pool counts these


def run(script, description, sides, report, rounds, steps, facts=lambda *device: {}, devices=(),
        sizes=None):
    """A whole script: as a worker serve one side; otherwise measure all sides, print the report and write the JSON.

    Ends with exit code 1 if a side stopped.

    Parameters
    ----------
    sides : dict of str to callable
        Each sets its side up, in the process that it will run in, and returns what `timed` makes. With `devices`, a function
        of the device and of --quick that gives the dict.
    report : callable
        Takes the results, prints tables, and returns the comparisons.
    facts : callable
        Gives more lines for the description of the machine, or ends the run if the machine will not do. With `devices`, it
        takes the device.
    devices : sequence of str
        The choices of --device.
    sizes : dict of str to int, optional
        What the sides compute with, each an option of its name; what was chosen is written into it, here and in every worker.
        With --quick the smaller of that and 4.
    """
    options = arguments(description, rounds, steps, devices, sizes or {}).parse_args()
    keep_to(options.threads)
    for key in options.sizes:
        sizes[key] = min(getattr(options, key), 4 if options.quick else math.inf)
    given = ()
    if devices:
        given = options.device,
        sides = sides(options.device, options.quick)
    if getattr(options, "quick", False):
        options.rounds, options.steps, options.rest = 1, 2, 0.0
    if options.worker:
        return serve(sides[options.worker])
    extra = facts(*given)
    described = {**machine_from_child(options.threads), **extra}
    print(f"{description.splitlines()[0]}\n\n{show(described)}\n")
    chosen = {name: setup for name, setup in sides.items() if options.only in name}
    results = measure(script, chosen, options)
    where = "all in one process" if options.one_process else "each side in its own process"
    options.rounds = max(map(len, results.values()), default=0)
    print(f"{options.rounds} rounds; in each, every side in turn takes {options.steps} timed steps, {where}, "
          f"after {options.rest:g} s of rest{', freed memory kept' if options.keep_memory else ''}\n")
    comparisons = report(results)
    others = [result["others"] for rounds in results.values() for result in rounds] or [0.0]
    print(f"\nOther processes took {statistics.mean(others):.0%} of all cores during the turns (at worst {max(others):.0%}); "
          "the figures count if this is near 0")
    stopped = [name for name in chosen if name not in results]
    write_json(options, described, {"sides": results, "comparisons": comparisons, "stopped": stopped})
    if stopped:
        sys.exit(f"stopped and left out: {', '.join(stopped)}")


def write_json(options, facts, figures):
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "worker")}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": facts, "settings": settings, **figures}, file, indent=1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    own = argparse.ArgumentParser(description="The machine and the versions that benchmark figures depend on.")
    own.add_argument("--json", action="store_true", help="as JSON")
    own.add_argument("--threads", type=int, help="cores that a side may use (all)")
    chosen = own.parse_args()
    keep_to(chosen.threads)
    print(json.dumps(machine()) if chosen.json else show(machine()))
