"""A low-rank update of a convolution, by oracles that share no line with it, and what is not done for it.

Integer-valued arrays, and a power of two as scaling: no sum rounds, so that the tolerance is 0.
"""
import tracemalloc

import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import Parameter, Tensor, engine, lora, ops, optim
from minilora.errors import ConfigError, DTypeError, ShapeError
from minilora.lora.gradients.convolution import LoRAConv, lora_conv1d, lora_conv2d
from minilora.ops import conv
from minilora.ops.window import Window, columns

NAMES = ("x", "W", "b", "A", "B")
SEED = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw, axes=None):
    """Shapes of x, W, b, A and B, and settings for which at least one output fits."""
    axes = draw(st.integers(1, 2)) if axes is None else axes
    groups = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))
    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 3), each(1, 3)
    lengths = tuple(max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 3)) for k, p, d in zip(kernel, padding, dilation))
    n, channels, outputs, ranks = (draw(st.integers(low, 3)) for low in (0, 1, 1, 1))
    shapes = ((n, groups * channels, *lengths), (groups * outputs, channels, *kernel), (groups * outputs,),
              (groups * ranks, channels, *kernel), (groups * outputs, ranks, *[1] * axes))
    return shapes, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def integers(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, shape).astype(np.float64) for shape in shapes]


def convolve(x, W, b=None, **settings):
    return (ops.conv1d if len(W.shape) == 3 else ops.conv2d)(x, W, b, **settings)


def fused(s):
    def call(x, W, b, A, B, **settings):
        return (lora_conv1d if len(W.shape) == 3 else lora_conv2d)(x, W, b, A, B, s, **settings)
    return call


def composed(s):
    def call(x, W, b, A, B, groups=1, **settings):
        z = convolve(x, A, groups=groups, **settings)
        return convolve(x, W, b, groups=groups, **settings) + convolve(z, B, groups=groups) * s
    return call


def values(call, arrays, settings, seed):
    """y and the five gradients, on the host, under a drawn dy."""
    leaves = [Parameter(place(a)) for a in arrays]
    y = call(*leaves, **settings)
    y.backward(place(integers(seed + 1, y.shape)[0]))
    return dict(zip(("y", *NAMES), [fetch(y), *(fetch(p.grad) for p in leaves)]))


def deltas(A, B, s, groups):
    """D in the shape of W, group by group, by the one function that knows it."""
    flat = A.reshape(groups, len(A) // groups, -1), B.reshape(groups, len(B) // groups, -1)
    parts = [lora.delta(a, b, s) for a, b in zip(*flat)]
    return np.concatenate(parts).reshape(len(B), *A.shape[1:])


def assert_same(one, other, names=("y", *NAMES)):
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


IN_PARTS = ((5, 2, 4, 3), (2, 1, 3, 3), (2,), (4, 1, 3, 3), (2, 2, 1, 1)), \
    dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2)


# -- oracles ----------------------------------------------------------------------------------------------------------


@given(problem=problems(), seed=SEED)
@example(problem=IN_PARTS, seed=0)
def test_two_convolutions_side_by_side(device, problem, seed):
    shapes, settings = problem
    arrays = integers(seed, *shapes)
    assert_same(values(fused(0.5), arrays, settings, seed), values(composed(0.5), arrays, settings, seed))


@given(problem=problems(), seed=SEED)
@example(problem=IN_PARTS, seed=0)
def test_the_merged_weight_and_its_gradient_projected(device, problem, seed):
    """With W + D in place of W: the same y, dx and db, dW is G, dA = s B^T G and dB = s G A^T."""
    shapes, settings = problem
    x, W, b, A, B = integers(seed, *shapes)
    s, groups = -2.0, settings["groups"]
    got = values(fused(s), (x, W, b, A, B), settings, seed)
    merged = values(convolve, (x, W + deltas(A, B, s, groups), b), settings, seed)
    assert_same(got, merged, ("y", "x", "W", "b"))
    parts = [a.reshape(groups, len(a) // groups, -1) for a in (A, B, merged["W"])]
    for name, shape, projected in [("A", A.shape, [s * b.T @ g for a, b, g in zip(*parts)]),
                                   ("B", B.shape, [s * g @ a.T for a, b, g in zip(*parts)])]:
        np.testing.assert_array_equal(got[name], np.concatenate(projected).reshape(shape))


@given(seed=SEED)
def test_a_kernel_of_one_place_is_a_linear_layer_on_every_pixel(device, seed):
    x, W, b, A, B = integers(seed, (2, 3, 4, 5), (6, 3, 1, 1), (6,), (2, 3, 1, 1), (6, 2, 1, 1))
    conv = values(fused(2.0), (x, W, b, A, B), {}, seed)
    flat = [Parameter(place(a)) for a in (x.transpose(0, 2, 3, 1), W[:, :, 0, 0], b, A[:, :, 0, 0], B[:, :, 0, 0])]
    y = lora.lora_linear(*flat, 2.0)
    y.backward(place(integers(seed + 1, conv["y"].shape)[0].transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(conv["y"], fetch(y).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(conv["x"], fetch(flat[0].grad).transpose(0, 3, 1, 2))
    for name, p in list(zip(NAMES, flat))[1:]:
        np.testing.assert_array_equal(conv[name].reshape(p.shape), fetch(p.grad))


@given(problem=problems(axes=2), seed=SEED)
def test_at_the_start(device, problem, seed):
    """B = 0: the base's output bit for bit, dA exactly 0, and the base's gradients."""
    shapes, settings = problem
    rng = np.random.default_rng(seed)
    x, W, b, A, B = (rng.standard_normal(shape) for shape in shapes)
    got = values(fused(1.7), (x, W, b, A, 0.0 * B), settings, seed)
    base = values(convolve, (x, W, b), settings, seed)
    assert got["y"].tobytes() == base["y"].tobytes()
    assert not got["A"].any()
    for name in ("x", "W", "b"):
        np.testing.assert_allclose(got[name], base[name], rtol=1e-14, atol=1e-13)


# -- parts, memory, work ------------------------------------------------------------------------------------------------


@given(problem=problems(axes=2), seed=SEED, at_once=st.integers(1, 40))
@example(problem=IN_PARTS, seed=0, at_once=24)  # two samples, two, and one
def test_parts_of_any_size_give_the_same(device, problem, seed, at_once):
    shapes, settings = problem
    arrays = integers(seed, *shapes)

    class Elsewhere(LoRAConv):
        pass

    Elsewhere.at_once = at_once
    groups = settings["groups"]
    window = Window(shapes[1][2:], settings["stride"], settings["padding"], settings["dilation"])
    one, other = (values(lambda *a, op=op: engine.apply(op, *a, s=0.5, window=window, groups=groups), arrays, {}, seed)
                  for op in (LoRAConv, Elsewhere))
    assert_same(one, other)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_written_into_the_optimizers_array(groups, device):
    returned = []

    class Watched(LoRAConv):
        def backward(self, dy):
            returned.append(super().backward(dy))
            return returned[-1]

    x, W, A, B, dy = integers(0, (4, 4, 5, 5), (6, 4 // groups, 3, 3), (2, 4 // groups, 3, 3), (6, 2 // groups, 1, 1),
                              (4, 6, 3, 3))
    trained = [Parameter(place(a, "float32")) for a in (W, A, B)]
    free = [Parameter(place(a, "float32")) for a in (W, A, B)]
    optim.SGD(trained, lr=0.1)
    window = Window((3, 3), (1, 1), (0, 0), (1, 1))
    for weights in (trained, free):
        W, A, B = weights
        y = engine.apply(Watched, Tensor(place(x, "float32")), W, None, A, B, s=0.5, window=window, groups=groups)
        y.backward(place(dy, "float32"))
    assert all(returned[0][i] is p.room is p.gathered for i, p in zip((1, 3, 4), trained))
    for p, q in zip(trained, free):
        np.testing.assert_array_equal(fetch(p.grad), fetch(q.grad))


@pytest.mark.parametrize("groups", [1, 4])
def test_nothing_of_the_size_of_a_frozen_weight_is_made(groups):
    """With few outputs and many channels W is the largest array by far; beside it the work needs a small part of its memory."""
    out, channels, r = 256, 256, 4
    x, W, A, B = integers(0, (2, channels, 3, 3), (out, channels // groups, 3, 3), (r, channels // groups, 3, 3),
                          (out, r // groups, 1, 1))
    frozen = Parameter(W, trainable=False)
    leaves = Parameter(x), frozen, None, Parameter(A), Parameter(B)
    tracemalloc.start()
    try:
        y = lora_conv2d(*leaves, 0.5, groups=groups)
        y.backward(np.ones(y.shape))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < W.nbytes * (0.12 if groups == 1 else 0.3)


def test_columns_stand_where_those_of_the_part_before_stood(device, monkeypatch):
    made = []

    def recorded(*args, again):
        assert again is (made[-1] if made else None)
        made.append(columns(*args, again=again))
        return made[-1]

    monkeypatch.setattr(conv, "columns", recorded)
    monkeypatch.setattr(LoRAConv, "at_once", 9)
    shapes = (3, 2, 3, 3), (4, 2, 3, 3), (4,), (2, 2, 3, 3), (4, 2, 1, 1)
    y = lora_conv2d(*[Parameter(place(a)) for a in integers(0, *shapes)], 0.5, padding=1)
    assert len(made) == 3 and all(X is made[0] for X in made)
    made.clear()
    y.backward(place(np.ones(y.shape)))
    assert len(made) == 3 and all(X is made[0] for X in made)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "products", "copies"), [
    # in backward: products, and copies of x into columns, one for each of the 9 places, never 18
    ("", 0, 0), ("x", 3, 0), ("W", 1, 9), ("b", 0, 0), ("A", 2, 9), ("B", 1, 0), ("AB", 3, 9), ("xAB", 5, 9), ("xWbAB", 6, 9),
])
def test_products_and_copies(trained, products, copies, device):
    shapes = (2, 3, 5, 5), (4, 3, 3, 3), (4,), (2, 3, 3, 3), (4, 2, 1, 1)
    leaves = [Parameter(place(a), trainable=name in trained) for name, a in zip(NAMES, integers(0, *shapes))]
    with standin.counting() as counts:
        y = lora_conv2d(*leaves, 0.5, padding=1)
    assert counts.calls["dot"] + counts.calls["matmul"] == 3
    assert counts.calls["setitem"] == 9 + 1 + ("B" in trained)  # columns; y; Z
    assert counts.syncs == counts.h2d == 0
    if trained:
        dy = place(np.ones(y.shape))
        with standin.counting() as counts:
            y.backward(dy)
        assert counts.calls["dot"] + counts.calls["matmul"] == products
        assert counts.calls["setitem"] == copies + ("x" in trained)  # dx, from the order of the columns into that of x
        assert counts.calls["add"] == (9 + 1 if "x" in trained else 0)  # dX to dx, once for each place, and s A^T U to dX
        assert counts.syncs == counts.h2d == 0
        assert counts.launches == 2 or trained != "b"  # the sum, and its copy: no room waits


# -- what does not fit ------------------------------------------------------------------------------------------------


RIGHT = {"x": (2, 4, 6, 5), "W": (6, 4, 3, 2), "b": (6,), "A": (2, 4, 3, 2), "B": (6, 2, 1, 1)}
GROUPED = {"W": (6, 2, 3, 2), "A": (4, 2, 3, 2), "B": (6, 2, 1, 1)}


def call(shapes, **settings):
    arrays = [Parameter(place(np.ones({**RIGHT, **shapes}[name]))) for name in NAMES]
    return (lora_conv1d if arrays[0].ndim == 3 else lora_conv2d)(*arrays, 1.0, **settings)


@pytest.mark.parametrize(("shapes", "groups", "named"), [
    (dict(x=(2, 5, 6, 5)), 1, ["lora_conv2d", "4 channels", "(2, 5, 6, 5)"]),
    (dict(b=(5,)), 1, ["lora_conv2d", "bias of shape (6,)", "(5,)"]),
    (dict(A=(2, 4, 3, 3)), 1, ["lora_conv2d", "weight (6, 4, 3, 2)", "A (r, 4, 3, 2)", "B (6, r, 1, 1)", "A (2, 4, 3, 3)"]),
    (dict(A=()), 1, ["A (r, 4, 3, 2)", "A ()"]),
    (dict(A=(2, 24)), 1, ["A (r, 4, 3, 2)", "A (2, 24)"]),
    (dict(B=(6, 3, 1, 1)), 1, ["B (6, r, 1, 1)", "B (6, 3, 1, 1)"]),
    (dict(B=(2, 6, 1, 1)), 1, ["B (2, 6, 1, 1)"]),
    (dict(B=(6, 2)), 1, ["B (6, 2)", "one place", "reshape"]),
    (dict(B=(6, 2, 1)), 1, ["B (6, 2, 1)"]),
    ({**GROUPED, "B": (6, 4, 1, 1)}, 2, ["B (6, r / 2, 1, 1)", "B (6, 4, 1, 1)"]),
    ({**GROUPED, "A": (4, 4, 3, 2)}, 2, ["A (r, 2, 3, 2)", "A (4, 4, 3, 2)", "PEFT", "every channel"]),
    (dict(x=(2, 4, 6), W=(6, 4, 3), A=(2, 4, 3), B=(6, 2, 1, 1)), 1, ["lora_conv1d", "B (6, r, 1)", "B (6, 2, 1, 1)"]),
])
def test_wrong_shapes(shapes, groups, named, device):
    with pytest.raises(ShapeError) as caught:
        call(shapes, groups=groups)
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_a_rank_that_the_groups_do_not_divide(device):
    with pytest.raises(ConfigError, match=r"lora_conv2d: groups=2 does not divide the rank r=3 of A .* such as r=4$"):
        call({**GROUPED, "A": (3, 2, 3, 2)}, groups=2)
    with pytest.raises(ConfigError, match="groups=4 does not divide the 6 output channels"):
        call({}, groups=4)
    with pytest.raises(ConfigError, match="padding must be an int >= 0"):
        call({}, padding=-1)


def test_numpys_ints_are_ints(device):
    shapes = dict(x=(1, 200, 1, 1), W=(200, 100, 1, 1), b=(200,), A=(200, 100, 1, 1), B=(200, 100, 1, 1))
    assert call(shapes, groups=np.int8(2)).shape == (1, 200, 1, 1)


def test_integers_are_refused(device):
    with pytest.raises(DTypeError):
        lora_conv2d(*[Tensor(place(np.ones(RIGHT[name], int))) for name in NAMES], 1.0)
