"""The table of operations: one row for each way to use one. The loops over it are in ops/.

A new operation needs a row here, and then has its value, gradients, memory, purity and dtypes tested on every device.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import backend, ops
from minilora.lora import gradient


@dataclass(frozen=True)
class Case:
    """One way to use one operation.

    `call` takes tensors and applies `op`. `formula` takes host arrays and computes the same in another way; with
    integers it must be exact if the row is `affine`. `kept` gives the number of elements kept for backward, from
    `needs`, the inputs and the output.
    """

    name: str
    op: type
    call: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    kept: Callable[..., int] = lambda needs, *arrays: 0
    low: float = 0.05  # magnitudes of the inputs, and whether they have a sign
    high: float = 2.0
    signed: bool = True
    analytic: bool = True  # a complex step passes through
    affine: bool = False  # in each input by itself: a step of 1 gives the exact derivative
    view: bool = False  # the output may share the input's memory
    products: bool = False  # computed by BLAS, whose rounding depends on the memory's layout
    once: bool = False  # it holds a graph of its own, which a backward uses up
    drawn: Any = None  # a hypothesis strategy for other shapes

    def inputs(self, rng, dtype=np.float64, shapes=None):
        """Host arrays within the valid range."""
        arrays = []
        for shape in self.shapes if shapes is None else shapes:
            array = rng.uniform(self.low, self.high, shape)
            if self.signed:
                array *= rng.choice([-1.0, 1.0], shape)
            arrays.append(np.asarray(array, dtype))
        return arrays


CASES: list[Case] = []


def one_of_each(cases):
    """Rows as parameters of a test: the first of each operation in every run, the others on request (-m slow)."""
    first = {case.op: case for case in reversed(cases)}
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (first[case.op] is not case)) for case in cases]


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, **settings))


# -- formulas, written otherwise than the library writes them ---------------------------------------------------------


def each(function):
    """Apply a function of Python numbers to every element, one by one."""
    def formula(*xs):
        shape = np.broadcast_shapes(*(x.shape for x in xs))
        columns = [np.broadcast_to(x, shape).ravel().tolist() for x in xs]
        values = [function(*numbers) for numbers in zip(*columns)]
        return np.array(values, dtype=np.result_type(*xs)).reshape(shape)
    return formula


def total(axis, keepdims=False, average=False):
    """Add the elements one by one."""
    def formula(x):
        axes = range(x.ndim) if axis is None else np.atleast_1d(axis)
        reduced = {int(a) % x.ndim for a in axes} if x.ndim else set()
        y = np.zeros([1 if i in reduced else n for i, n in enumerate(x.shape)], x.dtype)
        for index in np.ndindex(x.shape):
            y[tuple(0 if i in reduced else k for i, k in enumerate(index))] += x[index]
        if average:
            y = y / math.prod(x.shape[i] for i in reduced)
        return y if keepdims else y.reshape([n for i, n in enumerate(x.shape) if i not in reduced])
    return formula


def permuted(axes):
    def formula(x):
        y = np.empty([x.shape[a] for a in axes], x.dtype)
        for index in np.ndindex(x.shape):
            y[tuple(index[a] for a in axes)] = x[index]
        return y
    return formula


def refilled(shape):
    def formula(x):
        y = np.empty(shape, x.dtype)
        for i in range(x.size):
            y[np.unravel_index(i, shape)] = x[np.unravel_index(i, x.shape)]
        return y
    return formula


def picked(index):
    def formula(x):
        return np.take(x, np.arange(x.size).reshape(x.shape)[index])
    return formula


def joined(axis):
    def formula(*xs):
        slices = [part for x in xs for part in np.moveaxis(x, axis, 0)]
        return np.stack(slices, axis=axis)
    return formula


def extreme(axis, keepdims, place):
    """Sort along every axis, and take the first or the last."""
    def formula(x):
        axes = range(x.ndim) if axis is None else np.atleast_1d(axis)
        y = np.apply_over_axes(lambda a, i: np.sort(a, i).take([place], i), x, [int(i) for i in axes]) if x.ndim else x
        return y if keepdims else y.reshape([n for i, n in enumerate(x.shape) if i not in {int(a) % x.ndim for a in axes}])
    return formula


def pattern(*shapes):
    """A condition in the shape to which all of these broadcast."""
    shape = np.broadcast_shapes(*shapes)
    return np.arange(math.prod(shape)).reshape(shape) % 3 == 0


def matmul(x1, x2):
    rows, columns = "i" * (x1.ndim > 1), "j" * (x2.ndim > 1)
    return np.einsum(f"{'...' * bool(rows)}{rows}k,{'...' * bool(columns)}k{columns}->"
                     f"{'...' * bool(rows or columns)}{rows}{columns}", x1, x2)


def linear(x, W, b=0):
    return np.einsum("...i,ki->...k", x, W) + b


def merged(s, bias):
    """The layer with the update merged into the weight."""
    def formula(x, W, *rest):
        *b, A, B = rest
        return linear(x, W + s * np.einsum("kj,ji->ki", B, A), *b)
    return formula


def softmax(axis):
    def formula(x):
        z = np.moveaxis(x, axis, -1)
        y = 1.0 / np.exp(z[..., None, :] - z[..., :, None]).sum(axis=-1)
        return np.moveaxis(y, -1, axis)
    return formula


def philox_word(seed, step, position):
    """One word of Philox4x32-10, with Python's integers."""
    block, word = divmod(position, 4)
    counter = [block % 2**32, block // 2**32, step % 2**32, step // 2**32]
    key = [seed % 2**32, seed // 2**32]
    return philox_block(counter, key)[word]


def philox_block(counter, key):
    counter, key = list(counter), list(key)
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * counter[0], 2**32), divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def masked(p, seed, step):
    def formula(x):
        kept = [philox_word(seed, step, i) // 256 / 2**24 >= p for i in range(x.size)]
        return np.where(np.array(kept, bool).reshape(x.shape), x / (1 - p), 0).astype(x.dtype)
    return formula


def on_device(index):
    """An index whose arrays live where the tensor lives."""
    if isinstance(index, tuple):
        return tuple(map(on_device, index))
    return backend.asarray(index) if isinstance(index, np.ndarray) else index


# -- shapes for hypothesis --------------------------------------------------------------------------------------------

ANY = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4).map(lambda shape: (shape,))
FILLED = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4).map(lambda shape: (shape,))
PAIR = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=4).map(lambda s: s.input_shapes)
EQUAL = FILLED.map(lambda shapes: shapes * 2)
PRODUCT = hnp.mutually_broadcastable_shapes(signature="(m,k),(k,n)->(m,n)", max_dims=2, max_side=4).map(
    lambda s: s.input_shapes)
LEADING = st.lists(st.integers(0, 3), max_size=2).map(tuple)
SIDE = st.integers(1, 4)
AFFINE = st.tuples(LEADING, SIDE, SIDE).map(lambda d: ((*d[0], d[1]), (d[2], d[1]), (d[2],)))
LOW_RANK = st.tuples(LEADING, SIDE, SIDE, SIDE).map(
    lambda d: ((*d[0], d[1]), (d[2], d[1]), (d[2],), (d[3], d[1]), (d[2], d[3])))


# -- arithmetic -------------------------------------------------------------------------------------------------------

BROADCASTS = {
    "equal": ((3, 4), (3, 4)), "row": ((3, 4), (4,)), "column": ((3, 1), (3, 4)), "outer": ((3, 1), (1, 4)),
    "scalar": ((), (2, 3)), "one": ((1,), (1, 1)), "empty": ((2, 0), (2, 1)), "leading": ((2, 1, 3), (4, 1)),
}

for name, (one, two) in BROADCASTS.items():
    more = dict(drawn=PAIR) if name == "equal" else {}
    case(f"add {name}", ops.Add, ops.add, each(lambda a, b: a + b), one, two, affine=True, **more)
    case(f"sub {name}", ops.Sub, ops.sub, each(lambda a, b: a - b), one, two, affine=True, **more)
    case(f"mul {name}", ops.Mul, ops.mul, each(lambda a, b: a * b), one, two, affine=True,
         kept=lambda n, x1, x2, y: n[1] * x1.size + n[0] * x2.size, **more)
    case(f"div {name}", ops.Div, ops.div, each(lambda a, b: a / b), one, two, low=0.5,
         kept=lambda n, x1, x2, y: x2.size + n[1] * y.size, **more)

case("x + number", ops.Add, lambda x: x + 3, each(lambda a: a + 3), (2, 3), affine=True)
case("number + x", ops.Add, lambda x: 3 + x, each(lambda a: a + 3), (2, 3), affine=True)
case("x - number", ops.Sub, lambda x: x - 2, each(lambda a: a - 2), (2, 3), affine=True)
case("number - x", ops.Sub, lambda x: 2 - x, each(lambda a: 2 - a), (2, 3), affine=True)
case("x * number", ops.Mul, lambda x: x * -3, each(lambda a: a * -3), (2, 3), affine=True)
case("number * x", ops.Mul, lambda x: 2.5 * x, each(lambda a: a * 2.5), (2, 3))
case("x / number", ops.Div, lambda x: x / 4.0, each(lambda a: a * 0.25), (2, 3))
case("number / x", ops.Div, lambda x: 1.0 / x, each(lambda a: a ** -1.0), (2, 3), low=0.5,
     kept=lambda n, x, y: x.size + y.size)
case("neg", ops.Neg, ops.neg, each(lambda a: 0 - a), (2, 3), affine=True, drawn=ANY)

for exponent in (2, 3, -1, -2.0):
    case(f"pow {exponent}", ops.Pow, lambda x, p=exponent: ops.pow(x, p),
         each(lambda a, p=exponent: math.copysign(1.0, a) ** p * math.exp(p * math.log(abs(a)))), (2, 3), low=0.4,
         kept=lambda n, x, y: x.size, drawn=ANY if exponent == 3 else None)
case("pow 0", ops.Pow, lambda x: x ** 0, each(lambda a: 1.0), (2, 3), kept=lambda n, x, y: x.size)
case("pow 1", ops.Pow, lambda x: x ** 1, each(lambda a: a), (2, 3), kept=lambda n, x, y: x.size)
case("pow 2.5", ops.Pow, lambda x: x ** 2.5, each(lambda a: a * a * math.sqrt(a)), (2, 3), signed=False, low=0.2,
     kept=lambda n, x, y: x.size)
case("exp", ops.Exp, ops.exp, each(lambda a: math.cosh(a) + math.sinh(a)), (2, 3), drawn=ANY,
     kept=lambda n, x, y: y.size)
case("log", ops.Log, ops.log, each(lambda a: 2 * math.atanh((a - 1) / (a + 1))), (2, 3), signed=False, drawn=ANY,
     kept=lambda n, x, y: x.size)
case("sqrt", ops.Sqrt, ops.sqrt, each(lambda a: a / a ** 0.5), (2, 3), signed=False, drawn=ANY,
     kept=lambda n, x, y: y.size)


for name, (one, two) in BROADCASTS.items():
    more = dict(drawn=PAIR) if name == "equal" else {}
    case(f"where {name}", ops.Where, lambda a, b: ops.where(on_device(pattern(a.shape, b.shape)), a, b),
         lambda a, b: each(lambda c, a, b: c * a + (1 - c) * b)(pattern(a.shape, b.shape).astype(a.dtype), a, b), one, two,
         affine=True, **more)
    more.update(kept=lambda n, x1, x2, y: x1.size + x2.size, analytic=False)
    case(f"maximum {name}", ops.Maximum, ops.maximum, each(lambda a, b: (a + b + abs(a - b)) / 2), one, two, **more)
    case(f"minimum {name}", ops.Minimum, ops.minimum, each(lambda a, b: (a + b - abs(a - b)) / 2), one, two, **more)
case("where condition (3, 1)", ops.Where, lambda a, b: ops.where(on_device(pattern((3, 1))), a, b),
     lambda a, b: pattern((3, 1)) * a + ~pattern((3, 1)) * b, (4,), (), affine=True)
case("where condition of a list", ops.Where, lambda a: ops.where([[True], [False]], a, 3), lambda a: np.stack([a, 0 * a + 3]),
     (2,), affine=True)
case("maximum of a number", ops.Maximum, lambda x: ops.maximum(0.5, x), each(lambda a: a if a > 0.5 else 0.5), (3, 4),
     kept=lambda n, x, y: x.size, analytic=False)
case("minimum of a number", ops.Minimum, lambda x: ops.minimum(x, 0.5), each(lambda a: a if a < 0.5 else 0.5), (3, 4),
     kept=lambda n, x, y: x.size, analytic=False)
case("abs", ops.Abs, ops.abs, each(lambda a: math.sqrt(a * a)), (3, 4), kept=lambda n, x, y: x.size, analytic=False, drawn=ANY)
for low, high in [(-1.0, 1.0), (None, 0.7), (-0.3, None), (None, None)]:
    case(f"clip {low} {high}", ops.Clip, lambda x, b=(low, high): ops.clip(x, *b),
         each(lambda a, b=(low, high): sorted([-9.0 if b[0] is None else b[0], a, 9.0 if b[1] is None else b[1]])[1]), (3, 4),
         kept=lambda n, x, y: x.size, analytic=False, drawn=ANY if low == -1.0 else None)


# -- activations ------------------------------------------------------------------------------------------------------


def gelu(a):
    t = math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)
    return a / (1 + math.exp(-2 * t))


ACTIVATIONS = [
    ("relu", ops.ReLU, ops.relu, lambda a: (a + abs(a)) / 2, True),
    ("tanh", ops.Tanh, ops.tanh, lambda a: math.expm1(2 * a) / (math.exp(2 * a) + 1), True),
    ("sigmoid", ops.Sigmoid, ops.sigmoid, lambda a: (1 + math.tanh(a / 2)) / 2, True),
    ("silu", ops.SiLU, ops.silu, lambda a: a * (1 + math.tanh(a / 2)) / 2, False),
    ("gelu", ops.GELU, ops.gelu, gelu, False),
]
for name, op, call, formula, keeps_output in ACTIVATIONS:
    case(name, op, call, each(formula), (3, 4), drawn=ANY, analytic=name != "relu",
         kept=(lambda n, x, y: y.size) if keeps_output else (lambda n, x, y: x.size))
    case(f"{name} wide", op, call, each(formula), (50,), high=9.0, analytic=name != "relu",
         kept=(lambda n, x, y: y.size) if keeps_output else (lambda n, x, y: x.size))

for axis, shape in [(-1, (3, 4)), (0, (3, 4)), (1, (2, 3, 2)), (-3, (2, 3, 2)), (0, (5,)), (-1, (3, 1)), (-1, (0, 3)),
                    (-1, (2, 0)), (0, (0,))]:
    more = dict(kept=lambda n, x, y: y.size, drawn=FILLED if (axis, shape) == (-1, (3, 4)) else None)
    case(f"softmax {axis} {shape}", ops.Softmax, lambda x, a=axis: ops.softmax(x, a), softmax(axis), shape, **more)
    case(f"log_softmax {axis} {shape}", ops.LogSoftmax, lambda x, a=axis: ops.log_softmax(x, a),
         lambda x, a=axis: np.log(softmax(a)(x)), shape, **more)

for p, seed, step in [(0.0, 1, 0), (0.5, 2**63 + 5, 1), (0.3, 7, 2**40), (0.9, 0, 2**64 - 1)]:
    case(f"dropout {p}", ops.Dropout, lambda x, a=(p, seed, step): ops.dropout(x, *a), masked(p, seed, step), (5, 7),
         affine=p in (0.0, 0.5), drawn=ANY if p == 0.5 else None)


# -- reductions and losses --------------------------------------------------------------------------------------------

REDUCTIONS = [
    (None, False, (2, 3, 4)), (0, False, (2, 3, 4)), (-1, False, (2, 3, 4)), ((0, 2), False, (2, 3, 4)),
    ((-1, 0), True, (2, 3, 4)), (1, True, (2, 3, 4)), (None, True, (2, 3)), ((0, 1), False, (3, 2)), (0, False, (1,)),
    (None, False, ()), (1, False, (0, 3)), ((), False, (2, 3)),
]
for axis, keepdims, shape in REDUCTIONS:
    settings = dict(axis=axis, keepdims=keepdims)
    more = dict(drawn=FILLED if shape == (2, 3, 4) and axis in (None, -1) else None)
    case(f"sum {axis} {keepdims} {shape}", ops.Sum, lambda x, s=settings: ops.sum(x, **s), total(**settings), shape,
         affine=True, **more)
    case(f"mean {axis} {keepdims} {shape}", ops.Mean, lambda x, s=settings: ops.mean(x, **s),
         total(**settings, average=True), shape, **more)
    more.update(kept=lambda n, x, y: x.size + y.size, analytic=False)
    for name, op, call, place in [("max", ops.Max, ops.max, -1), ("min", ops.Min, ops.min, 0)]:
        case(f"{name} {axis} {keepdims} {shape}", op, lambda x, f=call, s=settings: f(x, **s),
             extreme(**settings, place=place), shape, **more)
for axis, shape in [(None, (0,)), (0, (0, 3)), (-1, (2, 0))]:
    case(f"sum of nothing {axis} {shape}", ops.Sum, lambda x, a=axis: ops.sum(x, a), total(axis), shape, affine=True)

for shape in [(4, 3), (5,), (), (1, 1), (2, 3, 2)]:
    case(f"mse {shape}", ops.MSE, ops.mse, lambda p, t: np.array(math.fsum(((p - t) ** 2).flat) / p.size), shape, shape,
         kept=lambda n, p, t, y: p.size, products=True, drawn=EQUAL if shape == (4, 3) else None)


# -- shapes -----------------------------------------------------------------------------------------------------------

for shape, to in [((2, 6), (3, 4)), ((2, 3), (6,)), ((1,), ()), ((), (1, 1)), ((0, 3), (3, 0)), ((4, 3, 2), (2, 12))]:
    case(f"reshape {shape} {to}", ops.Reshape, lambda x, to=to: ops.reshape(x, to), refilled(to), shape, affine=True,
         view=True)
case("reshape -1", ops.Reshape, lambda x: ops.reshape(x, (3, -1)), refilled((3, 4)), (2, 6), affine=True, view=True)

for shape, axes in [((2, 3, 4), (2, 0, 1)), ((2, 3, 4), (-1, 0, 1)), ((2, 3), (1, 0)), ((0, 2), (1, 0)), ((3,), (0,)),
                    ((2, 3, 1, 2), (3, 1, 0, 2))]:
    case(f"transpose {shape} {axes}", ops.Transpose, lambda x, a=axes: ops.transpose(x, a),
         permuted(axes), shape, affine=True, view=True)
case("transpose all", ops.Transpose, ops.transpose, permuted((2, 1, 0)), (2, 3, 4), affine=True, view=True)
case("transpose 0-d", ops.Transpose, ops.transpose, permuted(()), (), affine=True, view=True)

INDICES = [
    (1, (4, 3)), (-1, (4, 3)), ((1, -2), (4, 3)), (slice(1, 3), (4, 3)), (slice(None, None, -2), (5, 2)),
    ((slice(None), slice(3, 0, -1)), (2, 4)), ((Ellipsis, 0), (2, 3, 4)), ((None, slice(1, None), None), (3, 2)),
    ((Ellipsis, None, 1), (2, 3)), ((0, Ellipsis, slice(None, None, 2)), (2, 3, 5)), (Ellipsis, ()),
    (slice(2, 2), (3, 2)),
    (np.array([0, 2, 0, -1, 0]), (4, 3)), (np.array([[1, 1], [0, 1]]), (3, 2)), (np.array([], int), (3, 2)),
    ((np.array([0, 1, 0]), np.array([2, 2, 2])), (2, 3)), ((slice(None), np.array([1, 1, 0])), (2, 3)),
    ((np.array([1, 1]), slice(None), np.array([0, 0])), (2, 3, 2)), ((np.array([1, 0, 1]), None, slice(1, 3)), (2, 3)),
    ((np.array([[0], [1]]), np.array([1, 1, 2])), (2, 3)), (np.array([True, False, True]), (3, 2)),
    (np.array([[True, False], [True, True]]), (2, 2)), (np.array([False, False]), (2, 3)),
]
for index, shape in INDICES:
    name = "x" + str(index).replace("\n", "").replace("slice", "").replace("None", "_").replace("Ellipsis", "...")
    case(f"getitem {name}", ops.GetItem, lambda x, i=index: x[on_device(i)], picked(index), shape, affine=True,
         view=True)

JOINS = [
    (0, ((2, 3), (1, 3), (4, 3))), (1, ((2, 1), (2, 3), (2, 2))), (-1, ((2, 2, 1), (2, 2, 2), (2, 2, 3))),
    (-2, ((1, 2), (0, 2), (2, 2))), (0, ((2, 3),)), (0, ((2,), (1,))),
]
for axis, shapes in JOINS:
    case(f"concatenate {axis} {shapes}", ops.Concatenate, lambda *xs, a=axis: ops.concatenate(xs, axis=a), joined(axis),
         *shapes, affine=True)


case("cast and back", ops.Cast, lambda x: ops.cast(ops.cast(x, "float64"), x.data.real.dtype), each(lambda a: a),
     (2, 3), affine=True, view=True, drawn=ANY)

for axis, shape in [(0, (2, 3)), (1, (2, 3)), (-1, (2, 3)), (-3, (2, 3)), (0, ()), (1, (0,))]:
    case(f"stack {axis} {shape}", ops.Stack, lambda *xs, a=axis: ops.stack(xs, axis=a),
         lambda *xs, a=axis: np.moveaxis(np.array([*xs]), 0, a), shape, shape, shape, affine=True)
case("stack of one", ops.Stack, lambda x: ops.stack([x], axis=1), lambda x: x[:, None], (2, 3), affine=True)


# -- products ---------------------------------------------------------------------------------------------------------

PRODUCTS = [
    ((3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((2, 3, 4), (4, 2)), ((2, 2, 3, 4), (4, 2)),
    ((3, 4), (2, 4, 5)), ((1, 3, 4), (2, 4, 1)), ((1, 1), (1, 1)), ((4, 1), (1, 3)), ((0, 3), (3, 2)), ((3, 0), (0, 2)),
    ((3, 2), (2, 0)), ((0, 2, 3), (0, 3, 2)), ((2, 0, 3), (3, 2)), ((2, 3, 0), (0, 2)), ((2, 3, 4), (4, 0)),
    ((3,), (3, 2)), ((3,), (2, 3, 2)), ((2, 3), (3,)), ((2, 4, 3), (3,)), ((3,), (3,)), ((1,), (1,)), ((0,), (0,)),
    ((0,), (0, 2)), ((2, 0), (0,)), ((0, 3), (3,)), ((3,), (0, 3, 2)), ((3,), (3, 0)),
]
for one, two in PRODUCTS:
    case(f"matmul {one} {two}", ops.MatMul, ops.matmul, matmul, one, two, affine=True, products=True,
         kept=lambda n, x1, x2, y: n[1] * x1.size + n[0] * x2.size, drawn=PRODUCT if one == (2, 1, 3, 4) else None)

ROWS = {
    "matrix": (5, 4), "3-D": (2, 3, 4), "vector": (4,), "one row": (1, 4), "no rows": (0, 4), "no rows 3-D": (2, 0, 4),
}
for name, x in ROWS.items():
    more = dict(affine=True, products=True)
    case(f"linear {name}", ops.Linear, ops.linear, linear, x, (3, 4), (3,), drawn=AFFINE if name == "matrix" else None,
         kept=lambda n, x, W, b, y: n[1] * x.size + n[0] * W.size, **more)
    case(f"linear {name} without bias", ops.Linear, ops.linear, linear, x, (3, 4),
         kept=lambda n, x, W, y: n[1] * x.size + n[0] * W.size, **more)
case("linear one output", ops.Linear, ops.linear, linear, (5, 4), (1, 4), (1,), affine=True, products=True,
     kept=lambda n, x, W, b, y: n[1] * x.size + n[0] * W.size)


def lora_kept(needs, x, W, *rest):
    *b, A, B, y = rest
    needs_x, needs_W, *_, needs_A, needs_B = needs
    z = math.prod(x.shape[:-1]) * A.shape[0]
    return ((needs_A or needs_W) * x.size + needs_B * z + needs_x * (W.size + A.size)
            + (needs_x or needs_A) * B.size)


for name, x in ROWS.items():
    for r, s in [(2, 2), (1, 0.375)]:
        more = dict(kept=lora_kept, products=True, affine=s == 2)
        case(f"lora_linear {name} r={r}", gradient.LoRALinear,
             lambda x, W, b, A, B, s=s: gradient.lora_linear(x, W, b, A, B, float(s)), merged(s, True),
             x, (3, 4), (3,), (r, 4), (3, r), drawn=LOW_RANK if (name, r) == ("matrix", 2) else None, **more)
        case(f"lora_linear {name} r={r} without bias", gradient.LoRALinear,
             lambda x, W, A, B, s=s: gradient.lora_linear(x, W, None, A, B, float(s)), merged(s, False),
             x, (3, 4), (r, 4), (3, r), **more)

for name, x in ROWS.items():
    for r, s in [(2, 2), (1, 0.375)]:
        case(f"lora_update {name} r={r}", gradient.LoRAUpdate, lambda x, A, B, s=s: gradient.lora_update(x, A, B, float(s)),
             lambda x, A, B, s=s: s * np.einsum("...i,ji,kj->...k", x, A, B), x, (r, 4), (3, r), affine=s == 2, products=True,
             drawn=LOW_RANK.map(lambda shapes: (shapes[0], *shapes[3:])) if (name, r) == ("matrix", 2) else None,
             kept=lambda needs, x, A, B, y: (needs[1] * x.size + needs[2] * y.size // len(B) * len(A) + needs[0] * A.size
                                             + (needs[0] or needs[1]) * B.size))

# Of one operation, so that float16 is rounded once: tests/nn has whole blocks.
case("recompute", ops.Recompute, lambda x, w: ops.recompute(ops.mul, (), x, w), lambda x, w: x * w, (3, 4), (4,),
     kept=lambda needs, x, w, y: x.size + w.size, analytic=False, affine=True)

from cases_attention import CASES as _attention  # noqa: E402  (last: it needs Case)

CASES += _attention

from cases_norms import CASES as _norms  # noqa: E402

CASES += _norms

from cases_conv import CASES as _conv  # noqa: E402
CASES += _conv

from cases_dora import CASES as _dora  # noqa: E402

CASES += _dora

from cases_lora_conv import CASES as _lora_conv  # noqa: E402

CASES += _lora_conv

from cases_lora import CASES as _lora  # noqa: E402

CASES += _lora

from cases_subspaces import CASES as _subspaces  # noqa: E402

CASES += _subspaces
