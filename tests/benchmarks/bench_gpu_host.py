"""What one step of the main job costs the host, phase by phase: minilora against torch and peft, on a GPU or the CPU.

    python tests/benchmarks/bench_gpu_host.py

On a GPU the calls return before the work is done, so that these are the microseconds of Python, of the libraries and of the
driver; the device works meanwhile, and less: an eager step of this size takes as long as the host takes to ask for it. On the
CPU (--device cpu) computing counts too. The step, the data and the sides are those of bench_step.py:

    rows        the numbers of 128 rows: minilora draws them on the host and copies, torch draws on the device
    gather      X[rows], Y[rows]
    forward     the layer
    loss        mean squared error
    backward    zero_grad and backward
    step        Adam

A turn gives the median of its steps for every phase, and waits for the device every 20 steps, so that no queue is full.
torch and peft take part where they are installed. How the sides alternate: alternate.py.
"""

import functools
import importlib.util
import time

import bench_step
import numpy
from alternate import card, compare, median, run, table

PHASES = "rows", "gather", "forward", "loss", "backward", "step"
AT_ONCE = 20  # steps that are asked for before the device is waited for

PROBE = """
import json, minilora
problem = minilora.backend.gpu_problem()
if problem:
    raise SystemExit(problem)
import cupy
name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
print(json.dumps({"GPU": f"{name}, CuPy {cupy.__version__}, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}"}))
"""


def phased(phases, synchronize):
    """A function that runs n steps, each a call of all phases in turn, and gives the median seconds of every phase.

    A phase gets what the phase before it gave.
    """
    def run(n):
        clock, times = time.perf_counter, numpy.empty((n, 1 + len(phases)))
        for i in range(n):
            if i % AT_ONCE == 0:
                synchronize()
            given = None
            times[i, 0] = clock()
            for k, phase in enumerate(phases, 1):
                given = phase(given)
                times[i, k] = clock()
        synchronize()
        spent = numpy.median(numpy.diff(times), axis=0)
        return {"seconds": float(numpy.median(times[:, -1] - times[:, 0])), **dict(zip(PHASES, spent.tolist()))}
    return run


def minilora_phases(forward, module, X, Y, recorded=False):
    """In the place of bench_step.minilora_steps."""
    import minilora
    X, Y = minilora.to_device(X), minilora.to_device(Y)
    rng = numpy.random.default_rng(1)
    optimizer = minilora.optim.Adam(module.parameters())

    def backward(loss):
        optimizer.zero_grad()
        loss.backward()

    return phased([
        lambda _: minilora.to_device(rng.integers(0, bench_step.N, bench_step.BATCH)),
        lambda rows: (X[rows], Y[rows]),
        lambda batch: (forward(batch[0]), batch[1]),
        lambda pair: minilora.ops.mse(*pair),
        backward,
        lambda _: optimizer.step(),
    ], minilora.synchronize)


def torch_phases(forward, parameters, X, Y, device, graph=False):
    """In the place of bench_step.torch_steps."""
    import torch
    torch.manual_seed(1)
    X, Y = torch.from_numpy(X).to(device), torch.from_numpy(Y).to(device)
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad])

    def backward(loss):
        optimizer.zero_grad()
        loss.backward()

    return phased([
        lambda _: torch.randint(0, bench_step.N, (bench_step.BATCH,), device=device),
        lambda rows: (X[rows], Y[rows]),
        lambda batch: (forward(batch[0]), batch[1]),
        lambda pair: torch.nn.functional.mse_loss(*pair),
        backward,
        lambda _: optimizer.step(),
    ], torch.cuda.synchronize if device == "cuda" else lambda: None)


def sides(device, quick):
    """Ours, and those of the libraries that are installed."""
    bench_step.minilora_steps, bench_step.torch_steps = minilora_phases, torch_phases
    if quick:
        bench_step.N, bench_step.D_IN, bench_step.D_OUT = 200, 11, 10
    ours = {"minilora, LoRA": bench_step.minilora_lora, "minilora, full": bench_step.minilora_full}
    theirs = {"torch, LoRA": bench_step.torch_article, "torch, full": bench_step.torch_full}
    peft = {"peft, LoRA": bench_step.peft_lora}
    chosen = {name: functools.partial(setup, device) for name, setup in ours.items()}
    there = [importlib.util.find_spec(package) is not None for package in ("torch", "peft")]
    for known, installed in ((theirs, there[0]), (peft, all(there))):
        if installed:
            chosen |= {name: functools.partial(setup, "cuda" if device == "gpu" else device) for name, setup in known.items()}
    return chosen


def report(results):
    print("Microseconds of a step, by phase:\n")
    print(table(["side", *PHASES, "sum"], [
        [name, *(f"{1e6 * median(rounds, phase):.1f}" for phase in (*PHASES, "seconds"))] for name, rounds in results.items()]))
    comparisons = compare(results, [
        ("LoRA / torch, article", "minilora, LoRA", "torch, LoRA"),
        ("LoRA / peft", "minilora, LoRA", "peft, LoRA"),
        ("full / torch", "minilora, full", "torch, full"),
    ])
    for one in comparisons:
        print(f"\n{one['comparison']}: {one['ratio of medians']:.2f}", end="")
    print()
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, sides, report, rounds=3, steps=200, facts=functools.partial(card, PROBE), devices=("gpu", "cpu"))
