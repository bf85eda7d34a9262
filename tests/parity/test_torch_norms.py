"""Normalisation, embedding, cross-entropy and both GELUs against PyTorch's, in float64. Run with -m parity."""
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


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


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
    dy = np.asarray(draw(*y.shape, seed=99))
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    for i, (leaf, tensor) in enumerate([*zip(leaves, tensors), *parameters]):
        assert_close(leaf.grad, tensor.grad, f"gradient {i}")


def copied(torch, layer, other):
    """Our parameters, moved off their start and written into torch's module of the same names; pairs of both."""
    theirs = dict(other.named_parameters())
    assert set(theirs) == set(layer.state_dict())
    for seed, (name, p) in enumerate(layer.named_parameters()):
        p.data += place(draw(*p.shape, seed=50 + seed))
        with torch.no_grad():
            theirs[name].copy_(torch.tensor(fetch(p)))
    return [(p, theirs[name]) for name, p in layer.named_parameters()]


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,), (2, 1, 3, 6)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 0.1])
def test_layer_and_rms_norm(device, torch, shape, eps):
    for ours, theirs in ((nn.LayerNorm, torch.nn.LayerNorm), (nn.RMSNorm, torch.nn.RMSNorm)):
        for affine in (True, False):
            layer = ours(6, eps, affine, dtype="float64")
            other = theirs(6, eps, affine, dtype=torch.float64)
            compare(torch, layer, other, [3 * draw(*shape) + 1], copied(torch, layer, other))
    layer, other = nn.LayerNorm(6, bias=False, dtype="float64"), torch.nn.LayerNorm(6, bias=False, dtype=torch.float64)
    compare(torch, layer, other, [draw(*shape)], copied(torch, layer, other))


@pytest.mark.parametrize("groups, shape", [
    (2, (3, 4)), (1, (3, 4, 5)), (4, (3, 4, 5)), (2, (2, 6, 3, 2)), (3, (1, 6, 2, 2, 2))])
def test_group_norm(device, torch, groups, shape):
    layer = nn.GroupNorm(groups, shape[1], dtype="float64")
    other = torch.nn.GroupNorm(groups, shape[1], dtype=torch.float64)
    compare(torch, layer, other, [2 * draw(*shape) - 1], copied(torch, layer, other))


# arrays, ours, theirs(torch.nn.functional, *tensors)
FUNCTIONS = {
    "layer_norm": ([draw(4, 6), draw(6, seed=1), draw(6, seed=2)], ops.layer_norm,
                   lambda f, x, w, b: f.layer_norm(x, (6,), w, b)),
    "layer_norm eps": ([draw(4, 6)], lambda x: ops.layer_norm(x, eps=0.5), lambda f, x: f.layer_norm(x, (6,), eps=0.5)),
    "rms_norm": ([draw(4, 6), draw(6, seed=1)], ops.rms_norm, lambda f, x, w: f.rms_norm(x, (6,), w, 1e-6)),
    "group_norm": ([draw(4, 6, 2)], lambda x: ops.group_norm(x, 3), lambda f, x: f.group_norm(x, 3)),
}


@pytest.mark.parametrize("arrays, ours, theirs", FUNCTIONS.values(), ids=FUNCTIONS)
def test_function(device, torch, arrays, ours, theirs):
    compare(torch, ours, lambda *tensors: theirs(torch.nn.functional, *tensors), arrays)


def test_embedding_and_cross_entropy_as_functions(device, torch):
    ids = np.array([2, 2, 0])
    compare(torch, lambda W: ops.cross_entropy(ops.embedding(ids, W, padding_idx=0), ids),
            lambda W: torch.nn.functional.cross_entropy(
                torch.nn.functional.embedding(torch.tensor(ids), W, padding_idx=0), torch.tensor(ids)), [draw(4, 3)])


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize("ids", [[2, 0, 2, 1, 2, 3], [[3, 3, 3], [0, 3, 1]], 4], ids=str)
def test_embedding(device, torch, ids, padding_idx):
    layer = nn.Embedding(5, 3, padding_idx, dtype="float64", rng=0)
    other = torch.nn.Embedding(5, 3, padding_idx, dtype=torch.float64)
    with torch.no_grad():
        other.weight.copy_(torch.tensor(fetch(layer.weight)))
    compare(torch, lambda: layer(ids), lambda: other(torch.tensor(ids)), [], [(layer.weight, other.weight)])


@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e4])
def test_cross_entropy(device, torch, e, ignored, size):
    labels = np.array([0, 4, 2, 2, 1, 3, 0])
    labels[3] = ignored
    settings = dict(ignore_index=ignored, label_smoothing=e)
    ours, theirs = nn.CrossEntropyLoss(**settings), torch.nn.CrossEntropyLoss(**settings)
    compare(torch, lambda x: ours(x, labels), lambda x: theirs(x, torch.tensor(labels)), [size * draw(7, 5)])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy(device, torch, bias):
    labels = np.array([[0, 4, -100, 2], [-100, 1, 3, 0]])

    def theirs(h, W, b=None):
        y = torch.nn.functional.linear(h, W, b)
        return torch.nn.functional.cross_entropy(y.reshape(-1, 5), torch.tensor(labels).reshape(-1), label_smoothing=0.1)
    compare(torch, lambda h, W, b=None: ops.linear_cross_entropy(h, W, labels, b, label_smoothing=0.1, chunk_rows=3), theirs,
            [draw(2, 4, 6), draw(5, 6, seed=1), draw(5, seed=2)][:2 + bias])


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(device, torch, form):
    x = np.concatenate([3 * draw(40), [-30.0, -8.0, 0.0, 8.0, 30.0]])
    compare(torch, nn.GELU(form), torch.nn.GELU(form), [x])


def test_exact_gelu_is_torchs_default(device, torch):
    x = draw(50)
    assert_close(ops.gelu(place(x), "none"), torch.nn.functional.gelu(torch.tensor(x)), "gelu")
