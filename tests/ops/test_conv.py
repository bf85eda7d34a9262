"""Convolutions and pooling: a reference by plain loops, and identities that hold to the last bit."""
import itertools
import math

import numpy as np
import pytest
import standin
from conftest import fetch, place
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import Parameter, Tensor, backend, engine, ops, optim
from minilora.errors import ConfigError, DTypeError, ShapeError
from minilora.ops.conv import Conv
from minilora.ops.window import Window, columns, from_columns

# -- settings drawn by hypothesis -----------------------------------------------------------------------------------------


@st.composite
def problems(draw, axes=None, groups=None):
    """Settings of a convolution and shapes that fit them, with at least one output."""
    axes = draw(st.integers(1, 2)) if axes is None else axes
    groups = draw(st.integers(1, 3)) if groups is None else groups

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))
    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 3), each(1, 3)
    lengths = tuple(max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 3)) for k, p, d in zip(kernel, padding, dilation))
    n, per_group, outputs = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shapes = ((n, groups * per_group, *lengths), (groups * outputs, per_group, *kernel), (groups * outputs,))
    return shapes, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


SEED = st.integers(0, 2**32 - 1)


def integers(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, shape).astype(np.float64) for shape in shapes]


def convolve(x, W, b=None, **settings):
    return (ops.conv1d if len(W.shape) == 3 else ops.conv2d)(x, W, b, **settings)


def lengths_out(x_shape, W_shape, stride, padding, dilation, groups):
    return Window(W_shape[2:], stride, padding, dilation).out(x_shape[2:])


def by_loops(x, W, b, stride, padding, dilation, groups):
    """The formula of the docstring, one multiplication at a time; and its three gradients, from the same loop."""
    out = lengths_out(x.shape, W.shape, stride, padding, dilation, groups)
    y = np.zeros((len(x), len(W), *out)) + b.reshape(-1, *[1] * len(out))
    terms = []  # (index in y, index in x, index in W): every product that there is
    per_group, outputs = W.shape[1], len(W) // groups
    for n, o, c in itertools.product(range(len(x)), range(len(W)), range(per_group)):
        channel = o // outputs * per_group + c
        for t in np.ndindex(*out):
            for k in np.ndindex(*W.shape[2:]):
                i = tuple(t_ * s + k_ * d - p for t_, k_, s, d, p in zip(t, k, stride, dilation, padding))
                if all(0 <= i_ < length for i_, length in zip(i, x.shape[2:])):
                    terms.append(((n, o, *t), (n, channel, *i), (o, c, *k)))
    for at_y, at_x, at_W in terms:
        y[at_y] += x[at_x] * W[at_W]
    return y, terms


@given(problem=problems(), seed=SEED)
def test_every_product_of_the_formula_and_no_other(device, problem, seed):
    shapes, settings = problem
    x, W, b = integers(seed, *shapes)
    expected, terms = by_loops(x, W, b, **settings)
    parameters = [Parameter(place(a)) for a in (x, W, b)]
    y = convolve(*parameters, **settings)
    np.testing.assert_array_equal(fetch(y), expected)
    (dy,) = integers(seed + 1, y.shape)
    y.backward(place(dy))
    dx, dW = np.zeros(x.shape), np.zeros(W.shape)
    for at_y, at_x, at_W in terms:
        dx[at_x] += dy[at_y] * W[at_W]
        dW[at_W] += dy[at_y] * x[at_x]
    for parameter, gradient in zip(parameters, (dx, dW, dy.sum((0, *range(2, dy.ndim))))):
        np.testing.assert_array_equal(fetch(parameter.grad), gradient)


# -- identities -----------------------------------------------------------------------------------------------------------


@given(problem=problems(groups=1), seed=SEED)
def test_columns_and_from_columns_are_adjoint(device, problem, seed):
    """<columns(x), X> = <x, from_columns(X)>, exactly, for integers."""
    (x_shape, W_shape, _), settings = problem
    window = Window(W_shape[2:], settings["stride"], settings["padding"], settings["dilation"])
    xp = backend.current_device().xp
    (x,) = integers(seed, x_shape)
    made = fetch(columns(place(x), window, xp))
    assert made.shape == (x_shape[1] * math.prod(window.kernel), x_shape[0] * math.prod(window.out(x_shape[2:])))
    (X,) = integers(seed + 1, made.shape)
    back = xp.zeros(x_shape, dtype="float64")
    from_columns(place(X), window, back)
    assert (made * X).sum() == (x * fetch(back)).sum()


@given(problem=problems(), seed=SEED)
def test_backward_is_the_adjoint_of_forward(device, problem, seed):
    """<conv(x, W), y> = <x, dx> = <W, dW>, exactly, for integers: the convolution is linear in x and in W."""
    (x_shape, W_shape, _), settings = problem
    x, W = integers(seed, x_shape, W_shape)
    parameters = Parameter(place(x)), Parameter(place(W))
    out = convolve(*parameters, **settings)
    (y,) = integers(seed + 1, out.shape)
    out.backward(place(y))
    inner = (fetch(out) * y).sum()
    assert inner == (x * fetch(parameters[0].grad)).sum() == (W * fetch(parameters[1].grad)).sum()


@given(problem=problems(), seed=SEED, moves=st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_a_moved_input_gives_a_moved_output(device, problem, seed, moves):
    """An input moved by whole strides, within a wide margin of zeros, moves the output and changes nothing else."""
    (x_shape, W_shape, _), settings = problem
    x, W = integers(seed, x_shape, W_shape)
    moves = moves[:len(x_shape) - 2]
    reach = [d * (k - 1) + 1 for k, d in zip(W_shape[2:], settings["dilation"])]
    margins = [(-(-r // s) * s, m * s + r) for r, s, m in zip(reach, settings["stride"], moves)]
    wide = np.pad(x, [(0, 0), (0, 0), *margins])
    axes = tuple(range(2, x.ndim))
    moved = np.roll(wide, [m * s for m, s in zip(moves, settings["stride"])], axes)
    y, y_moved = (fetch(convolve(Tensor(place(a)), Tensor(place(W)), **settings)) for a in (wide, moved))
    np.testing.assert_array_equal(y_moved, np.roll(y, moves, axes))


@given(seed=SEED, groups=st.integers(1, 3), stride=st.integers(1, 2))
def test_groups_are_convolutions_side_by_side(device, seed, groups, stride):
    x, W, b = integers(seed, (2, 2 * groups, 5, 4), (3 * groups, 2, 3, 2), (3 * groups,))
    together = ops.conv2d(Tensor(place(x)), Tensor(place(W)), Tensor(place(b)), stride, 1, groups=groups)
    parts = zip(np.split(x, groups, 1), np.split(W, groups), np.split(b, groups))
    apart = [fetch(ops.conv2d(*[Tensor(place(a)) for a in part], stride, 1)) for part in parts]
    np.testing.assert_array_equal(fetch(together), np.concatenate(apart, axis=1))


@given(seed=SEED)
def test_one_spatial_axis_is_two_with_a_length_of_one(device, seed):
    x, W, b = integers(seed, (2, 3, 9), (4, 3, 3), (4,))
    one = ops.conv1d(*[Tensor(place(a)) for a in (x, W, b)], stride=2, padding=2, dilation=2)
    two = ops.conv2d(Tensor(place(x[:, :, None])), Tensor(place(W[:, :, None])), Tensor(place(b)), (1, 2), (0, 2), (1, 2))
    np.testing.assert_array_equal(fetch(one), fetch(two)[:, :, 0])


@given(seed=SEED)
def test_a_pointwise_convolution_is_a_linear_layer_on_every_pixel(device, seed):
    x, W, b = integers(seed, (2, 3, 4, 5), (6, 3, 1, 1), (6,))
    y = fetch(ops.conv2d(*[Tensor(place(a)) for a in (x, W, b)]))
    linear = fetch(ops.linear(Tensor(place(x.transpose(0, 2, 3, 1).copy())), Tensor(place(W[:, :, 0, 0])), Tensor(place(b))))
    np.testing.assert_array_equal(y, linear.transpose(0, 3, 1, 2))


IN_PARTS = ((5, 2, 4, 3), (2, 1, 3, 3), (2,)), dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2)


@given(seed=SEED, problem=problems(axes=2), at_once=st.integers(1, 40))
@example(seed=0, problem=IN_PARTS, at_once=24)  # two samples, two, and one
def test_parts_of_any_size_give_the_same(device, seed, problem, at_once):
    """How many samples are taken at once is a matter of speed alone."""
    shapes, settings = problem
    hosts = integers(seed, *shapes)

    class Elsewhere(Conv):
        pass

    Elsewhere.at_once = at_once
    results = []
    for op in (Conv, Elsewhere):
        parameters = [Parameter(place(a)) for a in hosts]
        window = Window(shapes[1][2:], settings["stride"], settings["padding"], settings["dilation"])
        y = engine.apply(op, *parameters, window=window, groups=settings["groups"])
        y.backward(place(integers(seed + 1, y.shape)[0]))
        results.append([fetch(y), *(fetch(p.grad) for p in parameters)])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)


# -- what is not done -----------------------------------------------------------------------------------------------------


def test_pointwise_columns_of_one_sample_are_a_view(device):
    xp = backend.current_device().xp
    x, window = place(np.arange(24.0).reshape(1, 2, 3, 4)), Window((1, 1), (1, 1), (0, 0), (5, 1))
    assert xp.shares_memory(columns(x, window, xp), x)
    assert not xp.shares_memory(columns(x, window._replace(stride=(1, 2)), xp), x)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize(("trained", "forward", "backward"), [
    ("", 1, 0), ("x", 1, 1), ("W", 1, 1), ("b", 1, 0), ("xW", 1, 2), ("xWb", 1, 2),
])
def test_products_and_copies(trained, forward, backward, device):
    """Without a trained W there are no columns in backward; without either no product."""
    hosts = dict(zip("xWb", integers(0, (2, 3, 5, 5), (4, 3, 3, 3), (4,))))
    parameters = [Parameter(place(a), trainable=name in trained) for name, a in hosts.items()]
    with standin.counting() as counts:
        y = ops.conv2d(*parameters, padding=1)
    assert counts.calls["dot"] + counts.calls["matmul"] == forward
    assert counts.syncs == 0 and counts.h2d == 0
    if trained:
        dy = place(np.ones(y.shape))
        with standin.counting() as counts:
            y.backward(dy)
        assert counts.calls["dot"] + counts.calls["matmul"] == backward
        assert (counts.calls["setitem"] >= 9) == ("W" in trained)  # the columns, one copy a place
        assert counts.calls["add"] >= 9 or "x" not in trained
        assert counts.syncs == 0 and counts.h2d == 0


def test_frozen_weight_keeps_nothing_of_the_input(device):
    x, W, b = (place(a) for a in integers(0, (2, 3, 5, 5), (4, 3, 3, 3), (4,)))
    assert ops.conv2d(Tensor(x), Parameter(W, trainable=False), Parameter(b, trainable=False)).node is None
    inner = ops.reshape(Parameter(x), x.shape)
    y = ops.conv2d(inner, Parameter(W, trainable=False), Parameter(b, trainable=False))
    assert engine.ledger(y).nbytes == 0  # W is its owner's own array
    assert engine.ledger(ops.conv2d(inner, Parameter(W))).nbytes == x.nbytes  # x, and not its columns


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weights_gradient_is_written_into_the_optimizers_array(groups, device):
    returned = []

    class Watched(Conv):
        def backward(self, dy):
            gradients = super().backward(dy)
            returned.append(gradients[1])
            return gradients

    x, W, unused = integers(0, (40, 4, 6, 6), (4, 4 // groups, 3, 3), (3,))
    W, unused = Parameter(place(W, "float32")), Parameter(place(unused, "float32"))
    free = Parameter(place(fetch(W)))
    optim.SGD([unused, W], lr=0.1)
    window = Window((3, 3), (1, 1), (0, 0), (1, 1))
    for _ in range(2):
        for weight in (W, free):
            weight.grad = None
            y = engine.apply(Watched, Tensor(place(x, "float32")), weight, None, window=window, groups=groups)
            y.backward(place(np.ones(y.shape), "float32"))
        assert returned[-2] is W.room and W.gathered is W.room and unused.grad is None
        np.testing.assert_array_equal(fetch(W.grad), fetch(free.grad))


# -- pooling --------------------------------------------------------------------------------------------------------------


def test_of_equal_elements_the_first_gets_the_gradient(device):
    x = Parameter(place(np.array([[[[1.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]]])))
    y = ops.max_pool2d(x, 2)
    y.backward(place(np.array([[[[1.0, 2.0]]]])))
    np.testing.assert_array_equal(fetch(x.grad)[0, 0], [[0, 1, 2, 0], [0, 0, 0, 0]])


@given(seed=SEED, kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 1))
def test_a_maximum_passes_every_gradient_on_once(device, seed, kernel, stride, padding):
    """Few different values, so that there are ties: dx sums to the sum of dy, and lands on elements equal to a maximum."""
    padding = min(padding, kernel // 2)
    (x,) = integers(seed, (2, 2, 5, 6))
    p = Parameter(place(x))
    y = ops.max_pool2d(p, kernel, stride, padding)
    dy = abs(integers(seed + 1, y.shape)[0])
    y.backward(place(dy))
    dx = fetch(p.grad)
    assert dx.sum() == dy.sum()
    assert (dx * x).sum() == (dy * fetch(y)).sum()


def test_a_maximum_does_not_lose_nan(device):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 0, 1] = x[0, 0, 3, 2] = np.nan
    for places in (x, x[:, :, ::-1], x[..., ::-1]):
        y = fetch(ops.max_pool2d(Tensor(place(places.copy())), 2))
        assert np.isnan(y).sum() == 2 and (y[~np.isnan(y)] == 0).all()


def test_a_maximum_of_the_smallest_numbers(device):
    x = np.full((1, 1, 3, 3), -1e300)
    np.testing.assert_array_equal(fetch(ops.max_pool2d(Tensor(place(x)), 3, 1, 1)), x)


@given(seed=SEED, factor=st.integers(1, 3))
def test_upsampling_undone_by_averaging(device, seed, factor):
    (x,) = integers(seed, (2, 2, 3, 4))
    larger = ops.upsample(Tensor(place(x)), factor)
    assert larger.shape == (2, 2, 3 * factor, 4 * factor)
    np.testing.assert_allclose(fetch(ops.avg_pool2d(larger, factor)), x, rtol=1e-15, atol=0)
    np.testing.assert_array_equal(fetch(ops.max_pool2d(larger, factor)), x)


# -- bad input ------------------------------------------------------------------------------------------------------------

X, W2, B = (2, 4, 6, 5), (6, 4, 3, 3), (6,)

WRONG_SHAPES = [  # function, shapes, settings, what the message names
    (ops.conv2d, ((2, 4, 6), W2, B), {}, ["conv2d", "(N, channels, height, width)", "(2, 4, 6)"]),
    (ops.conv1d, (X, (6, 4, 3), B), {}, ["conv1d", "(N, channels, length)", "(2, 4, 6, 5)"]),
    (ops.conv2d, (X, (6, 4, 3), B), {}, ["weight", "(6, 4, 3)"]),
    (ops.conv2d, (X, (6, 4, 3, 0), B), {}, ["weight", "(6, 4, 3, 0)"]),
    (ops.conv2d, (X, (6, 3, 3, 3), B), {}, ["3 channels on axis 1", "(6, 3, 3, 3)", "(2, 4, 6, 5)"]),
    (ops.conv2d, (X, (6, 4, 3, 3), B), dict(groups=2), ["8 channels", "2 groups", "(2, 4, 6, 5)"]),
    (ops.conv2d, ((2, 6, 5, 4), W2, B), {}, ["channels last", "(2, 6, 5, 4)"]),
    (ops.conv2d, (X, W2, (5,)), {}, ["bias", "(6,)", "(5,)"]),
    (ops.conv2d, ((2, 4, 2, 5), W2, B), {}, ["height 2", "kernel of 3"]),
    (ops.conv2d, (X, W2, B), dict(dilation=(1, 3)), ["width 5", "dilation 3 covers 7"]),
    (ops.conv1d, ((2, 4, 1), (6, 4, 4), B), dict(padding=1), ["length 1", "with padding 3", "kernel of 4"]),
]


@pytest.mark.parametrize(("function", "shapes", "settings", "named"), WRONG_SHAPES)
def test_wrong_shapes(function, shapes, settings, named, device):
    with pytest.raises(ShapeError) as caught:
        function(*[Parameter(place(np.ones(shape))) for shape in shapes], **settings)
    assert all(part in str(caught.value) for part in named), str(caught.value)


@pytest.mark.parametrize(("settings", "named"), [
    (dict(stride=0), "stride must be an int >= 1 or a tuple of 2 such ints, got 0"),
    (dict(stride=(1, 2, 3)), "(1, 2, 3)"), (dict(stride=1.0), "1.0"), (dict(padding=-1), "padding must be an int >= 0"),
    (dict(padding="same"), "'same'"), (dict(dilation=(1, 0)), "dilation"), (dict(dilation=True), "True"),
    (dict(groups=0), "groups must be an int >= 1, got 0"), (dict(groups=1.0), "1.0"),
    (dict(groups=4), "groups=4 does not divide the 6"),
    (dict(stride=np.ones(2)), "stride"), (dict(groups=None), "None"),
])
def test_wrong_settings(settings, named, device):
    with pytest.raises(ConfigError) as caught:
        ops.conv2d(*[Parameter(place(np.ones(shape))) for shape in (X, W2, B)], **settings)
    assert named in str(caught.value)


def test_numpys_ints_are_ints(device):
    x, W = (Tensor(place(np.ones(shape))) for shape in (X, W2))
    assert ops.conv2d(x, W, stride=np.int64(2), padding=(np.int32(1), 1), groups=np.int8(1)).shape == (2, 6, 3, 3)


@pytest.mark.parametrize("function", [
    lambda x: ops.conv2d(x, x), lambda x: ops.max_pool2d(x, 1), lambda x: ops.avg_pool2d(x, 1), ops.upsample,
])
def test_integers_are_refused(function, device):
    with pytest.raises(DTypeError):
        function(Tensor(place(np.ones((1, 1, 2, 2), int))))
    with pytest.raises(DTypeError):
        function([[1.0]])


@pytest.mark.parametrize("function", [ops.max_pool2d, ops.avg_pool2d])
def test_wrong_pools(function, device):
    x = Tensor(place(np.ones((2, 3, 4, 5))))
    for settings, named in [((0,), "kernel_size"), ((2, 0), "stride"), ((2, 1, 2), "more than half"), ((2, 2, -1), "padding")]:
        with pytest.raises(ConfigError, match=named):
            function(x, *settings)
    with pytest.raises(ShapeError, match=r"height 4, with padding 4, but the kernel of 5"):
        function(x, 5)
    with pytest.raises(ShapeError, match=r"\(N, channels, height, width\), got shape \(3, 4, 5\)"):
        function(Tensor(place(np.ones((3, 4, 5)))), 2)


def test_wrong_factors(device):
    with pytest.raises(ConfigError, match="scale_factor must be an int >= 1"):
        ops.upsample(Tensor(place(np.ones((1, 1, 2, 2)))), 0)
    with pytest.raises(ShapeError, match="upsample"):
        ops.upsample(Tensor(place(np.ones((2, 2)))))
