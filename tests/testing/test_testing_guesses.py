"""Each usual mistake in a backward is planted in a small operation, and gradcheck says which it is."""
import numpy as np
import pytest
from conftest import PROOF, fetch, place
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import engine, errors, testing
from minilora.ops.elementwise import unbroadcast

S = 0.37


class Planted(engine.Op):
    """Each planted operation computes its forward rightly, and has one mistake in its backward."""

    def backward(self, dy):
        return self.gradients(dy, *self.saved)


class Square(Planted):
    """y = x^2: dx = 2 x dy"""

    def forward(self, x):
        self.save(x)
        return x * x

    def gradients(self, dy, x):
        return (2.0 * x * dy,)


class Linear(Planted):
    """y = s (x W^T + b): dx = s dy W, dW = s dy^T x, db = s sum of the rows of dy"""

    s = S  # a setting

    def forward(self, x, W, b):
        self.save(x, W)
        return self.s * (self.xp.dot(x, W.T) + b)

    def gradients(self, dy, x, W):
        return self.s * self.xp.dot(dy, W), self.s * self.xp.dot(dy.T, x), self.s * dy.sum(axis=0)


class Product(Planted):
    """y = s x w: dx = s w dy, dw = s x dy"""

    def forward(self, x, w):
        self.save(x, w)
        return S * x * w

    def gradients(self, dy, x, w):
        return S * w * dy, S * x * dy


class Divide(Planted):
    """y = x / w: dx = dy / w, dw = -x dy / w^2"""

    def forward(self, x, w):
        self.save(x, w)
        return x / w

    def gradients(self, dy, x, w):
        return dy / w, -x * dy / (w * w)


class Add(Planted):
    """y = x + w, broadcast"""

    def forward(self, x, w):
        self.save(x, w)
        return x + w

    def gradients(self, dy, x, w):
        return unbroadcast(dy, x.shape), unbroadcast(dy, w.shape)


class Mean(Planted):
    """y = the mean of the rows of x^2"""

    def forward(self, x):
        self.save(x)
        return (x * x).mean(axis=0)

    def gradients(self, dy, x):
        return (2.0 * x * dy / len(x),)


class ReLU(Planted):
    """y = x where x > 0, else 0"""

    def forward(self, x):
        self.save(x)
        return self.xp.where(x.real > 0, x, 0.0 * x)

    def gradients(self, dy, x):
        return (self.xp.where(x > 0, dy, 0.0),)


class Lookup(Planted):
    """y = the rows of W of certain numbers, some of which repeat"""

    rows = (0, 2, 2, 3, 2, 5)

    def forward(self, W):
        self.save(W)
        return W[list(self.rows)] * 1.0

    def gradients(self, dy, W):
        dW = self.xp.zeros(W.shape)
        for i, row in enumerate(self.rows):
            dW[row] = dW[row] + dy[i]
        return (dW,)


class Dropped(Planted):
    """y = x mask / (1 - p), with a mask that stays the same"""

    p = 0.2

    def forward(self, x):
        self.save(x)
        return x * self.mask(x) / (1.0 - self.p)

    def mask(self, x):
        return self.xp.arange(x.size).reshape(x.shape) % 3 > 0

    def gradients(self, dy, x):
        return (dy * self.mask(x) / (1.0 - self.p),)


class Causal(Planted):
    """y = the elements of x on and below the diagonal"""

    def forward(self, x):
        self.save(x)
        return self.xp.tril(x) * 1.0

    def gradients(self, dy, x):
        return (self.xp.tril(dy),)


class Softmax(Planted):
    """y = exp(x) / sum of its row: dx = y (dy - sum of the row of y dy)"""

    def forward(self, x):
        e = self.xp.exp(x)
        y = e / e.sum(axis=-1, keepdims=True)
        self.save(y)
        return y * 1.0

    def gradients(self, dy, y):
        return (y * (dy - (y * dy).sum(axis=-1, keepdims=True)),)


class Clipped(Planted):
    """y = x between -1 and 1"""

    def forward(self, x):
        self.save(x)
        return self.xp.where(abs(x.real) < 1.0, x, self.xp.sign(x.real) + 0.0 * x)

    def gradients(self, dy, x):
        return (self.xp.where(abs(x) < 1.0, dy, 0.0),)


class Exp3(Planted):
    """y = exp(x) of three axes"""

    def forward(self, x):
        self.save(self.xp.exp(x))
        return self.xp.exp(x)

    def gradients(self, dy, y):
        return (y * dy,)


def mistake(op, wrong):
    """The operation with another `gradients`."""
    return type(f"Wrong{op.__name__}", (op,), {"gradients": wrong})


def where(op, condition, yes, no):
    return op.xp.where(condition, yes, no)


def one_row(op, dy, x):
    dx = 2.0 * x * dy
    dx[1] = x[1] * dy[1]
    return (dx,)


def one_column(op, dy, x):
    dx = 2.0 * x * dy
    dx[:, 0] = 0.0
    return (dx,)


def all_but_the_last_row(op, dy, x):
    dx = 2.0 * x * dy
    dx[-1] = -dx[-1]
    return (dx,)


def first_slice(op, dy, y):
    dx = y * dy
    dx[0] = dx[0] + 1.0
    return (dx,)


def part_of_a_row(op, dy, x):
    dx = 2.0 * x * dy
    dx[2, 1:3] = dx[2, 1:3] * dx[2, 2:4]
    return (dx,)


def assigned(op, dy, W):
    """What NumPy does with an index that repeats in an assignment: the last one stays."""
    dW = op.xp.zeros(W.shape)
    for i, row in enumerate(op.rows):
        dW[row] = dy[i]
    return (dW,)


# (operation, its wrong gradients, shapes, the leaf, words)
MISTAKES = [
    (Square, lambda op, dy, x: (x * dy,), [(5, 4)], "x", "numerical / analytic = 2.000 everywhere: a missing factor 2?"),
    (Square, lambda op, dy, x: (-2.0 * x * dy,), [(5, 4)], "x", "sign flipped"),
    (Square, lambda op, dy, x: (2.0 * x,), [(5, 4)], "x", "times dy it would be right: is dy left out?"),
    (Square, lambda op, dy, x: (2.0 * x * dy * dy,), [(5, 4)], "x", "divided by dy it would be right: is dy in it twice?"),
    (Square, lambda op, dy, x: (dy * 1.0,), [(5, 4)], "x", "it is dy itself: is the derivative of the operation left out?"),
    (Square, lambda op, dy, x: (2.0 * dy,), [(5, 4)], "x", "times x, element by element, it would be right"),
    (Square, lambda op, dy, x: (x * x * dy,), [(5, 4)], "x", "divided by x, element by element, and times 2 it would be right"),
    (Square, lambda op, dy, x: (2.0 * x * dy + 1.0,), [(5, 4)], "x", "differs by a constant 1 everywhere"),
    (Square, lambda op, dy, x: (2.0 * x * (dy * 1.0).astype("float32"),), [(5, 4)], "x", "digits: is something in it float32"),
    (Square, lambda op, dy, x: (2.0 * x * dy - (x * dy).mean(axis=1, keepdims=True),), [(5, 4)], "x",
     "differs by a constant in each row: a sum or a mean over axis 1 left out, or one too many?"),
    (Square, lambda op, dy, x: (2.0 * x * dy + dy[0],), [(5, 4)], "x", "differs by a constant in each column: a sum or a mean"),
    (Square, lambda op, dy, x: (0.0 * dy,), [(5, 4)], "x", "gradient is zero"),
    (Square, lambda op, dy, x: (2.0 * (x * dy).T,), [(4, 4)], "x", "equals the transpose"),
    (Square, lambda op, dy, x: ((x * dy).T,), [(4, 4)], "x", "equals the transpose up to a factor: numerical / analytic = 2"),
    (Square, lambda op, dy, x: (2.0 * (x * dy)[::-1],), [(5, 4)], "x", "its rows are in reverse order"),
    (Square, lambda op, dy, x: (2.0 * (x * dy)[:, [1, 2, 3, 0]],), [(5, 4)], "x", "its columns are shifted by one: column 0"),
    (Square, lambda op, dy, x: (2.0 * (x * dy)[[2, 0, 1, 4, 3]],), [(5, 4)], "x", "its rows are in another order: those of 1"),
    (Square, lambda op, dy, x: (abs(2.0 * x) * dy,), [(5, 4)], "x", "just where x < 0: sign flipped"),
    (Square, one_row, [(3, 4)], "x", "only row 1 is wrong, in all 4 elements: numerical / analytic = 2.000: a missing"),
    (Square, one_column, [(5, 4)], "x", "only the first column is wrong, in all 5 elements: it is 0 there"),
    (Square, all_but_the_last_row, [(5, 4)], "x", "only the last row is wrong, in all 4 elements: sign flipped"),
    (Square, part_of_a_row, [(5, 4)], "x", "only row 2 is wrong, in 2 of 4 elements"),
    (Square, lambda op, dy, x: ((2.0 * x * dy).sum(axis=0, keepdims=True) + 0.0 * x,), [(5, 4)], "x",
     "it is the sum over axis 0 of what is right, spread over that axis"),
    (Square, lambda op, dy, x: ((2.0 * x * dy).mean(axis=1, keepdims=True) + 0.0 * x,), [(5, 4)], "x",
     "it is the mean over axis 1 of what is right, spread over that axis"),
    (Exp3, first_slice, [(3, 2, 4)], "x", "only the first slice along axis 0 is wrong, in all 8 elements: there it differs by"),
    (Exp3, lambda op, dy, y: ((y * dy).transpose(0, 2, 1),), [(3, 4, 4)], "x",
     "its axes are in another order: transpose(0, 2, 1)"),
    (Linear, lambda op, dy, x, W: (dy @ W, dy.T @ x, dy.sum(axis=0)), [(5, 4), (3, 4), (3,)], "W",
     "numerical / analytic = 0.370 everywhere: scaled by a constant. s of Linear is 0.37: is it left out?"),
    (Linear, lambda op, dy, x, W: (S * dy @ W, S * S * dy.T @ x, S * dy.sum(axis=0)), [(5, 4), (3, 4), (3,)], "W",
     "s of Linear is 0.37: is it there once too often?"),
    (Linear, lambda op, dy, x, W: (S * dy @ W, S * dy.T @ x, S * dy.mean(axis=0)), [(5, 4), (3, 4), (3,)], "b",
     "a missing factor 5? 5 is also the length of axis 0 of the output: a mean where the sum is wanted?"),
    (Linear, lambda op, dy, x, W: (S * dy @ W, S * dy.T @ x / np.sqrt(3.0), S * dy.sum(axis=0)), [(5, 4), (3, 4), (3,)], "W",
     "Its square is 3, and 3 is the length of axis 0 of W"),
    (Linear, lambda op, dy, x, W: (S * dy @ W.T, S * dy.T @ x, S * dy.sum(axis=0)), [(5, 4), (4, 4), (4,)], "x",
     "wrong in 20 of 20. W is square: choose sizes that differ, and a missing .T does not fit"),
    (Mean, lambda op, dy, x: (2.0 * x * dy + 0.0 * x,), [(5, 4)], "x",
     "a factor 5 too many? 5 is also the length of axis 0 of x: a sum where the mean is wanted?"),
    (Product, lambda op, dy, x, w: (S * x * dy, S * w * dy), [(5, 4), (5, 4)], "x",
     "dx and dw look swapped: each equals the other's numerical gradient"),
    (Product, lambda op, dy, x, w: (S * (x * dy).T, S * (w * dy).T), [(4, 4), (4, 4)], "w",
     "dx and dw look swapped and transposed"),
    (Product, lambda op, dy, x, w: (S * w * dy, S * w * dy), [(5, 4), (5, 4)], "w", "it equals the gradient of x"),
    (Product, lambda op, dy, x, w: (S * w * dy, S * (w * dy).T), [(4, 4), (4, 4)], "w",
     "it equals the transpose of the gradient of x"),
    (Product, lambda op, dy, x, w: (S * x * w * dy, S * w * dy), [(5, 4), (5, 4)], "x",
     "what was returned for w would be right here"),
    (Product, lambda op, dy, x, w: (S * dy, S * x * dy), [(5, 4), (5, 4)], "x",
     "times w, element by element, it would be right"),
    (Divide, lambda op, dy, x, w: (dy / w, x * dy / (w * w)), [(5, 4), (5, 4)], "w", "sign flipped"),
    (Divide, lambda op, dy, x, w: (dy / w, -x * dy / w), [(5, 4), (5, 4)], "w",
     "divided by w, element by element, it would be right"),
    (Add, lambda op, dy, x, w: (dy, dy.mean(axis=0)), [(5, 4), (4,)], "w", "a mean where the sum is wanted?"),
    (Add, lambda op, dy, x, w: (dy, dy[0]), [(5, 4), (4,)], "w", "it is dy[0] alone: is the sum over axis 0 left out?"),
    (ReLU, lambda op, dy, x: (dy * 1.0,), [(5, 4)], "x", "it is dy itself"),
    (ReLU, lambda op, dy, x: (where(op, x > 0, dy, 0.01 * dy),), [(5, 4)], "x", "just where x < 0: there it should be 0"),
    (ReLU, lambda op, dy, x: (where(op, x > 0, 0.0 * dy, dy),), [(5, 4)], "x",
     "where x < 0: there it should be 0, and is dy. Where x > 0: it is 0 there"),
    (ReLU, lambda op, dy, x: (where(op, x > 0, dy * dy, 0.0),), [(5, 4)], "x", "divided by dy it would be right"),
    (Clipped, lambda op, dy, x: (where(op, abs(x) < 1.0, dy, 0.5 * dy),), [(6, 5)], "x", "just where |x| > 1"),
    (Lookup, assigned, [(6, 3)], "W", "only row 2 is wrong, in all 3 elements"),
    (Dropped, lambda op, dy, x: (dy * op.mask(x),), [(5, 4)], "x", "p of Dropped is 0.2: is 1 / (1 - 0.2) left out?"),
    (Causal, lambda op, dy, x: (op.xp.tril(dy) + 0.5 * op.xp.triu(dy, 1),), [(5, 5)], "x",
     "just above the diagonal: there it should be 0"),
    (Causal, lambda op, dy, x: (op.xp.tril(dy, -1),), [(5, 5)], "x", "just on the diagonal: it is 0 there"),
    (Softmax, lambda op, dy, y: (y * dy,), [(5, 4)], "x", "wrong in 20 of 20"),
    (Softmax, lambda op, dy, y: (y * (dy - (y * dy).sum(axis=-1, keepdims=True)) / y.max(axis=-1, keepdims=True),), [(5, 4)],
     "x",
     "each row has a factor of its own: is one of shape (5, 1) left out, or too many?"),
]


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [place(rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)) for shape in shapes]


@pytest.mark.parametrize(("op", "wrong", "shapes", "leaf", "words"), MISTAKES)
@PROOF
def test_a_usual_mistake_is_named(op, wrong, shapes, leaf, words, device):
    names = op.forward.__code__.co_varnames[1:1 + len(shapes)]
    f = eval(f"lambda {', '.join(names)}: apply(op, {', '.join(names)})", {"apply": engine.apply, "op": mistake(op, wrong)})
    report = testing.gradcheck(f, *draw(*shapes))
    assert not report[leaf].passed and words.replace(f"of {op.__name__} ", f"of Wrong{op.__name__} ") in report[leaf].guess
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_each_kind_of_guess_is_planted():
    """At least twenty different mistakes, each with its own words."""
    assert len({words for *_, words in MISTAKES}) >= 40


# -- what a guess must never do -----------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
odd = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, 1e300, -1e300, 1e-300, 5e-324, np.inf, -np.inf, np.nan])
plain = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]) | st.floats(-2, 2)


@given(st.data())
def test_no_guess_raises_whatever_the_numbers(data):
    """Shapes without axes, without elements and with one; NaN, inf, the largest and the smallest numbers."""
    shape = data.draw(shapes)
    numbers = data.draw(st.sampled_from([odd, plain]))
    mine, right = (data.draw(hnp.arrays("float64", shape, elements=numbers)) for _ in range(2))
    comparison = testing.compare("x", mine, right)
    assert bool(comparison) == (comparison.guess == "") and str(comparison)
    mixed = np.array(mine, "complex128")
    mixed.imag = right
    comparison = testing.compare("x", mixed, right)
    assert bool(comparison) == (comparison.guess == "")
    other = data.draw(hnp.arrays("float64", data.draw(shapes), elements=numbers))
    assert isinstance(testing.compare("x", mine, other).guess, str)


@given(st.data())
def test_no_guess_raises_whatever_was_returned(data):
    """As above, with a leaf, a cotangent and another leaf, of equal shapes or not, along directions or not."""
    shape = data.draw(shapes)
    wrong = data.draw(hnp.arrays("float64", shape, elements=data.draw(st.sampled_from([odd, plain]))))
    x, w = draw(shape, shape if data.draw(st.booleans()) else (), seed=data.draw(st.integers(0, 9)))
    op = mistake(Product, lambda op, dy, x, w: (wrong + 0.0, unbroadcast(S * x * dy, w.shape)))
    full_size = data.draw(st.sampled_from([0, 200]))
    report = testing.gradcheck(lambda x, w: engine.apply(op, x, w), x, w, full_size=full_size, directions=3)
    for row in report.rows:
        assert row.passed == (row.guess == "")
    assert str(report) and isinstance(report.unchecked, tuple)


RIGHT = [(Square, 1), (Exp3, 1), (ReLU, 1), (Clipped, 1), (Product, 2), (Divide, 2), (Add, 2)]


@given(st.data())
def test_a_right_gradient_never_gets_a_complaint(data):
    op, n = data.draw(st.sampled_from(RIGHT))
    shape = data.draw(shapes)
    inputs = draw(*[shape] * n, seed=data.draw(st.integers(0, 99)))
    f = (lambda x: engine.apply(op, x)) if n == 1 else (lambda x, w: engine.apply(op, x, w))
    report = testing.gradcheck(f, *inputs, full_size=data.draw(st.sampled_from([3, 200]))).check()
    assert not any(row.guess for row in report.rows) and "FAILED" not in str(report)


@given(st.data())
def test_a_planted_factor_or_sign_is_named_for_any_shape(data):
    shape = data.draw(shapes.filter(lambda shape: np.prod(shape) > 1))
    k = data.draw(st.sampled_from([-1.0, 2.0, 0.5, 3.0]))
    op = mistake(Square, lambda op, dy, x: (2.0 * k * x * dy,))
    report = testing.gradcheck(lambda x: engine.apply(op, x), *draw(shape, seed=data.draw(st.integers(0, 99))))
    words = {-1.0: "sign flipped", 2.0: "a factor 2 too many?", 0.5: "a missing factor 2?", 3.0: "a factor 3 too many?"}
    assert words[k] in report["x"].guess


def test_mistakes_are_named_along_directions_too():
    """A big leaf is looked at along few directions; what explains every one of them explains the gradient."""
    big = [(30, 30), (30, 30)]
    for wrong, leaf, words in [
        (lambda op, dy, x, w: (S * x * dy, S * w * dy), "x", "dx and dw look swapped"),
        (lambda op, dy, x, w: (S * (x * dy).T, S * (w * dy).T), "x", "dx and dw look swapped and transposed"),
        (lambda op, dy, x, w: (S * w * dy, S * w * dy), "w", "it equals the gradient of x"),
        (lambda op, dy, x, w: (S * w, S * x * dy), "x", "is dy left out?"),
        (lambda op, dy, x, w: (S * dy, S * x * dy), "x", "times w, element by element, it would be right"),
        (lambda op, dy, x, w: (S * w * dy + 2.0, S * x * dy), "x", "differs by a constant 2 everywhere"),
        (lambda op, dy, x, w: (S * (w * dy)[::-1], S * x * dy), "x", "its rows are in reverse order"),
        (lambda op, dy, x, w: (S * (w * dy) / 30.0, S * x * dy), "x", "30 is also the length of axis 0 of x: a mean where"),
        (lambda op, dy, x, w: (w * w * w * dy, S * x * dy), "x", "wrong in 8 of 8"),
    ]:
        op = mistake(Product, wrong)
        report = testing.gradcheck(lambda x, w: engine.apply(op, x, w), *draw(*big))
        assert words in report[leaf].guess, report[leaf].guess


def test_long_names_are_spelled_out():
    op = mistake(Product, lambda op, dy, x, w: (S * x * dy, S * w * dy))
    report = testing.gradcheck(lambda left, right: engine.apply(op, left, right), *draw((2, 3), (2, 3)))
    assert report["right"].guess.startswith("the gradients of left and right look swapped: each equals the other's")


# -- compare says the same, as far as it can ----------------------------------------------------------------------------

COMPARED = [
    (lambda a: a.T.copy().reshape(a.shape), "equals the transpose"),
    (lambda a: a / 5.0, "5 is also the length of axis 0: a mean where the sum is wanted?"),
    (lambda a: a / 20.0, "20 is also the number of elements: a mean where the sum is wanted?"),
    (lambda a: a + 1.0, "differs by a constant 1 everywhere"),
    (lambda a: a[::-1], "its rows are in reverse order"),
    (lambda a: np.where(np.arange(5)[:, None] == 4, 2.0 * a, a),
     "only the last row is wrong, in all 4 elements: reference / mine"),
    (lambda a: np.where(np.arange(4) == 0, 0.0, a), "only the first column is wrong, in all 5 elements: it is 0 there"),
    (lambda a: np.where(np.arange(4) < 3, -a, a), "only the last column is right, the others are wrong: sign flipped"),
    (lambda a: np.where(np.arange(4) == 1, np.nan, a), "not finite: NaN or inf in 5 of 20, column 1"),
    (lambda a: a * np.arange(1.0, 6.0)[:, None], "each row has a factor of its own: is one of shape (5, 1)"),
    (lambda a: a.T, "shapes differ: (4, 5), reference (5, 4): equals the transpose"),
    (lambda a: a.T + 1.0, "this is the transposed shape: is a .T missing, or one too many?"),
    (lambda a: a.reshape(2, 10), "reshape it to (5, 4), and it is equal"),
    (lambda a: np.stack([a, 0.0 * a]), "summed over axis 0 it is equal"),
    (lambda a: np.stack([a, a, a]), "was this input broadcast? Sum the gradient over axis 0"),
    (lambda a: np.stack([a, 0.0 * a], axis=-1), "summed over axis 2 it is equal"),
    (lambda a: a[0], "axis 0 of the reference is not there: was it summed away, or is one number meant for several"),
    (lambda a: a.sum(axis=0), "it is the sum of the reference over axis 0: leave that sum out"),
    (lambda a: a.sum(axis=1, keepdims=True), "it is the sum of the reference over axis 1: leave that sum out"),
    (lambda a: a.sum(), "it is the sum of the reference over axes 0, 1: leave that sum out"),
    (lambda a: a + 1j * a, "the real parts are equal, the imaginary ones not: the reference is zero"),
]


@pytest.mark.parametrize(("change", "words"), COMPARED)
def test_compare_names_them_too(change, words):
    (a,) = (fetch(x) for x in draw((5, 4)))
    comparison = testing.compare("dA", change(a), a)
    assert words in comparison.guess and all(len(line) <= 80 for line in str(comparison).splitlines())
    with pytest.raises(testing.GradcheckError, match="FAILED"):
        comparison.check()


def test_compare_of_conjugates():
    a = np.arange(4.0) + 1j
    assert testing.compare("z", a.conj(), a).guess == "equals the complex conjugate"
    assert testing.compare("z", a * 1j, a).guess == "wrong in 4 of 4"


def test_a_big_comparison_is_quick():
    """A million elements: no guess compares all rows with each other."""
    a = np.random.default_rng(0).standard_normal((1000, 1000))
    assert testing.compare("a", np.roll(a, 2, axis=0), a).guess == "wrong in 1000000 of 1000000"


# -- errors in f ---------------------------------------------------------------------------------------------------------


class Fails(Square):
    def forward(self, x):
        if self.when == "forward" or self.when == "complex" and x.dtype.kind == "c":
            raise ValueError("own")
        return super().forward(x)

    def gradients(self, dy, x):
        if self.when == "backward" or self.when == "into" and self.into(0) is not None and self.sources[0].room is not None:
            raise ValueError("own")
        return super().gradients(dy, x)


@pytest.mark.parametrize("when", ["forward", "complex"])
def test_an_error_in_forward_names_the_operation(when, device):
    with pytest.raises(ValueError, match="own") as caught:
        testing.gradcheck(lambda x: engine.apply(Fails, x, when=when), *draw((2, 3)))
    dtype = "complex128" if when == "complex" else "float64"
    assert caught.value.__notes__ == [f"in Fails.forward: inputs {dtype} (2, 3)"]


def test_where_complex_numbers_fail_is_named(device):
    class Real(Square):
        def forward(self, x):
            if x.dtype.kind == "c":
                raise TypeError("no complex numbers")
            return super().forward(x)
    with pytest.raises(errors.ConfigError, match=r"no complex numbers; in Real.forward: inputs complex128 \(2, 3\)"):
        testing.gradcheck(lambda x: engine.apply(Real, x), *draw((2, 3)))


@pytest.mark.parametrize("when", ["backward", "into"])
def test_an_error_in_backward_is_a_failed_check(when, device):
    report = testing.gradcheck(lambda x: engine.apply(Fails, x, when=when), *draw((2, 3)))
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert not report and not report.rows and list(failed) == ["backward runs"]
    assert failed["backward runs"].startswith("ValueError: own (test_testing_guesses.py, line ")
    assert "in Fails.backward: dy float64 (2, 3), inputs (2, 3), saved float64 (2, 3)" in failed["backward runs"]
    with pytest.raises(testing.GradcheckError, match="FAILED  backward runs: ValueError: own"):
        report.check()


def test_a_backward_that_is_still_to_be_written_is_no_finding():
    def later(op, dy, x):
        raise NotImplementedError("your line here")
    op = mistake(Square, later)
    with pytest.raises(NotImplementedError, match="your line here"):
        testing.gradcheck(lambda x: engine.apply(op, x), *draw((2, 3)))


def test_an_interrupt_in_backward_ends_the_check():
    def stop(op, dy, x):
        raise KeyboardInterrupt
    op = mistake(Square, stop)
    with pytest.raises(KeyboardInterrupt):
        testing.gradcheck(lambda x: engine.apply(op, x), *draw((2, 3)))


@pytest.mark.parametrize(("wrong", "shapes", "words"), [
    (lambda op, dy, x: 2.0 * x * dy, [(1, 3)], "an array was returned: return (dx,), a tuple with one gradient for each input"),
    (lambda op, dy, x: (2.0 * (x * dy).T,), [(2, 3)], "this is the transposed shape"),
    (lambda op, dy, x, w: (dy, dy), [(5, 4), (4,)], "was this input broadcast? Sum the gradient over axis 0"),
    (lambda op, dy, x, w: (unbroadcast(dy, w.shape), dy), [(5, 4), (4,)], "in the order of inputs 1, 0: are two swapped?"),
])
def test_a_gradient_of_the_wrong_kind_is_explained(wrong, shapes, words):
    op = mistake(Square if len(shapes) == 1 else Add, wrong)
    f = (lambda x: engine.apply(op, x)) if len(shapes) == 1 else (lambda x, w: engine.apply(op, x, w))
    report = testing.gradcheck(f, *draw(*shapes))
    assert [check.name for check in report.checks if not check.passed] == ["backward runs"]
    assert words in report.checks[-1].detail and words in " ".join(str(report).split())
