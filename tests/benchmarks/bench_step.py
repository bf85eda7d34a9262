"""One training step of the synthetic shift: minilora against torch and peft on the CPU.

The step: draw 128 of 10,000 rows, gather them, forward, mean-squared error, backward, Adam with its defaults; float32,
1001 inputs, 1000 outputs, rank 1. Every side draws its own indices (with replacement) and gathers its own batch, from
the same data, starting at the same weights. "cached frozen output" trains the low-rank branch against what the frozen
layer leaves over: x W^T is computed once for all 10,000 rows, kept (40 MB), and no longer part of a step.

How the sides alternate, and why in processes of their own: alternate.py.
"""

import numpy

from alternate import comparison_table, compare, median, quartiles, recorded, run, table, timed

N, BATCH, D_IN, D_OUT, R, ALPHA = 10_000, 128, 1001, 1000, 1, 1
CHECKED = 1_000  # rows on which the loss is shown after the last turn: all sides train alike
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8  # Adam's defaults, for the hand-written loop


def data():
    """X (N, in), Y = X (theta + 1) (N, out), the trained weight W = theta^T (out, in) and a start for A (r, in)."""
    rng = numpy.random.default_rng(0)
    theta = rng.standard_normal((D_IN, D_OUT), dtype="float32")
    X = rng.standard_normal((N, D_IN), dtype="float32")
    A = rng.standard_normal((R, D_IN), dtype="float32")
    return X, X @ (theta + 1.0), numpy.ascontiguousarray(theta.T), A


# -- minilora ---------------------------------------------------------------------------------------------------------


def minilora_steps(forward, module, X, Y, recorded=False):
    import minilora
    X, Y = minilora.to_device(X), minilora.to_device(Y)
    rng = numpy.random.default_rng(1)
    optimizer = minilora.optim.Adam(module.parameters())

    def with_rows(rows):
        loss = minilora.ops.mse(forward(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    replayed = minilora.record(with_rows)

    def step():
        rows = rng.integers(0, N, BATCH)
        if recorded:
            replayed(rows)
        else:
            with_rows(minilora.to_device(rows))

    @minilora.no_grad()
    def loss():
        return minilora.ops.mse(forward(X[:CHECKED]), Y[:CHECKED]).item()

    return timed(step, minilora.synchronize, loss)


def minilora_base(device, W):
    import minilora
    minilora.use(device)
    base = minilora.nn.Linear(D_IN, D_OUT, bias=False)
    base.load_state_dict({"weight": W})
    return base


def minilora_adapted(device, W, A):
    import minilora
    layer = minilora.lora.adapt(minilora_base(device, W), r=R, lora_alpha=ALPHA)
    layer.lora_A.data = minilora.to_device(A)
    return layer


def minilora_full(device="cpu", recorded=False):
    X, Y, W, _ = data()
    base = minilora_base(device, W)
    return minilora_steps(base, base, X, Y, recorded)


def minilora_lora(device="cpu", recorded=False):
    X, Y, W, A = data()
    layer = minilora_adapted(device, W, A)
    return minilora_steps(layer, layer, X, Y, recorded)


def minilora_cached(device="cpu", recorded=False):
    X, Y, W, A = data()
    layer = minilora_adapted(device, W, A)
    return minilora_steps(layer.update, layer, X, Y - X @ W.T, recorded)


# -- torch and peft ---------------------------------------------------------------------------------------------------


def torch_steps(forward, parameters, X, Y, device, graph=False):
    import torch
    torch.manual_seed(1)
    X, Y = torch.from_numpy(X).to(device), torch.from_numpy(Y).to(device)
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], capturable=graph)

    def step():
        rows = torch.randint(0, N, (BATCH,), device=device)
        loss = torch.nn.functional.mse_loss(forward(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def loss():
        return torch.nn.functional.mse_loss(forward(X[:CHECKED]), Y[:CHECKED]).item()

    return timed(recorded(step) if graph else step, torch.cuda.synchronize if device == "cuda" else lambda: None, loss)


def torch_base(device, W):
    import torch
    base = torch.nn.Linear(D_IN, D_OUT, bias=False)
    base.load_state_dict({"weight": torch.from_numpy(W)})
    return base.to(device)


def torch_full(device="cpu"):
    X, Y, W, _ = data()
    base = torch_base(device, W)
    return torch_steps(base, base.parameters(), X, Y, device)


def torch_article(device="cpu", graph=False):
    """LoRA as the R torch article writes it: the product of A and B is formed, so that autograd forms its gradient."""
    import torch
    X, Y, W, start = data()
    base = torch_base(device, W).requires_grad_(False)
    A = torch.nn.Parameter(torch.from_numpy(start).T.contiguous().to(device))  # (in, r) there
    B = torch.nn.Parameter(torch.zeros(R, D_OUT, device=device))
    return torch_steps(lambda x: base(x) + x @ (A @ B * (ALPHA / R)), [A, B], X, Y, device, graph)


def peft_lora(device="cpu", graph=False):
    import peft
    import torch
    X, Y, W, A = data()
    module = torch.nn.Sequential()
    module.add_module("linear", torch_base(device, W))
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["linear"])
    model = peft.get_peft_model(module, config)
    with torch.no_grad():
        model.base_model.model.linear.lora_A["default"].weight.copy_(torch.from_numpy(A))
    return torch_steps(model, model.parameters(), X, Y, device, graph)


# -- floors -----------------------------------------------------------------------------------------------------------


def numpy_product():
    """The frozen product alone: what no LoRA step without a cache can go below."""
    X, _, W, _ = data()
    x, y = X[:BATCH], numpy.empty((BATCH, D_OUT), "float32")

    def step():
        numpy.matmul(x, W.T, out=y)

    return timed(step)


def torch_product(device="cpu"):
    import torch
    X, _, W, _ = data()
    x, W = torch.from_numpy(X[:BATCH]).to(device), torch.from_numpy(W).to(device)
    y = torch.empty(BATCH, D_OUT, device=device)

    def step():
        torch.mm(x, W.T, out=y)

    return timed(step, torch.cuda.synchronize if device == "cuda" else lambda: None)


def numpy_lora():
    """The LoRA step by hand, for this one case: no graph, no classes, every array made once."""
    X, Y, W, start = data()
    rng = numpy.random.default_rng(1)
    theta = numpy.zeros(R * (D_IN + D_OUT), "float32")  # A and B, their gradients and moments: one flat array each
    g, m, v = (numpy.zeros_like(theta) for _ in range(3))
    A, dA = (a[:R * D_IN].reshape(R, D_IN) for a in (theta, g))
    B, dB = (a[R * D_IN:].reshape(D_OUT, R) for a in (theta, g))
    A[...] = start
    x, y = numpy.empty((BATCH, D_IN), "float32"), numpy.empty((BATCH, D_OUT), "float32")
    target, low_rank = numpy.empty_like(y), numpy.empty_like(y)
    s, t = ALPHA / R, 0

    def step():
        nonlocal t
        rows = rng.integers(0, N, BATCH)
        numpy.take(X, rows, axis=0, out=x, mode="clip")
        numpy.take(Y, rows, axis=0, out=target, mode="clip")
        z = x @ A.T
        numpy.matmul(x, W.T, out=y)
        numpy.matmul(s * z, B.T, out=low_rank)
        numpy.add(y, low_rank, out=y)
        numpy.subtract(y, target, out=y)
        flat = y.reshape(-1)
        flat @ flat / y.size  # the loss
        numpy.multiply(y, 2.0 / y.size, out=y)
        u = y @ B
        numpy.matmul(y.T, s * z, out=dB)
        numpy.matmul((s * u).T, x, out=dA)
        t += 1
        m[...] = BETA1 * m + (1.0 - BETA1) * g
        v[...] = BETA2 * v + (1.0 - BETA2) * g * g
        root_c2 = (1.0 - BETA2 ** t) ** 0.5
        theta[...] -= LR * root_c2 / (1.0 - BETA1 ** t) * m / (numpy.sqrt(v) + EPS * root_c2)

    def loss():
        d = X[:CHECKED] @ W.T + s * (X[:CHECKED] @ A.T) @ B.T - Y[:CHECKED]
        return float((d * d).mean())

    return timed(step, loss=loss)


# -- report -----------------------------------------------------------------------------------------------------------


SIDES = {
    "minilora, full rank": minilora_full,
    "torch, full rank": torch_full,
    "minilora, LoRA": minilora_lora,
    "torch, LoRA as in the article": torch_article,
    "peft, LoRA": peft_lora,
    "minilora, LoRA, cached frozen output": minilora_cached,
    "NumPy, LoRA by hand": numpy_lora,
    "NumPy, frozen product alone": numpy_product,
    "torch, frozen product alone": torch_product,
}
COMPARISONS = [
    ("full rank / torch", "minilora, full rank", "torch, full rank", 0.70),
    ("LoRA / torch as in the article", "minilora, LoRA", "torch, LoRA as in the article", 0.40),
    ("LoRA / peft", "minilora, LoRA", "peft, LoRA", 0.90),
    ("LoRA, cached frozen output / peft", "minilora, LoRA, cached frozen output", "peft, LoRA", 0.25),
]
OVER_FLOORS = [
    ("LoRA / NumPy by hand", "minilora, LoRA", "NumPy, LoRA by hand"),
    ("LoRA / frozen product alone", "minilora, LoRA", "NumPy, frozen product alone"),
    ("LoRA / frozen product alone", "minilora, LoRA", "CuPy, frozen product alone"),
    ("frozen product: NumPy / torch", "NumPy, frozen product alone", "torch, frozen product alone"),
    ("frozen product: CuPy / torch", "CuPy, frozen product alone", "torch, frozen product alone"),
]

PRODUCT = 2 * BATCH * D_IN * D_OUT  # FLOPs of x W^T, and of dy^T x
LOW_RANK = 4 * 2 * BATCH * R * D_IN  # z, s z B^T, u, dA, dB: five thin products, about 1 % of a big one
WEIGHT, ROWS = 4 * D_IN * D_OUT, 4 * BATCH * (D_IN + D_OUT)  # bytes


def floors(name):
    """(FLOPs that the side's formulas need, bytes that must be moved at least: each array once, and Adam's seven)."""
    if "product alone" in name:
        return PRODUCT, WEIGHT + ROWS
    if "full rank" in name:
        return 2 * PRODUCT, ROWS + 7 * WEIGHT
    if "cached" in name:
        return LOW_RANK, ROWS
    if "article" in name:  # x W^T, x (A B) and its gradient; A B itself and what goes back to A and B
        return 3 * PRODUCT + 3 * 2 * R * D_IN * D_OUT, ROWS + 3 * WEIGHT
    return PRODUCT + LOW_RANK, WEIGHT + ROWS


def report(results, goals=True):
    rows = []
    for name, rounds in results.items():
        seconds, (low, high), (flops, moved) = median(rounds), quartiles(rounds), floors(name)
        loss = f"{rounds[-1]['loss']:.1f}" if "loss" in rounds[-1] else ""
        rows.append([name, f"{1e3 * seconds:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}", f"{1e-6 * flops:.1f}",
                     f"{1e-9 * flops / seconds:.0f}", f"{1e-6 * moved:.1f}", f"{median(rounds, 'faults'):.0f}", loss])
    header = ["side", "ms a step", "quartiles", "MFLOP", "GFLOP/s", "MB at least", "page faults", "loss at the end"]
    print(table(header, rows) + "\n")
    chosen = [*(c if goals else c[:3] for c in COMPARISONS), *OVER_FLOORS]
    comparisons = compare(results, chosen)
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=20, steps=50)
