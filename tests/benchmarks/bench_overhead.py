"""What a node of the graph costs: a chain of 1,000 additions on 4 numbers, forward and backward, against torch.

Four float32 numbers take no time to add, so that what is timed is bookkeeping. Two chains start at a parameter x:
y = y + c with a constant c, and y = y + p with a second parameter p, which gathers 1,000 contributions to its gradient.
How the sides alternate, and why in processes of their own: alternate.py.
"""

import time
from functools import partial

import numpy

from alternate import compare, comparison_table, median, quartiles, run, table

NODES, WIDTH = 1_000, 4


def chain(x, c, ones, zero):
    """A function that runs n chains and gives the seconds of one, forward and backward apart."""
    def run(n):
        forward = backward = 0.0
        for _ in range(n):
            zero()
            start = time.perf_counter()
            y = x
            for _ in range(NODES):
                y = y + c
            middle = time.perf_counter()
            y.backward(ones)
            end = time.perf_counter()
            forward, backward = forward + middle - start, backward + end - middle
        return {"seconds": (forward + backward) / n, "forward": forward / n, "backward": backward / n}
    return run


def minilora_chain(second_parameter):
    import minilora
    x = minilora.Parameter(numpy.ones(WIDTH, "float32"))
    c = (minilora.Parameter if second_parameter else minilora.Tensor)(numpy.ones(WIDTH, "float32"))

    def zero():
        x.grad = None
        if second_parameter:
            c.grad = None

    return chain(x, c, numpy.ones(WIDTH, "float32"), zero)


def torch_chain(second_parameter):
    import torch
    x = torch.nn.Parameter(torch.ones(WIDTH))
    c = torch.nn.Parameter(torch.ones(WIDTH), requires_grad=second_parameter)

    def zero():
        x.grad = c.grad = None

    return chain(x, c, torch.ones(WIDTH), zero)


CHAINS = {"y + constant": False, "y + parameter": True}
SIDES = {f"{name}, {label}": partial(setup, second) for label, second in CHAINS.items()
         for name, setup in (("minilora", minilora_chain), ("torch", torch_chain))}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{1e3 * median(rounds):.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}",
                     *(f"{1e9 * median(rounds, part) / NODES:.0f}" for part in ("forward", "backward"))])
    print(table(["side", "ms a chain", "quartiles", "ns a node, forward", "ns a node, backward"], rows) + "\n")
    parts = ("both ways", 1.0, "seconds"), ("forward", None, "forward"), ("backward", None, "backward")
    comparisons = compare(results, [(f"{label}, {part} / torch", f"minilora, {label}", f"torch, {label}", goal, key)
                                    for label in CHAINS for part, goal, key in parts])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=20, steps=30)
