"""Check every LoRA gradient: four independent oracles, a Taylor test, and a planted mistake that must be noticed.

    python demos/check_gradients.py                                  5 rows, 7 inputs, 6 outputs, rank 2
    python demos/check_gradients.py --quick                          half as many entries to differentiate by
    python demos/check_gradients.py --n 32 --d-in 64 --d-out 48 --r 8

The loss is L = mean((silu(y) - t)^2) with y = x W^T + b + s (x A^T) B^T. All of dA, dB, dx, dW and db are checked, in
float64, at a random point and again after 20 steps of Adam. B is not zero there: at B = 0, where training starts, dA is
zero, and so is many a wrong formula for it. The sizes differ by default, so that a forgotten transpose does not fit.

Writes report.json and report.png. Exit codes: 0 passed, 2 wrong usage, 3 a check failed, 130 interrupted.
"""

import math
import sys

from showing import console, check_gradients as pages  # first: it says how to install minilora

import minilora
import numpy
from minilora import ops, testing

SETTINGS = {  # name: (full size, --quick, meaning)
    "n": (5, 3, "rows"),
    "d_in": (7, 5, "inputs"),
    "d_out": (6, 4, "outputs"),
    "r": (2, 2, "rank"),
    "lora_alpha": (4.0, 4.0, "s = lora_alpha / r"),
    "lora_dropout": (0.0, 0.0, "in [0, 1)"),
}
STEPS, LR = 20, 0.05  # of Adam, between the first and the second check
TOLERANCE = 1e-9  # relative, in float64: rounding is near 1e-15, and a mistake in a formula near 1


def loss_of(y, target):
    """L = mean((silu(y) - t)^2), silu(y) = y / (1 + e^-y): a curve, since differences are exact for straight lines."""
    return ops.mse(ops.silu(y), minilora.Tensor(target.data.astype(y.dtype)))  # a complex step makes y complex


class Problem:
    """A LoRA layer with everything trainable, an input and a target, all random."""

    def __init__(self, config):
        rng = numpy.random.default_rng(config.seed)
        self.layer = minilora.lora.Linear(config.d_in, config.d_out, r=config.r, lora_alpha=config.lora_alpha,
                                          lora_dropout=config.lora_dropout, dtype="float64", rng=rng)
        self.x = minilora.Parameter(minilora.to_device(rng.standard_normal((config.n, config.d_in))))
        self.target = minilora.tensor(rng.uniform(-1.0, 1.0, (config.n, config.d_out)))
        self.layer.lora_B.data = minilora.to_device(rng.standard_normal((config.d_out, config.r)))
        self.layer.requires_grad(True)  # the frozen weight and bias too
        self.leaves = {"dx": self.x, "dW": self.layer.weight, "db": self.layer.bias,
                       "dA": self.layer.lora_A, "dB": self.layer.lora_B}
        self.parameters = [(path.split(".")[-1], p) for path, p in self.layer.named_parameters()]

    def loss(self, x):
        self.layer.lora_dropout.step = 0  # the same mask in every pass
        return loss_of(self.layer(x), self.target)

    def dropped(self, x):
        """What the low-rank branch sees: x, or what the layer's dropout leaves of it."""
        dropout = self.layer.lora_dropout
        return ops.dropout(x, dropout.p, dropout.seed, 1) if dropout.p else x

    def train(self):
        """A few steps of Adam on A and B, with the base frozen as usual; the loss before and after."""
        before = self.loss(self.x).item()
        for p in (self.x, self.layer.weight, self.layer.bias):
            p.trainable = False
        optimizer = minilora.optim.Adam([self.layer.lora_A, self.layer.lora_B], lr=LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(self.x).backward()
            optimizer.step()
        self.layer.requires_grad(True)
        self.x.trainable = True
        return before, self.loss(self.x).item()


def gradients(loss, leaves):
    """Host copies of the gradients of a loss: {name: array}."""
    for p in leaves.values():
        p.grad = None
    loss.backward()
    return {name: minilora.to_host(p.grad).copy() for name, p in leaves.items()}


# -- the oracles: each gives every gradient in its own way ------------------------------------------------------------


def from_plain_ops(problem):
    """The same layer composed from products, transposes and sums: the chain rule in the place of the derivation."""
    x, W, b, A, B = problem.leaves.values()
    y = x @ W.T + b + problem.layer.scaling * (problem.dropped(x) @ (B @ A).T)
    return gradients(loss_of(y, problem.target), problem.leaves)


def from_merged_weight(problem):
    """With D = s B A and G = dL/dD: dA = s B^T G and dB = s G A^T. Without dropout, D is merged into the weight."""
    x, W, b, A, B = problem.leaves.values()
    s, D = problem.layer.scaling, minilora.Parameter(problem.layer.delta())
    if problem.layer.lora_dropout.p:
        y = ops.linear(x, W, b) + ops.linear(problem.dropped(x), D)
    else:
        y = ops.linear(x, W + D, b)
    found = gradients(loss_of(y, problem.target), {"dx": x, "dW": W, "db": b, "G": D})
    G = found.pop("G")
    return {**found, "dA": s * B.numpy().T @ G, "dB": s * G @ A.numpy().T}


def from_numpy_sums(problem):
    """The sums of the derivation, letter by letter: n a row, k an output, i an input, j a rank. No engine, no @."""
    x, W, b, A, B = (p.numpy() for p in problem.leaves.values())
    s, t, sum_of = problem.layer.scaling, problem.target.numpy(), numpy.einsum
    mask = problem.dropped(minilora.tensor(numpy.ones_like(x))).numpy()  # with dropout 0 or 1/(1 - p), else 1
    z = sum_of("ni,ji->nj", x * mask, A)
    y = sum_of("ni,ki->nk", x, W) + b + s * sum_of("nj,kj->nk", z, B)
    p, q = numpy.exp(-numpy.logaddexp(0.0, -y)), numpy.exp(-numpy.logaddexp(0.0, y))  # 1 / (1 + e^-y), and 1 - p
    dy = 2.0 / y.size * (y * p - t) * (p + y * p * q)
    u = sum_of("nk,kj->nj", dy, B)
    return {"dx": sum_of("nk,ki->ni", dy, W) + s * mask * sum_of("nj,ji->ni", u, A), "dW": sum_of("nk,ni->ki", dy, x),
            "db": sum_of("nk->k", dy), "dA": s * sum_of("nj,ni->ji", u, x * mask), "dB": s * sum_of("nk,nj->kj", dy, z)}


ORACLES = {"plain ops": from_plain_ops, "merged weight": from_merged_weight, "NumPy sums": from_numpy_sums}


def check(problem, record):
    """Fill the table of one point: {gradient: {oracle: relative error}}, whether all passed, and the Taylor test."""
    report = testing.gradcheck(problem.loss, problem.x, parameters=problem.parameters, rtol=TOLERANCE)
    errors = [row.error for row in report.rows] or [math.inf] * 5
    record["errors"] = {name: {"complex step": error} for name, error in zip(problem.leaves, errors)}
    record["complaints"] = [] if report else [str(report)]
    mine = gradients(problem.loss(problem.x), problem.leaves)
    for oracle, give in ORACLES.items():
        reference = give(problem)
        for name in problem.leaves:
            comparison = testing.compare(name, mine[name], reference[name], rtol=TOLERANCE)
            record["errors"][name][oracle] = comparison.relative
            record["complaints"] += [] if comparison else [f"{oracle}: {comparison}"]
    taylor = testing.taylor_test(problem.loss, problem.x, parameters=problem.layer.parameters())
    record["taylor"] = pages.taylor_record(taylor)
    record["complaints"] += [] if taylor else [str(taylor)]
    record["passed"] = not record["complaints"]


def plant(problem):
    """Double the gradient of the low-rank branch without changing its value: do the checks notice?"""
    def wrong_loss(x):
        layer.lora_dropout.step = 0
        update = layer.update(x)
        return loss_of(ops.linear(x, layer.weight, layer.bias) + 2.0 * update - update.detach(), problem.target)

    layer = problem.layer
    report = testing.gradcheck(wrong_loss, problem.x, parameters=problem.parameters)
    taylor = testing.taylor_test(wrong_loss, problem.x, parameters=layer.parameters())
    B, layer.lora_B.data = layer.lora_B.data, layer.lora_B.data * 0.0
    at_zero = testing.gradcheck(wrong_loss, problem.x, parameters=problem.parameters)
    layer.lora_B.data = B
    guesses = {name: {"B random": report[name].guess, "B = 0": at_zero[name].guess} for name in ("lora_A", "lora_B")}
    return {"guesses": guesses, "taylor": pages.taylor_record(taylor),
            "passed": not (report["lora_A"].passed or report["lora_B"].passed)}


def error_curves(problem, every):
    """The relative error of three numerical derivatives along one direction v, for steps h from 0.3 to 1e-16.

    Four steps h for each power of ten, or every second one of them, or every fourth.
    """
    rng = numpy.random.default_rng(problem.x.size)
    start = [p.numpy() for p in problem.leaves.values()]
    v = [rng.standard_normal(p.shape) / math.sqrt(sum(p.size for p in start)) for p in start]  # a length of about 1
    g = gradients(problem.loss(problem.x), problem.leaves)
    slope = sum(float((part * dp).sum()) for part, dp in zip(v, g.values()))

    @minilora.no_grad()
    def L(h):
        for p, data, part in zip(problem.leaves.values(), start, v):
            p.data = minilora.to_device(data + h * part)
        return problem.loss(problem.x).item()

    steps = [10.0 ** (-k / 4) for k in range(2, 65, every)]
    found = {"forward": [(L(h) - L(0.0)) / h for h in steps],
             "central": [(L(h) - L(-h)) / (2 * h) for h in steps],
             "complex": [L(1j * h).imag / h for h in steps]}
    return {"h": steps, **{name: [abs(d - slope) / abs(slope) for d in ds] for name, ds in found.items()}}


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("check_gradients", __doc__.split("\n")[0], SETTINGS)
    problems = [f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}"
                for name in ("n", "d_in", "d_out", "r") if getattr(config, name) < 1]
    if not 0.0 <= config.lora_dropout < 1.0:
        problems.append(f"--lora-dropout must be in [0, 1), got {config.lora_dropout:g}")
    console.refuse(parser, config, problems, nonzero=("lora_alpha",))
    return config


def run(config, report):
    """All checks, in four parts. The report grows with every part."""
    problem = Problem(config)
    report["scaling"] = problem.layer.scaling
    print(console.title(pages.title(report)) + "\n" + pages.LEGEND)

    console.heading("1. At a random point, B not zero")
    check(problem, report.setdefault("start", {}))
    print(pages.error_table(report["start"], problem.leaves, TOLERANCE))

    report["loss"] = dict(zip(("before", "after"), problem.train()))
    console.heading(f"2. After {STEPS} steps of Adam on A and B: loss {report['loss']['before']:.4f} -> "
                    f"{report['loss']['after']:.4f}")
    check(problem, report.setdefault("trained", {}))
    print(pages.error_table(report["trained"], problem.leaves, TOLERANCE))

    console.heading("3. Taylor test: what the gradient g leaves unexplained")
    print(pages.taylor_table(report))

    console.heading("4. Would a mistake be noticed? dA and dB doubled on purpose")
    report["planted"] = plant(problem)
    print(pages.planted_text(report["planted"]))
    report["curves"] = error_curves(problem, every=4 if config.quick else 1)  # last: it leaves the parameters elsewhere


def main():
    config = parse()
    report = console.begun(config, dtype="float64", tolerance=TOLERANCE)
    with console.reporting(report):
        run(config, report)
        report["passed"] = all(report[part]["passed"] for part in ("start", "trained", "planted"))
        report["status"] = "passed" if report["passed"] else "failed"
    print("\n" + pages.verdict(report) + "\n" + pages.draw(report))
    return 0 if report["passed"] else 3


if __name__ == "__main__":
    sys.exit(console.run(main, "check_gradients.py"))
