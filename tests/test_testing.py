"""The checker checked: planted mistakes are found and named, right gradients pass, and nothing is left behind."""
import math

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, Tensor, engine, errors, nn, ops, optim, testing

S = 0.37


class Product(engine.Op):
    """y = s x^2 w: dx = 2 s x w dy, dw = s x^2 dy. `mistake` spoils the two gradients."""

    def forward(self, x, w):
        self.save(x, w)
        return S * x * x * w

    def backward(self, dy):
        x, w = self.saved
        return self.mistake(self, dy, 2 * S * x * w * dy, S * x * x * dy)


def planted(mistake, op=Product):
    return lambda x, w: engine.apply(op, x, w, mistake=mistake)


def on_dx(change):
    return planted(lambda op, dy, dx, dw: (change(dx), dw))


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [place(rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)) for shape in shapes]


def spoil_one(dx):
    dx[1, 2] = 1.1 * dx[1, 2]
    return dx


RIGHT = on_dx(lambda dx: dx)
VALUES = {
    "sign": (lambda dx: -dx, "sign flipped"),
    "factor missing": (lambda dx: dx / 2, "numerical / analytic = 2.000 everywhere: a missing factor 2?"),
    "factor too many": (lambda dx: dx * 3, "numerical / analytic = 0.333 everywhere: a factor 3 too many?"),
    "s missing": (lambda dx: dx / S, "numerical / analytic = 0.370 everywhere: scaled by a constant"),
    "transpose": (lambda dx: dx.T.copy(), "equals the transpose"),
    "transpose, sign": (lambda dx: -dx.T, "equals the transpose, sign flipped"),
    "zero": (lambda dx: 0 * dx, "gradient is zero"),
    "one element": (spoil_one, "only one element wrong, the other 15 are right"),
    "noise": (lambda dx: dx + dx * dx, "wrong in 16 of 16"),
    "nan": (lambda dx: dx * math.nan, "not finite: NaN or inf in 16 of 16"),
}


@pytest.mark.parametrize("mode", ["complex", "central"])
@pytest.mark.parametrize("name", VALUES)
def test_wrong_values_are_found_and_named(name, mode, device):
    change, guess = VALUES[name]
    report = testing.gradcheck(on_dx(change), *draw((4, 4), (4, 4)), mode=mode)
    assert not report and not report["x"].passed and report["w"].passed
    assert report["x"].guess.startswith(guess)
    assert not report["x"].kink
    assert guess in " ".join(str(report).split())
    with pytest.raises(testing.GradcheckError, match="gradcheck FAILED"):
        report.check()


@pytest.mark.parametrize("mode", ["complex", "central"])
@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("one element", "noise", "nan")])
def test_mistakes_in_a_big_leaf_are_found_along_directions(name, mode):
    change, guess = VALUES[name]
    report = testing.gradcheck(on_dx(change), *draw((30, 30), (30, 30)), mode=mode, directions=5)
    assert report["x"].compared == "5 directions" and report["x"].where.startswith("direction ")
    assert report["x"].guess.startswith(guess) and report["w"].passed


def test_one_wrong_element_among_many_is_found_along_directions():
    report = testing.gradcheck(on_dx(spoil_one), *draw((30, 30), (30, 30)))
    assert not report["x"].passed and report["w"].passed


def test_transpose_of_another_shape_is_named():
    report = testing.gradcheck(on_dx(lambda dx: dx.T.copy().reshape(dx.shape)), *draw((3, 5), (3, 5)))
    assert report["x"].guess == "equals the transpose"


@pytest.mark.parametrize("mode", ["complex", "central"])
def test_right_gradients_pass(mode, device):
    report = testing.gradcheck(RIGHT, *draw((4, 4), (4, 4)), mode=mode)
    assert report and report.check() is report and report.error < (1e-13 if mode == "complex" else 1e-8)
    assert str(report).startswith("gradcheck passed")


@pytest.mark.parametrize(("mode", "rtol"), [("complex", 1e-9), ("complex", 1e-5), ("central", 1e-6), ("central", 1e-4)])
@pytest.mark.parametrize("shape", [(4, 4), (30, 30)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tolerance_is_what_it_says(mode, rtol, shape, sign, device):
    def off(by):
        f = on_dx(lambda dx: dx * (1.0 + sign * by * rtol))
        return testing.gradcheck(f, *draw(shape, shape), mode=mode, rtol=rtol)
    assert not off(1.5) and off(0.5)


def test_default_tolerances():
    assert testing.gradcheck(ops.exp, *draw((2,))).rtol == 1e-9
    assert testing.gradcheck(ops.exp, *draw((2,)), mode="central").rtol == 1e-6


@given(seed=st.integers(0, 2 ** 32), factor=st.floats(-4, 4).filter(lambda k: abs(k - 1) > 1e-6))
def test_any_factor_is_found_for_any_numbers(seed, factor):
    report = testing.gradcheck(on_dx(lambda dx: factor * dx), *draw((2, 3), (2, 3), seed=seed))
    assert not report["x"].passed and report["w"].passed


# -- promises besides the values ---------------------------------------------------------------------------------------


class ChangesInput(Product):
    def forward(self, x, w):
        y = super().forward(x * 1.0, w)
        x *= 2.0
        return y


class Float32(Product):
    def forward(self, x, w):
        return super().forward(x, w).astype("float32")


class Drifts(Product):
    passes = 0

    def forward(self, x, w):
        Drifts.passes += 1
        return super().forward(x, w) + 1e-12 * Drifts.passes


class RealPart(Product):
    def forward(self, x, w):
        return super().forward(x, w) + (0.5 if x.dtype.kind == "c" else 0.0)


def change_saved(op, dy, dx, dw):
    x = op.saved[0]
    x += 1.0
    return dx, dw


def change_dy(op, dy, dx, dw):
    dy *= 2.0
    return dx, dw


def wander(op, dy, dx, dw):
    wander.calls += 1
    return dx, dw * (1.0 + 1e-15 * wander.calls)


wander.calls = 0


def past_into(op, dy, dx, dw):
    room = op.sources[1].room
    if room is None:
        return dx, dw
    room[...] = dx
    return dx, room


def wrong_room(op, dy, dx, dw):
    room = op.into(0)
    if room is not None:
        room[...] = dx
    return room if room is not None else dx, room if room is not None else dw


PROMISES = {
    "inputs unchanged by f": (planted(lambda op, dy, dx, dw: (dx, dw), ChangesInput), "changed: x"),
    "inputs unchanged by backward": (planted(change_saved), "changed: x"),
    "cotangent unchanged": (planted(change_dy), "wrote into dy"),
    "float64 gives float64": (planted(None, Float32), "the output is float32"),
    "forward repeats": (planted(lambda op, dy, dx, dw: (dx, dw), Drifts), "seed and step of a dropout"),
    "gradients repeat": (planted(wander), "the second time: w"),
    "gradients repeat when written into an array": (planted(past_into), "held NaN before: w. Write every element"),
    "zero cotangent gives zero": (planted(lambda op, dy, dx, dw: (dx / dy.sum(), 0.1 * op.saved[0])), "not zero"),
    "complex and real outputs agree": (planted(lambda op, dy, dx, dw: (dx, dw), RealPart), "mode='central'"),
}


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_broken_promise_is_found_and_named(name, device):
    f, detail = PROMISES[name]
    report = testing.gradcheck(f, *draw((4, 4), (4, 4)))
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert not report and detail in failed[name]
    assert f"FAILED {name}: " in " ".join(str(report).split())


def test_a_gradient_written_into_the_array_of_another_input_is_found(device):
    report = testing.gradcheck(planted(wrong_room), *draw((4, 4), (4, 4)))
    assert not report and [row.name for row in report.rows if not row.passed] == ["w"]


@pytest.mark.parametrize("mistake", [
    lambda op, dy, dx, dw: (dx.astype("float32"), dw),
    lambda op, dy, dx, dw: (dx[:2], dw),
    lambda op, dy, dx, dw: (dx,),
    lambda op, dy, dx, dw: (None, dw),
], ids=["dtype", "shape", "too few", "None"])
def test_gradient_of_the_wrong_kind_is_reported(mistake, device):
    report = testing.gradcheck(planted(mistake), *draw((4, 4), (4, 4)))
    assert not report and not report.rows
    assert [check.name for check in report.checks if not check.passed] == ["backward runs"]


def test_cut_graph_is_named(device):
    report = testing.gradcheck(lambda x, w: RIGHT(x.detach(), w), *draw((4, 4), (4, 4)))
    assert report["x"].guess.startswith("gradient is zero: none arrived") and report["w"].passed
    report = testing.gradcheck(lambda x: x.detach() * 2.0, *draw((4,)))
    assert not report["x"].passed


def test_unused_input_passes(device):
    assert testing.gradcheck(lambda x, w: x * x, *draw((4,), (3,))).check()["w"].error == 0.0


# -- kinks, and functions that are not analytic ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["complex", "central"])
def test_kink_is_reported_as_one(mode, device):
    report = testing.gradcheck(ops.relu, place([1.0, 0.0, -2.0]), mode=mode)
    assert not report and report["x"].kink and report["x"].where == "(1,)"
    assert report["x"].guess.startswith("kink near: slope 0 on the left")


@given(st.floats(-0.999, 0.999))
def test_kink_within_the_step_is_never_taken_for_a_wrong_gradient(t):
    report = testing.gradcheck(ops.relu, place([1.0, t * 6.05e-6, -2.0]), mode="central")
    assert report or report["x"].kink
    assert testing.gradcheck(ops.relu, place([1.0, t * 6.05e-6 or 1e-9, -2.0]))  # the complex step stays on its side


class WrongReLU(ops.ReLU):
    def backward(self, dy):
        return (2.0 * super().backward(dy)[0],)


@pytest.mark.parametrize(("x", "mode"), [([0.0, 3.0, 0.0], "complex"), ([0.0, 3.0, 0.0], "central"),
                                         ([-1.0, 1e-6, -1.0], "complex")])
def test_wrong_gradient_beside_a_kink_is_not_excused(x, mode):
    report = testing.gradcheck(lambda x: engine.apply(WrongReLU, x), place(x), mode=mode)
    assert not report["x"].kink and report["x"].where == "(1,)" and "factor 2 too many" in report["x"].guess


class Abs(engine.Op):
    """y = x |w|"""

    def forward(self, x, w):
        self.save(x, w)
        return x * abs(w)

    def backward(self, dy):
        x, w = self.saved
        return dy * abs(w), dy * x * self.xp.sign(w)


def test_function_that_is_not_analytic_is_reported_as_one(device):
    x, w = draw((5,), (5,))
    report = testing.gradcheck(lambda x, w: engine.apply(Abs, x, w), x, w)
    assert report["x"].passed and not report["w"].passed and "mode='central'" in report["w"].guess
    assert testing.gradcheck(lambda x, w: engine.apply(Abs, x, w), x, w, mode="central")
    with pytest.raises(errors.ConfigError, match="mode='central'"):
        testing.gradcheck(lambda w: engine.apply(Abs, 2.0, w), w)


# -- why the rules of a good check are what they are -------------------------------------------------------------------


def test_a_cotangent_of_ones_hides_a_lost_softmax_gradient():
    class Lost(ops.Softmax):
        def backward(self, dy):
            return (0.0 * dy,)

    def lost(x):
        return engine.apply(Lost, x, axis=-1)

    (x,) = draw((3, 5))
    with_ones = [Parameter(x), Parameter(x)]
    for f, p in zip((ops.softmax, lost), with_ones):
        f(p).sum().backward()
    right, wrong = (fetch(p.grad) for p in with_ones)
    assert abs(right).max() < 1e-15 and not wrong.any()  # no difference to see: rows of a softmax sum to 1
    assert testing.gradcheck(lost, x)["x"].guess == "gradient is zero"
    assert testing.gradcheck(ops.softmax, x)


class LowRank(engine.Op):
    """y = s x A^T B^T, with B taken for its transpose in dA (possible where out = r)."""

    def forward(self, x, A, B):
        self.save(x, A, B)
        return S * (x @ A.T) @ B.T

    def backward(self, dy):
        x, A, B = self.saved
        return S * (dy @ B) @ A, S * (dy @ B.T).T @ x, S * dy.T @ (x @ A.T)


def test_nothing_is_proved_about_dA_while_B_is_zero(device):
    x, A, B = draw((5, 3), (2, 3), (2, 2))
    at_zero = testing.gradcheck(lambda x, A, B: engine.apply(LowRank, x, A, B), x, A, 0.0 * B)
    assert at_zero and at_zero["A"].analytic == 0.0 and at_zero.untested == ("x", "A")
    assert "passed, but x, A were not tested" in str(at_zero) and "NOT TESTED  A: every analytic" in str(at_zero)
    away = testing.gradcheck(lambda x, A, B: engine.apply(LowRank, x, A, B), x, A, B)
    assert not away["A"].passed and away["x"].passed and away["B"].passed and away.untested == ()


# -- parameters, constants, names --------------------------------------------------------------------------------------


def test_model_is_checked_with_its_parameters_by_name(device):
    rng = np.random.default_rng(1)
    first, last = (nn.Linear(*sizes, dtype="float64", rng=rng) for sizes in ((3, 4), (4, 2)))
    model = nn.Sequential(first, nn.Tanh(), last)
    model[0].bias.trainable = False
    report = testing.gradcheck(model, *draw((5, 3)), parameters=model.named_parameters()).check()
    assert [row.name for row in report.rows] == ["x", "0.weight", "2.weight", "2.bias"]
    assert report["2.bias"].shape == (2,)
    report = testing.gradcheck(model[0], *draw((5, 3)), parameters=model[0].parameters())
    assert [row.name for row in report.rows] == ["x", "parameter 0"]


def test_constants_must_be_named_and_then_pass(device):
    x, target = draw((5,), (5,))
    with pytest.raises(errors.ConfigError, match=r"closes over real tensors.*parameters=\["):
        testing.gradcheck(lambda x: ops.mse(x, Tensor(target)), x)
    named = Tensor(target)
    report = testing.gradcheck(lambda x: ops.mse(x, named), x, parameters=[named])
    assert report and [row.name for row in report.rows] == ["x"]
    assert testing.gradcheck(lambda x: ops.mse(x, Tensor(target)), x, mode="central")


def test_shared_parameter_is_one_leaf():
    w = Parameter(draw((3,))[0])
    report = testing.gradcheck(lambda: w * w, parameters=[("a", w), ("b", w)]).check()
    assert [row.name for row in report.rows] == ["a"]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_small_shapes(shape, device):
    for mode in ("complex", "central"):
        assert testing.gradcheck(ops.tanh, *draw(shape), mode=mode, full_size=0 if shape == () else 200)
        assert testing.gradcheck(ops.tanh, *draw(shape), mode=mode)


def test_strides_of_the_input_reach_f():
    seen = []
    x = np.arange(1.0, 25.0).reshape(4, 6)[::2, ::3].T

    def f(t):
        seen.append(t.data.strides)
        return t * t
    assert testing.gradcheck(f, x) and seen[0] == x.strides and np.array_equal(x, [[1, 13], [4, 16]])


BAD = [
    (dict(mode="forward"), errors.ConfigError, "mode must be one of"),
    (dict(rtol=0.0), errors.ConfigError, "rtol must be > 0"),
    (dict(rtol=math.nan), errors.ConfigError, "rtol must be > 0"),
    (dict(directions=0), errors.ConfigError, "directions >= 1"),
    (dict(full_size=-1), errors.ConfigError, "full_size >= 0"),
    (dict(parameters=[np.ones(3)]), errors.DTypeError, "expected Parameters or Tensors"),
    (dict(parameters=[Parameter(np.ones(3, "float32"))]), errors.DTypeError, "parameter 0 must be float64"),
]


@pytest.mark.parametrize(("settings", "error", "match"), BAD)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        testing.gradcheck(ops.exp, np.ones(3), **settings)


def test_bad_inputs():
    for bad in (np.ones(3, "float32"), np.arange(3), [1, 2]):
        with pytest.raises(errors.DTypeError, match="input 0 must be float64"):
            testing.gradcheck(ops.exp, bad)
    with pytest.raises(errors.DTypeError, match="one by one"):
        testing.gradcheck(ops.exp, [Parameter(np.ones(3))])
    with pytest.raises(errors.DTypeError, match="must return a Tensor"):
        testing.gradcheck(lambda x: x.data, np.ones(3))
    for check in (testing.gradcheck, testing.taylor_test):
        with pytest.raises(errors.ConfigError, match="nothing to check"):
            check(lambda: Tensor(np.ones(3)))


# -- nothing is left behind --------------------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_been_checked(device):
    def train(check):
        rng = np.random.default_rng(3)
        layer = nn.Linear(3, 2, dtype="float64", rng=rng)
        optimizer = optim.Adam(layer.parameters(), lr=0.1)
        x = place(rng.standard_normal((5, 3)))
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) * layer(x)).mean().backward()
            before = [(p.data, p.grad, p.room, fetch(p.grad).tobytes()) for p in layer.parameters()]
            if check:
                assert testing.gradcheck(layer, x, parameters=layer.parameters())
                assert testing.taylor_test(layer, x, parameters=layer.parameters())
            for p, (data, grad, room, bits) in zip(layer.parameters(), before):
                assert p.data is data and p.grad is grad and p.room is room and fetch(p.grad).tobytes() == bits
            optimizer.step()
        return [fetch(p).tobytes() for p in layer.parameters()]
    assert train(True) == train(False)


@pytest.mark.parametrize("when", ["at once", "in the numerical part"])
def test_errors_in_f_leave_everything_in_place(when, device):
    w = Parameter(draw((3,))[0])
    data = w.data

    def f(x):
        if when == "at once" or x.dtype == "complex128":
            raise RuntimeError("own")
        return x * w
    with pytest.raises(RuntimeError, match="own"):
        testing.gradcheck(f, *draw((3,)), parameters=[w])
    assert w.data is data and w.grad is None and engine.is_recording()


def test_changed_inputs_are_put_back(device):
    x, w = draw((4, 4), (4, 4))
    before = fetch(x)
    testing.gradcheck(PROMISES["inputs unchanged by f"][0], x, w)
    testing.gradcheck(PROMISES["inputs unchanged by backward"][0], x, w)
    assert np.array_equal(fetch(x), before)


def test_same_call_gives_the_same_report():
    x, w = draw((30, 30), (30, 30))
    assert testing.gradcheck(RIGHT, x, w) == testing.gradcheck(RIGHT, x, w)
    a, b = (testing.gradcheck(RIGHT, x, w, rng=np.random.default_rng(seed)) for seed in (1, 2))
    assert a["x"].analytic != b["x"].analytic


def test_errors_are_of_both_kinds():
    assert issubclass(testing.GradcheckError, errors.MiniloraError)
    assert issubclass(testing.GradcheckError, AssertionError)
    with pytest.raises(KeyError, match="the leaves are x, w"):
        testing.gradcheck(RIGHT, *draw((2, 2), (2, 2)))["y"]


# -- Taylor ------------------------------------------------------------------------------------------------------------


def test_taylor_slope_is_two_for_a_right_gradient_and_one_for_a_wrong_one(device):
    x, w = draw((4, 4), (4, 4))
    report = testing.taylor_test(RIGHT, x, w).check()
    assert 1.99 < report.slope < 2.01 and all(1.9 < slope < 2.1 for slope in report.slopes)
    assert len(report.h) == len(report.R) == len(report.slopes) + 1 == 9 and "2^-12" in str(report)
    for change in (lambda dx: -dx, lambda dx: dx / 2, lambda dx: 0 * dx, lambda dx: dx.T, spoil_one):
        report = testing.taylor_test(on_dx(change), x, w)
        assert not report and 0.95 < report.slope < 1.35
        with pytest.raises(testing.GradcheckError, match="Taylor test FAILED: slope 1"):
            report.check()


def test_taylor_of_a_linear_function_is_rounding_only():
    report = testing.taylor_test(lambda x: 3.0 * x, *draw((5,)))
    assert report and "linear along v" in report.note and math.isnan(report.slope)
    assert not testing.taylor_test(lambda x: 3.0 * x.detach(), *draw((5,)))


def test_taylor_at_a_point_without_bend():
    report = testing.taylor_test(lambda x: x ** 3, place(np.zeros(5)))
    assert report and report.slope == pytest.approx(3.0) and "falls faster" in report.note


def test_taylor_of_nan_fails():
    assert not testing.taylor_test(lambda x: x * math.nan, *draw((5,)))


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare(device):
    (a,) = draw((3, 4))
    same = testing.compare("dA", Tensor(a), a.copy()).check()
    assert same.exact and same.approximately and same.max_abs == same.relative == 0.0 and "exact: yes" in str(same)
    close = testing.compare("dA", a * (1.0 + 1e-13), a)
    assert close and not close.exact and 5e-14 < close.relative < 2e-13
    b = a.copy()
    b[1, 2] = b[1, 2] + 1.0
    wrong = testing.compare("dA", b, a)
    assert not wrong and wrong.index == (1, 2) and wrong.max_abs == pytest.approx(1.0)
    assert wrong.mine == fetch(b)[1, 2] and wrong.reference == fetch(a)[1, 2]
    assert wrong.guess == "only one element wrong, the other 11 are right"
    with pytest.raises(testing.GradcheckError, match=r"dA .*\n  FAILED at \(1, 2\): "):
        wrong.check()


@pytest.mark.parametrize(("change", "guess"), [
    (lambda a: -a, "sign flipped"),
    (lambda a: a / 4, "reference / mine = 4.000 everywhere: a missing factor 4? 4 is also the length of "
     "axis 1: a mean where the sum is wanted?"),
    (lambda a: a.T, "shapes differ: (4, 3), reference (3, 4): equals the transpose"),
    (lambda a: a[:2], "shapes differ: (2, 4), reference (3, 4)"),
    (lambda a: 0 * a, "all zero"),
    (lambda a: a + math.inf, "not finite: NaN or inf in 12 of 12"),
])
def test_compare_guesses(change, guess):
    (a,) = draw((3, 4))
    assert testing.compare("a", change(a), a).guess == guess


def test_compare_tolerances_and_odd_values():
    a = np.linspace(1.0, 2.0, 5)
    assert testing.compare("a", (a * (1 + 1e-6)).astype("float32"), a) and not testing.compare("a", a * (1 + 1e-6), a)
    for by, passes in ((0.5, True), (1.5, False)):
        assert bool(testing.compare("a", a * (1 + by * 1e-3), a, rtol=1e-3)) is passes
    assert testing.compare("n", [1, 2], [1, 2]).exact and not testing.compare("n", [1, 2], [1, 3])
    nan = np.array([1.0, math.nan])
    assert testing.compare("nan", nan, nan).exact and not testing.compare("nan", nan, np.array([1.0, 2.0]))
    assert testing.compare("inf", np.array([math.inf]), np.array([math.inf]))
    assert testing.compare("empty", np.zeros((0, 3)), np.zeros((0, 3))).exact
    assert testing.compare("zero", np.zeros(3), np.zeros(3)).relative == 0.0
    assert not testing.compare("zero", np.full(3, 1e-300), np.zeros(3))


def test_public_names():
    assert minilora.testing is testing
    assert set(testing.__all__) >= {"gradcheck", "taylor_test", "compare", "GradcheckError"}
