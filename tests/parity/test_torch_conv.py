"""Convolutions, pooling and upsampling against PyTorch's, in float64, over a drawn set of settings. Run with -m parity."""
import warnings

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import nn, ops

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


def assert_close(got, expected, name):
    got, expected = fetch(got), expected.detach().numpy()
    assert got.shape == expected.shape, f"{name}: {got.shape}, torch {expected.shape}"
    assert np.abs(got - expected).max(initial=0.0) <= 1e-10 * np.abs(expected).max(initial=0.0), name


def compare(torch, ours, theirs, arrays, parameters=()):
    """Output and every gradient, under one random cotangent. `parameters` are pairs (ours, theirs)."""
    leaves = [minilora.Parameter(place(a)) for a in arrays]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_torch = ours(*leaves), theirs(*tensors)
    assert_close(y, y_torch, "output")
    dy = np.random.default_rng(99).standard_normal(y.shape)
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    for i, (leaf, tensor) in enumerate([*zip(leaves, tensors), *parameters]):
        assert_close(leaf.grad, tensor.grad, f"gradient {i}")


def drawn_convolution(seed, axes):
    rng = np.random.default_rng(seed)

    def each(low, high):
        return tuple(int(v) for v in rng.integers(low, high + 1, axes))
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    groups = int(rng.choice([1, 1, 2, 3]))
    lengths = [max(1, d * (k - 1) + 1 - 2 * p) + int(rng.integers(0, 9)) for k, p, d in zip(kernel, padding, dilation)]
    per_group, outputs, n = (int(v) for v in rng.integers(1, 5, 3))
    outputs = 1 if seed % 5 == 0 else outputs
    per_group = 1 if seed % 5 < 2 else per_group
    shapes = (n, groups * per_group, *lengths), (groups * outputs, per_group, *kernel), (groups * outputs,)
    settings = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return [rng.standard_normal(shape) for shape in shapes[:2 + seed % 2]], settings


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_convolution(device, torch, seed, axes):
    arrays, settings = drawn_convolution(seed, axes)
    name = {1: "conv1d", 2: "conv2d"}[axes]
    compare(torch, lambda *a: getattr(ops, name)(*a, **settings),
            lambda *a: getattr(torch.nn.functional, name)(*a, **settings), arrays)


@pytest.mark.parametrize("largest", [True, False], ids=["max", "avg"])
@pytest.mark.parametrize("seed", range(40))
def test_pooling(device, torch, seed, largest):
    """Every other image has few different values: which of equal elements gets the gradient must agree too."""
    rng = np.random.default_rng(seed)
    kernel, stride = (tuple(int(v) for v in rng.integers(1, 4, 2)) for _ in range(2))
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    x = rng.standard_normal((2, 3, *rng.integers(3, 9, 2)))
    x = np.round(x) if seed % 2 else x
    name = "max_pool2d" if largest else "avg_pool2d"
    settings = (kernel, stride if seed % 3 else None, padding)
    compare(torch, lambda x: getattr(ops, name)(x, *settings), lambda x: getattr(torch.nn.functional, name)(x, *settings), [x])


@pytest.mark.parametrize("factor", [1, 2, 3, (2, 1)])
def test_upsample(device, torch, factor):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    compare(torch, lambda x: ops.upsample(x, factor),
            lambda x: torch.nn.functional.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest"), [x])


def test_nan_and_infinity_in_a_maximum(device, torch):
    x = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf, 0.0, 1.0], (4, 4, 7, 7))
    theirs = torch.nn.functional.max_pool2d(torch.tensor(x), 3, 2, 1)
    np.testing.assert_array_equal(fetch(ops.max_pool2d(minilora.Tensor(place(x)), 3, 2, 1)), theirs.numpy())


def copied(torch, layer, other):
    """Our parameters, written into torch's module of the same names; pairs of both."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            theirs[name].copy_(torch.tensor(value))
    return [(p, theirs[name]) for name, p in layer.named_parameters()]


LAYERS = [
    ("Conv1d", (4, 6, 3), dict(stride=2, padding=1), (2, 4, 9)),
    ("Conv1d", (4, 6, 3), dict(dilation=2, groups=2, bias=False), (2, 4, 9)),
    ("Conv2d", (4, 6, 3), dict(padding=1), (2, 4, 5, 6)),
    ("Conv2d", (4, 6, (1, 3)), dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2), (2, 4, 5, 6)),
    ("Conv2d", (4, 6, 1), dict(bias=False), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("name", "sizes", "settings", "shape"), LAYERS)
def test_layer(device, torch, name, sizes, settings, shape):
    layer = getattr(nn, name)(*sizes, **settings, dtype="float64", rng=1)
    other = getattr(torch.nn, name)(*sizes, **settings, dtype=torch.float64)
    assert list(layer.state_dict()) == list(other.state_dict())
    assert [tuple(p.shape) for p in layer.parameters()] == [tuple(p.shape) for p in other.parameters()]
    for p, q in zip(layer.parameters(), other.parameters()):
        bound = 1 / np.sqrt(np.prod(layer.weight.shape[1:]))
        assert np.abs(fetch(p)).max() <= bound and float(q.detach().abs().max()) <= bound
    compare(torch, layer, other, [np.random.default_rng(2).standard_normal(shape)], copied(torch, layer, other))


def test_a_small_u_net(device, torch):
    """Down by a maximum, up by repetition, and the early image beside the late one."""
    d = dict(dtype="float64", rng=np.random.default_rng(3))
    layers = [nn.Conv2d(1, 3, 3, padding=1, **d), nn.Conv2d(3, 4, 3, padding=1, **d), nn.Conv2d(7, 2, 3, padding=1, **d)]
    t = torch.nn
    others = [t.Conv2d(1, 3, 3, padding=1), t.Conv2d(3, 4, 3, padding=1), t.Conv2d(7, 2, 3, padding=1)]
    pairs = [pair for a, b in zip(layers, others) for pair in copied(torch, a, b.double())]

    def ours(x):
        early = ops.silu(layers[0](x))
        late = ops.tanh(layers[1](nn.MaxPool2d(2)(early)))
        return layers[2](ops.concatenate([early, nn.Upsample(scale_factor=2)(late)], axis=1))

    def theirs(x):
        early = t.functional.silu(others[0](x))
        late = torch.tanh(others[1](t.functional.max_pool2d(early, 2)))
        return others[2](torch.cat([early, t.Upsample(scale_factor=2)(late)], dim=1))

    compare(torch, ours, theirs, [np.random.default_rng(4).standard_normal((3, 1, 8, 8))], pairs)


@pytest.mark.parametrize("dims", [(1, -1), (0, 1), (2, 3), (-3, -2)])
def test_flatten(device, torch, dims):
    compare(torch, nn.Flatten(*dims), torch.nn.Flatten(*dims), [np.random.default_rng(0).standard_normal((2, 3, 4, 5))])
