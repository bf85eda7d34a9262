"""Random programs of public operations against PyTorch: values, and gradients of two passes. Run with -m parity."""
import warnings
from types import SimpleNamespace

import numpy as np
import programs
import pytest
from conftest import fetch, place
from hypothesis import given, settings, strategies as st

from minilora import Parameter, optim

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        return pytest.importorskip("torch")


def torch_side(torch):
    functional = torch.nn.functional
    return SimpleNamespace(
        sigmoid=torch.sigmoid, silu=functional.silu, relu=torch.relu, gelu=lambda a: functional.gelu(a, approximate="tanh"),
        sqrt=torch.sqrt, log=torch.log, exp=torch.exp, tanh=torch.tanh, detach=lambda a: a.detach(),
        sum=lambda a, axis, keepdims: a.sum() if axis is None else a.sum(dim=axis, keepdim=keepdims), mean=torch.mean,
        softmax=lambda a: a.softmax(-1), log_softmax=lambda a: a.log_softmax(-1),
        layer_norm=lambda a: functional.layer_norm(a, a.shape[-1:], eps=0.1), mse=functional.mse_loss, linear=functional.linear,
        transpose=lambda a: a.permute(tuple(range(a.ndim)[::-1])), gather=lambda a, index: a[index], concatenate=torch.cat)


@settings(max_examples=max(400, settings().max_examples))
@given(drawn=programs.programs(), rooms=st.booleans())
def test_programs(torch, device, drawn, rooms):
    program, leaves, trained, dy = drawn
    parameters = [Parameter(place(x), trainable=t) for x, t in zip(leaves, trained)]
    theirs = [torch.tensor(x, requires_grad=t) for x, t in zip(leaves, trained)]
    if rooms and any(trained):
        optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        y = programs.run(program, parameters, programs.tensors(place))
        y_torch = programs.run(program, theirs, torch_side(torch))
        np.testing.assert_allclose(fetch(y), y_torch.detach().numpy(), rtol=1e-11, atol=1e-11)
        assert (y.node is not None) == y_torch.requires_grad
        if y.node is None:
            return
        y.backward(None if dy is None else place(dy))
        y_torch.backward(torch.ones_like(y_torch) if dy is None else torch.tensor(dy))
        for p, tensor in zip(parameters, theirs):
            assert (p.gathered is None) == (tensor.grad is None)
            if tensor.grad is not None:
                expected = tensor.grad.numpy()
                scale = max(1.0, np.abs(expected).max(initial=0.0))
                np.testing.assert_allclose(fetch(p.gathered), expected, rtol=0, atol=1e-11 * scale)
