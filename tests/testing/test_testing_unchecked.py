"""A report says what it has not tested, and fits a terminal."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, Tensor, nn, ops, testing


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [place(rng.standard_normal(shape)) for shape in shapes]


def test_rows_that_were_never_used_are_named(device):
    W = Parameter(*draw((6, 3)))
    report = testing.gradcheck(lambda: ops.embedding(np.array([0, 1, 1, 2]), W), parameters=[("W", W)]).check()
    assert report["W"].zeros == 9 and report["W"].zeros_at == "rows 3 to 5" and not report["W"].untested
    assert report.unchecked == ("W: 9 of 18 elements are 0 by hand and numerically (rows 3 to 5)",)
    assert "9 of 18 elements are 0 by hand and numerically (rows 3 to 5): a wrong factor would not show there" in (
        " ".join(str(report).split()))
    assert report.untested == ()


def test_elements_by_their_sign(device):
    report = testing.gradcheck(ops.relu, place([[1.0, -1.0, 2.0], [-3.0, 0.5, -0.1]])).check()
    assert report["x"].zeros == 3 and report["x"].zeros_at == "where x < 0"


def test_nothing_is_said_where_all_was_tested():
    report = testing.gradcheck(ops.exp, *draw((4, 3))).check()
    assert report.unchecked == report.untested == report.constants == () and report["x"].zeros == 0
    assert "not tested" not in str(report) and "not checked" not in str(report)


def test_a_leaf_of_zeros_is_among_the_unchecked(device):
    x, w = draw((4,), (4,))
    report = testing.gradcheck(lambda x, w: x * w, x, 0.0 * w)
    assert report.untested == ("x",) and report.unchecked == ("x: 0 everywhere, by hand and numerically",)
    assert report["x"].zeros == 4


def test_directions_are_not_elements(device):
    report = testing.gradcheck(lambda x, w: ops.tanh(x) * w.sum(), *draw((30, 10), (4,)))
    assert report.unchecked == ("x: along 8 directions, not element by element (full_size=300 would)",)
    assert "not tested each element of x: 8 directions only. full_size=300 checks them one by one" in (
        " ".join(str(report).split()))
    assert testing.gradcheck(ops.tanh, *draw((30, 10)), full_size=300).unchecked == ()


def test_zeros_of_a_big_leaf_are_counted_too(device):
    (x,) = draw((30, 10))
    report = testing.gradcheck(lambda x: x[:20], x).check()
    assert report["x"].zeros == 100 and report["x"].zeros_at == "rows 20 to 29"


def test_what_is_no_leaf_is_named_with_its_reason(device):
    layer = nn.Linear(3, 2, dtype="float64", rng=0)
    layer.weight.trainable = False
    target = Tensor(*draw((5, 2)))
    ids = Tensor(place(np.arange(5)))
    report = testing.gradcheck(lambda x: ops.mse(layer(x), target), *draw((5, 3)),
                               parameters=[*layer.named_parameters(), ("target", target), ("ids", ids)]).check()
    assert report.constants == ("weight (frozen)", "target (constant)", "ids (int64)") == report.unchecked
    assert "not checked weight (frozen), target (constant), ids (int64)" in " ".join(str(report).split())


def test_a_trainable_parameter_that_was_not_named_is_told_and_left_as_it_is(device):
    w = Parameter(*draw((3,)))
    (w * 2.0).sum().backward()
    grad, bits = w.grad, fetch(w.grad).tobytes()
    report = testing.gradcheck(lambda x: x * w, *draw((3,)), mode="central").check()
    assert report.constants == ("a trainable parameter (3,) that f uses and parameters=[...] does not name",)
    assert w.grad is grad and fetch(w.grad).tobytes() == bits and w.room is None


def test_an_unnamed_parameter_in_an_optimizer_keeps_its_gradient(device):
    layer = nn.Linear(3, 2, dtype="float64", rng=0)
    optimizer = minilora.optim.SGD(layer.parameters(), lr=0.1)
    (x,) = draw((5, 3))
    (layer(Tensor(x)) * 2.0).sum().backward()
    before = [(p.room, fetch(p.gathered).tobytes()) for p in layer.parameters()]
    assert testing.gradcheck(layer, x, mode="central")
    assert [(p.room, fetch(p.gathered).tobytes()) for p in layer.parameters()] == before
    optimizer.step()


NAMES = ["x", "weight",
         "model.layers.0.self_attn.q_proj.adapters.default.lora_A",
         "encoder.layer.11.attention.output.dense.bias"]


@pytest.mark.parametrize("good", [True, False])
def test_a_report_fits_a_terminal(good):
    parameters = [(name, Parameter(data)) for name, data in zip(NAMES, draw((2, 3, 4), (64, 64), (8, 40), (12,)))]

    def f():
        y = sum(((0.0 if name == "weight" else 1.0) * ops.tanh(p)).sum() for name, p in parameters)
        return y if good else y + parameters[0][1].sum() * 2.0 - (parameters[0][1].detach() * 2.0).sum()
    report = testing.gradcheck(f, parameters=parameters, mode="central")
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80 and report.passed == good
    assert any("...layers.0" in line or "...ters.default.lora_A" in line or "lora_A" in line for line in lines)
    assert "NOT TESTED  weight: every analytic" in str(report)


def test_many_leaves_are_not_listed_one_by_one():
    parameters = [(f"p{i}", Parameter(data)) for i, data in enumerate(draw(*[(30, 30)] * 20))]
    report = testing.gradcheck(lambda: sum((p[:20] * p[:20]).sum() for _, p in parameters), parameters=parameters, directions=1)
    text = " ".join(str(report).split())
    assert "p6, 13 more: 1 direction only" in text and "elements of 12 more leaves: see report.unchecked" in text
    assert len(report.unchecked) == 20 and "300 of 900 elements are 0" in report.unchecked[19]
