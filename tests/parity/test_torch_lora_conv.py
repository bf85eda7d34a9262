"""Convolutions with a low-rank update against PyTorch's, composed, and against PEFT's layer. Run with -m parity."""
import warnings

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora.lora.gradients import convolution as conv_gradient

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


def compare(torch, leaves, tensors, ours, theirs):
    """Output and every gradient, under one random cotangent."""
    y, y_torch = ours(*leaves), theirs(*tensors)
    assert_close(y, y_torch, "output")
    dy = np.random.default_rng(99).standard_normal(y.shape)
    y.backward(place(dy))
    y_torch.backward(torch.tensor(dy))
    for i, (leaf, tensor) in enumerate(zip(leaves, tensors)):
        if leaf is not None:
            assert_close(leaf.grad, tensor.grad, f"gradient {i}")


def drawn(seed, axes):
    """x, W, b, A, B and settings; some without bias, some depthwise, some with one output channel a group."""
    rng = np.random.default_rng(seed)

    def each(low, high):
        return tuple(int(v) for v in rng.integers(low, high + 1, axes))
    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 3), each(1, 3)
    groups = int(rng.choice([1, 1, 2, 3]))
    lengths = [max(1, d * (k - 1) + 1 - 2 * p) + int(rng.integers(0, 9)) for k, p, d in zip(kernel, padding, dilation)]
    channels, outputs, ranks, n = (int(v) for v in rng.integers(1, 5, 4))
    channels, outputs = 1 if seed % 5 < 2 else channels, 1 if seed % 5 == 0 else outputs
    shapes = ((n, groups * channels, *lengths), (groups * outputs, channels, *kernel), (groups * outputs,),
              (groups * ranks, channels, *kernel), (groups * outputs, ranks, *[1] * axes))
    arrays = [rng.standard_normal(shape) for shape in shapes]
    if seed % 2:
        arrays[2] = None
    return arrays, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_composed(device, torch, seed, axes):
    arrays, settings = drawn(seed, axes)
    conv = getattr(torch.nn.functional, f"conv{axes}d")
    compare(torch, [None if a is None else minilora.Parameter(place(a)) for a in arrays],
            [None if a is None else torch.tensor(a, requires_grad=True) for a in arrays],
            lambda *a: getattr(conv_gradient, f"lora_conv{axes}d")(*a, 1.7, **settings),
            lambda x, W, b, A, B: conv(x, W, b, **settings) + 1.7 * conv(conv(x, A, **settings), B, groups=settings["groups"]))


@pytest.mark.parametrize(("axes", "settings"), [
    (1, dict(stride=2, padding=1)), (2, dict(stride=(1, 2), padding=(2, 0))), (2, {}),
])
def test_peft(device, torch, axes, settings):
    """PEFT's layer around a convolution without groups or dilation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    rng = np.random.default_rng(axes)
    base = getattr(torch.nn, f"Conv{axes}d")(3, 5, 3, dtype=torch.float64, **settings)
    model = peft.get_peft_model(torch.nn.Sequential(base), peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3))
    layer = model.base_model.model[0].double()
    tensors = [torch.tensor(rng.standard_normal((2, 3, *[7] * axes)), requires_grad=True), base.weight, base.bias,
               layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        tensors[4].copy_(torch.tensor(rng.standard_normal(tensors[4].shape)))  # B = 0 would show little
    for tensor in tensors:
        tensor.requires_grad_()
    compare(torch, [minilora.Parameter(place(t.detach().numpy())) for t in tensors], tensors,
            lambda *a: getattr(conv_gradient, f"lora_conv{axes}d")(*a, minilora.lora.scaling(3, 2), **settings),
            lambda x, *rest: model(x))
