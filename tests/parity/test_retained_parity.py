"""Gradients of values in the middle are those that PyTorch's retain_grad keeps."""
import numpy as np
import pytest

from minilora import Parameter, ops

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(3))
def test_values_in_the_middle(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x, A, B = (rng.standard_normal(shape) for shape in ((5, 4), (2, 4), (3, 2)))
    a, b = Parameter(A), Parameter(B)
    z = ops.linear(x, a).retain_grad()
    h = ops.tanh(z).retain_grad()
    y = (ops.linear(h, b) + z.sum()).retain_grad()
    (y * y).mean().backward()

    ta, tb = torch.tensor(A, requires_grad=True), torch.tensor(B, requires_grad=True)
    tz = torch.tensor(x) @ ta.T
    th = torch.tanh(tz)
    ty = th @ tb.T + tz.sum()
    for value in (tz, th, ty):
        value.retain_grad()
    (ty * ty).mean().backward()
    for ours, theirs in ((z, tz), (h, th), (y, ty), (a, ta), (b, tb)):
        np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError):  # as ours: no gradient comes to what needs none
        torch.tensor(x).retain_grad()
