"""Adam alone on one float32 tensor of 1 and of 10 million numbers: minilora against torch.optim.Adam with its defaults.

A step moves at least 28 bytes for each number: weight and both moments are read and written, the gradient is read.
How the sides alternate, and why in processes of their own: alternate.py.
"""

from functools import partial

import numpy

from alternate import compare, comparison_table, median, quartiles, run, table, timed

SIZES = {"1M": 1_000_000, "10M": 10_000_000}
BYTES = 7 * 4  # a number


def start(n):
    rng = numpy.random.default_rng(0)
    return rng.standard_normal(n, dtype="float32"), rng.standard_normal(n, dtype="float32")


def minilora_adam(n):
    import minilora
    theta, gradient = start(n)
    w = minilora.Parameter(theta)
    optimizer = minilora.optim.Adam([w])
    (w * gradient).sum().backward()  # leaves the gradient where the optimizer wants it, as in a training step
    return timed(optimizer.step)


def torch_adam(n):
    import torch
    theta, gradient = start(n)
    w = torch.nn.Parameter(torch.from_numpy(theta))
    optimizer = torch.optim.Adam([w])
    w.grad = torch.from_numpy(gradient)
    return timed(optimizer.step)


SIDES = {f"{name}, {size}": partial(setup, n) for size, n in SIZES.items()
         for name, setup in (("minilora", minilora_adam), ("torch", torch_adam))}


def report(results):
    rows = []
    for name, rounds in results.items():
        seconds, (low, high) = median(rounds), quartiles(rounds)
        n = SIZES[name.split(", ")[1]]
        rows.append([name, f"{1e3 * seconds:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}", f"{1e9 * seconds / n:.2f}",
                     f"{1e-6 * BYTES * n:.0f}", f"{1e-9 * BYTES * n / seconds:.1f}"])
    print(table(["side", "ms a step", "quartiles", "ns a number", "MB at least", "GB/s"], rows) + "\n")
    comparisons = compare(results, [(f"Adam, {size} / torch", f"minilora, {size}", f"torch, {size}", 1.0) for size in SIZES])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=20, steps=15)
