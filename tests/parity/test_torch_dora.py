"""DoRA's factor, and a layer composed with it, against PyTorch's autograd in float64, both readings. Run with -m parity."""
import warnings

import numpy as np
import pytest
from conftest import fetch, place

from minilora import Parameter
from minilora.lora import lora_linear
from minilora.lora.gradients import dora

pytestmark = pytest.mark.parity
SHAPES = [(4, 6, 2, 1), (5, 3, 1, 1), (1, 4, 3, 1), (6, 5, 4, 2), (3, 2, 3, 3), (300, 700, 8, 1), (64, 5000, 4, 4)]
readings = pytest.mark.parametrize("exact", [False, True], ids=["detached", "exact"])


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


def draw(out, n, r, groups, samples=7):
    """x, W, b, A, B, m and dy."""
    rng = np.random.default_rng(out + n + r)
    shapes = (samples, n), (out, n), (out,), (r, n), (out, r // groups), (out,), (samples, out)
    return [rng.standard_normal(shape) for shape in shapes]


def factor(torch, W, A, B, m, s, groups, exact):
    V = torch.cat([W_g + s * B_g @ A_g for W_g, A_g, B_g in zip(*(M.chunk(groups) for M in (W, A, B)))])
    c = torch.linalg.norm(V, dim=1)
    return m / (c if exact else c.detach())


def compare(torch, ours, theirs, arrays, dy):
    leaves, tensors = [Parameter(place(a)) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_torch = ours(*leaves), theirs(*tensors)
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    pairs = [(y, y_torch.detach()), *((leaf.grad, tensor.grad) for leaf, tensor in zip(leaves, tensors))]
    for i, (one, other) in enumerate(pairs):
        assert (one is None) == (other is None), i
        if other is not None:
            other = other.numpy()
            assert np.abs(fetch(one) - other).max() <= 1e-10 * np.abs(other).max(), i


@readings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factor(device, torch, shape, exact):
    *_, groups = shape
    _, W, _, A, B, m, dy = draw(*shape)
    compare(torch, lambda *leaves: dora.dora_scale(*leaves, 0.7, groups, exact=exact),
            lambda *leaves: factor(torch, *leaves, 0.7, groups, exact), [W, A, B, m], dy[0])


@readings
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] == 1], ids=str)
def test_layer(device, torch, shape, exact):
    *arrays, dy = draw(*shape)

    def ours(x, W, b, A, B, m):
        return dora.dora_scale(W, A, B, m, 0.7, exact=exact) * lora_linear(x, W, None, A, B, 0.7) + b

    def theirs(x, W, b, A, B, m):
        V = W + 0.7 * B @ A
        return torch.nn.functional.linear(x, factor(torch, W, A, B, m, 0.7, 1, exact)[:, None] * V, b)
    compare(torch, ours, theirs, arrays, dy)


@readings
def test_embedding_reads_its_table_transposed(device, torch, exact):
    """One length for each column of the table (V, D), as PEFT has it."""
    _, W, _, A, B, m, dy = draw(6, 500, 4, 1)
    compare(torch, lambda E, A, B, m: dora.dora_scale(E.T, A, B, m, 0.7, exact=exact),
            lambda E, A, B, m: factor(torch, E.T, A, B, m, 0.7, 1, exact), [W.T.copy(), A, B, m], dy[0])
