"""Every op, layer, optimizer and schedule against PyTorch's, in float64. Run with -m parity, where torch is installed.

Dropout is left out: its masks are our own.
"""
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import lora, nn, ops, optim

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def positive(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 3.0, shape)


def assert_close(got, expected, name, tolerance=1e-10):
    got, expected = fetch(got), expected.detach().numpy()
    assert got.shape == expected.shape, f"{name}: {got.shape}, torch {expected.shape}"
    scale = np.abs(expected).max(initial=0.0)
    assert np.abs(got - expected).max(initial=0.0) <= tolerance * scale, name


def compare(torch, ours, theirs, arrays, parameters=()):
    """Output and every gradient, under one random cotangent. `parameters` are pairs (ours, theirs)."""
    leaves = [minilora.Parameter(place(a)) for a in arrays]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_torch = ours(*leaves), theirs(*tensors)
    assert_close(y, y_torch, "output")
    dy = draw(*y.shape, seed=99)
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    for i, (leaf, tensor) in enumerate([*zip(leaves, tensors), *parameters]):
        assert_close(leaf.grad, tensor.grad, f"gradient {i}")


# -- ops ----------------------------------------------------------------------------------------------------

X, Y, ROW = (3, 4, 5), (3, 4, 5), (4, 1)
INDEX = np.array([2, 0, 2, 1, 2])

# id: arrays, ours, theirs(torch, *tensors)
OPS = {
    "add": ([draw(*X), draw(*Y, seed=1)], ops.add, lambda t, x, y: x + y),
    "add broadcast": ([draw(*X), draw(*ROW, seed=1)], ops.add, lambda t, x, y: x + y),
    "add number": ([draw(*X)], lambda x: ops.add(x, 1.5), lambda t, x: x + 1.5),
    "sub": ([draw(*X), draw(*Y, seed=1)], ops.sub, lambda t, x, y: x - y),
    "sub broadcast": ([draw(5), draw(*X, seed=1)], ops.sub, lambda t, x, y: x - y),
    "sub from number": ([draw(*X)], lambda x: 1.5 - x, lambda t, x: 1.5 - x),
    "mul": ([draw(*X), draw(*Y, seed=1)], ops.mul, lambda t, x, y: x * y),
    "mul broadcast": ([draw(*X), draw(*ROW, seed=1)], ops.mul, lambda t, x, y: x * y),
    "mul by itself": ([draw(*X)], lambda x: ops.mul(x, x), lambda t, x: x * x),
    "div": ([draw(*X), positive(*Y, seed=1)], ops.div, lambda t, x, y: x / y),
    "div broadcast": ([draw(1, 5), positive(*X, seed=1)], ops.div, lambda t, x, y: x / y),
    "div number": ([positive(*X)], lambda x: 2.0 / x, lambda t, x: 2.0 / x),
    "neg": ([draw(*X)], ops.neg, lambda t, x: -x),
    "pow 3": ([draw(*X)], lambda x: ops.pow(x, 3), lambda t, x: x ** 3),
    "pow -0.5": ([positive(*X)], lambda x: ops.pow(x, -0.5), lambda t, x: x ** -0.5),
    "pow 0": ([draw(*X)], lambda x: ops.pow(x, 0), lambda t, x: x ** 0),
    "exp": ([draw(*X)], ops.exp, lambda t, x: t.exp(x)),
    "log": ([positive(*X)], ops.log, lambda t, x: t.log(x)),
    "sqrt": ([positive(*X)], ops.sqrt, lambda t, x: t.sqrt(x)),
    "sum": ([draw(*X)], ops.sum, lambda t, x: x.sum()),
    "sum axis": ([draw(*X)], lambda x: ops.sum(x, 1), lambda t, x: x.sum(1)),
    "sum axes": ([draw(*X)], lambda x: ops.sum(x, (0, -1), True), lambda t, x: x.sum((0, -1), keepdim=True)),
    "mean": ([draw(*X)], ops.mean, lambda t, x: x.mean()),
    "mean axis": ([draw(*X)], lambda x: ops.mean(x, -2, True), lambda t, x: x.mean(-2, keepdim=True)),
    "mean axes": ([draw(*X)], lambda x: ops.mean(x, (0, 2)), lambda t, x: x.mean((0, 2))),
    "reshape": ([draw(*X)], lambda x: ops.reshape(x, (6, -1)), lambda t, x: x.reshape(6, -1)),
    "transpose": ([draw(*X)], lambda x: ops.transpose(x, (2, 0, 1)), lambda t, x: x.permute(2, 0, 1)),
    "transpose all": ([draw(*X)], ops.transpose, lambda t, x: x.permute(2, 1, 0)),
    "getitem slice": ([draw(*X)], lambda x: x[1:, ::2, -1], lambda t, x: x[1:, ::2, -1]),
    "getitem repeated": ([draw(3, 4)], lambda x: x[place(INDEX)], lambda t, x: x[t.tensor(INDEX)]),
    "concatenate": ([draw(3, 2), draw(3, 4, seed=1)], lambda x, y: ops.concatenate([x, y, x], 1),
                    lambda t, x, y: t.cat([x, y, x], 1)),
    "matmul": ([draw(3, 4), draw(4, 5, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "matmul 3-D": ([draw(2, 3, 4), draw(4, 5, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "matmul batches": ([draw(6, 1, 3, 4), draw(2, 4, 5, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "linear": ([draw(6, 4), draw(5, 4, seed=1), draw(5, seed=2)], ops.linear,
               lambda t, x, W, b: t.nn.functional.linear(x, W, b)),
    "linear 3-D": ([draw(2, 3, 4), draw(5, 4, seed=1)], ops.linear, lambda t, x, W: t.nn.functional.linear(x, W)),
    "relu": ([draw(*X)], ops.relu, lambda t, x: t.relu(x)),
    "tanh": ([3 * draw(*X)], ops.tanh, lambda t, x: t.tanh(x)),
    "sigmoid": ([9 * draw(*X)], ops.sigmoid, lambda t, x: t.sigmoid(x)),
    "silu": ([9 * draw(*X)], ops.silu, lambda t, x: t.nn.functional.silu(x)),
    "gelu": ([3 * draw(*X)], ops.gelu, lambda t, x: t.nn.functional.gelu(x, approximate="tanh")),
    "softmax": ([9 * draw(*X)], ops.softmax, lambda t, x: t.softmax(x, -1)),
    "softmax axis": ([draw(*X)], lambda x: ops.softmax(x, 1), lambda t, x: t.softmax(x, 1)),
    "log_softmax": ([9 * draw(*X)], ops.log_softmax, lambda t, x: t.log_softmax(x, -1)),
    "log_softmax axis": ([draw(*X)], lambda x: ops.log_softmax(x, 0), lambda t, x: t.log_softmax(x, 0)),
    "mse": ([draw(6, 3), draw(6, 3, seed=1)], ops.mse, lambda t, x, y: t.nn.functional.mse_loss(x, y)),
}


@pytest.mark.parametrize("arrays, ours, theirs", OPS.values(), ids=OPS)
def test_op(device, torch, arrays, ours, theirs):
    compare(torch, ours, lambda *tensors: theirs(torch, *tensors), arrays)


def test_every_op_is_compared():
    # Other rooms have files of their own beside this one. Dropout draws other numbers than torch; torch has no disentangled
    # attention, which test_models_deberta.py compares inside of transformers' model; the check of settings computes nothing.
    files = [*Path(__file__).parent.glob("test_torch*.py"), *Path(__file__).parent.glob("test_models*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    functions = {name for name in ops.__all__ if name.islower()} - {"dropout", "disentangled_attention", "check_rotary_scaling"}
    assert [name for name in sorted(functions) if not re.search(rf"\b{name}\b", sources)] == []


def test_extreme_values(device, torch):
    x = np.array([[-1e4, 0.0, 1e4], [700.0, 710.0, -745.0], [1e-300, 0.0, -1e-300]])
    for ours, theirs in ((ops.softmax, lambda x: torch.softmax(x, -1)), (ops.sigmoid, torch.sigmoid),
                         (ops.log_softmax, lambda x: torch.log_softmax(x, -1)), (ops.tanh, torch.tanh)):
        compare(torch, ours, theirs, [x])


# -- layers -------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "ReLU": (nn.ReLU, lambda t: t.nn.ReLU()), "Tanh": (nn.Tanh, lambda t: t.nn.Tanh()),
    "Sigmoid": (nn.Sigmoid, lambda t: t.nn.Sigmoid()), "SiLU": (nn.SiLU, lambda t: t.nn.SiLU()),
    "GELU": (nn.GELU, lambda t: t.nn.GELU(approximate="tanh")),
    "Softmax": (lambda: nn.Softmax(1), lambda t: t.nn.Softmax(1)),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), lambda t: t.nn.LogSoftmax(1)),
    "MSELoss": (nn.MSELoss, lambda t: t.nn.MSELoss()),
}


@pytest.mark.parametrize("ours, theirs", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_layer_without_parameters(device, torch, ours, theirs):
    arrays = [draw(6, 5), draw(6, 5, seed=1)] if ours is nn.MSELoss else [2 * draw(6, 5, 2)]
    compare(torch, ours(), theirs(torch), arrays)


def copied(torch, layer, other):
    """Our parameters, written into torch's module of the same names; pairs of both."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            theirs[name].copy_(torch.tensor(value))
    return [(p, theirs[name]) for name, p in layer.named_parameters()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (4,)], ids=str)
def test_linear(device, torch, shape, bias):
    layer = nn.Linear(4, 3, bias, dtype="float64", rng=np.random.default_rng(1))
    other = torch.nn.Linear(4, 3, bias, dtype=torch.float64)
    compare(torch, layer, other, [draw(*shape)], copied(torch, layer, other))


def test_linear_starts_in_torchs_range(torch):
    ours, theirs = nn.Linear(50, 200, rng=np.random.default_rng(1)), torch.nn.Linear(50, 200)
    for p, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        for sample in (fetch(p), other.detach().numpy()):
            assert 0.9 / math.sqrt(50) < np.abs(sample).max() <= np.float32(1 / math.sqrt(50))


def test_deep_model(device, torch):
    rng = np.random.default_rng(2)
    model = nn.Sequential(nn.Linear(6, 8, dtype="float64", rng=rng), nn.GELU(),
                          nn.Sequential(nn.Linear(8, 5, dtype="float64", rng=rng), nn.SiLU()),
                          nn.Linear(5, 3, False, dtype="float64", rng=rng), nn.LogSoftmax())
    t = torch.nn
    other = t.Sequential(t.Linear(6, 8), t.GELU("tanh"), t.Sequential(t.Linear(8, 5), t.SiLU()), t.Linear(5, 3, False),
                         t.LogSoftmax(-1)).double()
    assert list(model.state_dict()) == list(other.state_dict())
    compare(torch, model, other, [draw(7, 6)], copied(torch, model, other))


@pytest.mark.parametrize("adapted", [False, True], ids=["Linear", "adapt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)], ids=str)
def test_lora_linear(device, torch, shape, bias, adapted):
    rng = np.random.default_rng(3)
    layer = lora.Linear(7, 4, r=3, lora_alpha=5, bias=bias, dtype="float64", rng=rng)
    if adapted:
        layer = lora.adapt(nn.Linear(7, 4, bias, dtype="float64", rng=rng), r=3, lora_alpha=5, rng=rng)
    layer.lora_B.data[...] = place(rng.standard_normal((4, 3)))
    layer.requires_grad()
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in layer.state_dict().items()}

    def theirs(x):
        linear = torch.nn.functional.linear
        y = linear(x, tensors["weight"], tensors.get("bias"))
        A, B = (tensors[f"adapters.default.{name}"] for name in ("lora_A", "lora_B"))
        return y + linear(linear(x, A), B) * (5 / 3)

    compare(torch, layer, theirs, [draw(*shape)], [(p, tensors[name]) for name, p in layer.named_parameters()])


# -- optimizers ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": ("SGD", dict(lr=0.1)),
    "SGD momentum": ("SGD", dict(lr=0.05, momentum=0.9)),
    "SGD momentum and decay": ("SGD", dict(lr=0.05, momentum=0.8, weight_decay=0.03)),
    "Adam": ("Adam", dict(lr=0.05)),
    "Adam settings": ("Adam", dict(lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05)),
    "AdamW": ("AdamW", dict(lr=0.05)),
    "AdamW settings": ("AdamW", dict(lr=0.02, betas=(0.7, 0.99), eps=1e-5, weight_decay=0.2)),
}


@pytest.mark.parametrize("gaps", [False, True], ids=["all", "gaps"])
@pytest.mark.parametrize("name, options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_over_50_steps(device, torch, name, options, gaps):
    shapes = [(4, 3), (4,), (2, 5), ()]
    ours = [minilora.Parameter(place(draw(*shape, seed=i))) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(torch.tensor(draw(*shape, seed=i))) for i, shape in enumerate(shapes)]
    groups = [{"params": slice(0, 2)}, {"params": slice(2, 4), "lr": 0.3 * options["lr"]}]
    optimizer = getattr(optim, name)([{**g, "params": ours[g["params"]]} for g in groups], **options)
    other = getattr(torch.optim, name)([{**g, "params": theirs[g["params"]]} for g in groups], **options)
    for step in range(50):
        optimizer.zero_grad()
        other.zero_grad()
        for i, (p, q) in enumerate(zip(ours, theirs)):
            if gaps and (step + i) % 3 == 0:
                continue
            g = draw(*shapes[i], seed=1000 + 10 * step + i)
            (p * place(g)).sum().backward()
            q.grad = torch.tensor(g)
        optimizer.step()
        other.step()
        for i, (p, q) in enumerate(zip(ours, theirs)):
            assert_close(p, q, f"parameter {i} after step {step}", 1e-13 * (step + 2))


@pytest.mark.parametrize("name, options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_a_model_for_50_steps(device, torch, name, options):
    """Gradients by both engines too: what differs in the last digit may grow, so the bound is wider."""
    rng = np.random.default_rng(5)
    model = nn.Sequential(nn.Linear(5, 6, dtype="float64", rng=rng), nn.Tanh(),
                          nn.Linear(6, 2, dtype="float64", rng=rng))
    t = torch.nn
    other_model = t.Sequential(t.Linear(5, 6), t.Tanh(), t.Linear(6, 2)).double()
    pairs = copied(torch, model, other_model)
    optimizer = getattr(optim, name)(model.parameters(), **options)
    other = getattr(torch.optim, name)(other_model.parameters(), **options)
    for step in range(50):
        x, target = draw(9, 5, seed=step), draw(9, 2, seed=step + 500)
        optimizer.zero_grad()
        loss = ops.mse(model(minilora.Tensor(place(x))), place(target))
        loss.backward()
        optimizer.step()
        other.zero_grad()
        loss_torch = t.functional.mse_loss(other_model(torch.tensor(x)), torch.tensor(target))
        loss_torch.backward()
        other.step()
        assert_close(loss, loss_torch, f"loss {step}")
    for i, (p, q) in enumerate(pairs):
        assert_close(p, q, f"parameter {i}")


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clip_grad_norm(device, torch, max_norm):
    """Torch adds 1e-6 to the norm before it divides, so its gradients are shorter by about 1e-6."""
    gradients = [draw(4, 3), draw(5, seed=1)]
    ours = [minilora.Parameter(place(np.zeros(g.shape))) for g in gradients]
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    optimizer = optim.SGD(ours, lr=0.1)
    for p, q, g in zip(ours, theirs, gradients):
        (p * place(g)).sum().backward()
        q.grad = torch.tensor(g)
    norm = optimizer.clip_grad_norm(max_norm)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm), "norm", 1e-14)
    for p, q in zip(ours, theirs):
        assert_close(p.grad, q.grad, "gradient", 1e-6)


SCHEDULES = {
    "cosine": (lambda: optim.cosine(20), lambda t, o: t.CosineAnnealingLR(o, 20)),
    "cosine to a tenth": (lambda: optim.cosine(20, final=0.1), lambda t, o: t.CosineAnnealingLR(o, 20, eta_min=0.05)),
    "linear": (lambda: optim.linear(10, final=0.25), lambda t, o: t.LinearLR(o, 1.0, 0.25, 10)),
    "step_decay": (lambda: optim.step_decay(3, 0.5), lambda t, o: t.StepLR(o, 3, 0.5)),
    "constant": (optim.constant, lambda t, o: t.ConstantLR(o, 1.0)),
}


@pytest.mark.parametrize("ours, theirs", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(torch, ours, theirs):
    optimizer = optim.SGD([minilora.Parameter(np.zeros(2))], lr=0.5)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    scheduler, other_scheduler = optim.Scheduler(optimizer, ours()), theirs(torch.optim.lr_scheduler, other)
    for _ in range(20):
        ours_now, theirs_now = optimizer.groups[0].settings["lr"], other.param_groups[0]["lr"]
        assert math.isclose(ours_now, theirs_now, rel_tol=1e-13, abs_tol=1e-17)
        other.step()
        scheduler.step()
        other_scheduler.step()
