"""Operations that choose and move, against PyTorch's, with many equal numbers among the inputs. Run with -m parity."""
import numpy as np
import pytest
from conftest import place
from test_torch import compare, draw, torch  # noqa: F401 (torch is a fixture)

from minilora import Tensor, ops

pytestmark = pytest.mark.parity

X = (3, 4, 5)
CONDITION = draw(*X, seed=7) > 0


def few(*shape, seed=0):
    """Whole numbers from -2 to 2: every extreme comes several times."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(float)


def cast_and_back(x):
    return ops.cast(ops.cast(x, "float32") * 3.0, "float64")


OPS = {
    "where": ([draw(*X), draw(4, 1, seed=1)], lambda x, y: ops.where(place(CONDITION), x, y),
              lambda t, x, y: t.where(t.tensor(CONDITION), x, y)),
    "maximum": ([few(*X), few(4, 1, seed=1)], ops.maximum, lambda t, x, y: t.maximum(x, y)),
    "minimum": ([few(*X), few(4, 1, seed=1)], ops.minimum, lambda t, x, y: t.minimum(x, y)),
    "max": ([few(*X)], ops.max, lambda t, x: t.amax(x)),
    "max axes": ([few(*X)], lambda x: ops.max(x, (0, -1), True), lambda t, x: t.amax(x, (0, -1), keepdim=True)),
    "min": ([few(*X)], ops.min, lambda t, x: t.amin(x)),
    "min axis": ([few(*X)], lambda x: ops.min(x, 1), lambda t, x: t.amin(x, 1)),
    "abs": ([few(*X)], ops.abs, lambda t, x: t.abs(x)),
    "clip": ([few(*X)], lambda x: ops.clip(x, -1.0, 1.0), lambda t, x: t.clamp(x, -1.0, 1.0)),
    "clip low": ([draw(*X)], lambda x: ops.clip(x, low=0.1), lambda t, x: t.clamp(x, min=0.1)),
    "stack": ([draw(*X), draw(*X, seed=1)], lambda x, y: ops.stack([x, y, x], -2), lambda t, x, y: t.stack([x, y, x], -2)),
    "split": ([draw(*X)], lambda x: ops.concatenate(ops.split(x, [1, 3], 1)[::-1], 1),
              lambda t, x: t.cat(t.tensor_split(x, [1, 3], 1)[::-1], 1)),
    "cast": ([draw(*X)], cast_and_back, lambda t, x: (x.float() * 3.0).double()),
    "matmul of vectors": ([draw(4), draw(4, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "matmul of a vector": ([draw(4), draw(4, 5, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "matmul with a vector": ([draw(2, 3, 4), draw(4, seed=1)], ops.matmul, lambda t, x, y: x @ y),
    "matmul of a vector, batches": ([draw(4), draw(2, 4, 5, seed=1)], ops.matmul, lambda t, x, y: x @ y),
}


@pytest.mark.parametrize("arrays, ours, theirs", OPS.values(), ids=OPS)
def test_op(device, torch, arrays, ours, theirs):  # noqa: F811
    compare(torch, ours, lambda *tensors: theirs(torch, *tensors), arrays)


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_argmax(device, torch, axis):  # noqa: F811
    x = draw(*X)
    assert ops.argmax(Tensor(place(x)), axis).numpy().tolist() == torch.argmax(torch.tensor(x), axis).tolist()
