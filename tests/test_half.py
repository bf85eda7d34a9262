"""float16: every operation computes in float32 and rounds once, so that nothing overflows or stands still on the way.

Two bounds, for every row of the table of operations. The results in float16 are those in float32, rounded: equal to the last
bit. And those in float32 are within n eps of float64 relative to the largest (n additions of eps / 2 each, and a few
function values), also for numbers that float16 only just holds. Together: half a unit of float16, and that.
"""
from types import SimpleNamespace

import numpy as np
import pytest
from cases import CASES
from conftest import PROOF, fetch, place

from minilora import Parameter, Tensor, backend, engine, ops
from minilora.engine import Op, apply

EVERY = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
LARGEST = float(np.finfo("float16").max)
# A score of 10^9 is only known to 100 in float32, and stands in an exponent: float64 says something else.
SHARP = {"Attention", "PackedAttention", "PrefixAttention", "PackedPrefixAttention", "LinearCrossEntropy"}
# Rounded once more: rotary's tables, which come in float16 too, the lengths of DoRA's rows, which equal those of m, and what
# is made of several operations, each of which rounds.
TWICE = {"Rotary", "DoRAScale", "WithWeights"}


def generator(case):
    return np.random.default_rng(sum(map(ord, case.name)))


def large(rng, like):
    """Numbers of float16 with the signs of `like`, of magnitude 300 to 60,000."""
    return np.asarray(np.copysign(np.exp(rng.uniform(np.log(300.0), np.log(6e4), like.shape)), like), "float16")


def results(case, arrays, dy, dtype):
    """The output and all gradients."""
    parameters = [Parameter(place(a, dtype)) for a in arrays]
    y = case.call(*parameters)
    y.backward(place(dy, dtype))
    assert {a.dtype for a in (y, *(p.grad for p in parameters))} == {np.dtype(dtype)}
    return [fetch(y), *(fetch(p.grad) for p in parameters)]


@EVERY
@pytest.mark.parametrize("which", ["inputs", "gradient"])
@PROOF
@np.errstate(all="ignore")
def test_results_are_those_of_float32_rounded_once(case, device, which):
    rng = generator(case)
    arrays = case.inputs(rng, "float16")
    dy = np.asarray(rng.standard_normal(case.formula(*[a.astype("float64") for a in arrays]).shape), "float16")
    if which == "inputs":
        few = case.op.__name__ == "DoRAScale"  # of W, A, B and m the last: rows longer than 65504 have no m, and no m / c
        arrays = [*arrays[:-1], large(rng, arrays[-1]) / np.float16(4.0)] if few else [large(rng, a) for a in arrays]
    else:
        dy = large(rng, dy)
    half, single, double = (results(case, arrays, dy, dtype) for dtype in ("float16", "float32", "float64"))
    n = 4 * (4 + max(a.size for a in (*arrays, dy)))
    for h, s, d in zip(half, single, double):
        fits = abs(d) <= LARGEST
        assert np.isfinite(h[fits]).all()
        # of the largest, or of dy where all that it is multiplied with cancels
        scale = max(1.0, abs(d).max(initial=0.0, where=abs(d) < 1e30), abs(dy).max(initial=0.0) if which == "gradient" else 0.0)
        if case.op.__name__ in TWICE:
            np.testing.assert_allclose(h[fits], d[fits], rtol=0, atol=scale * 2 ** -9)
            continue
        np.testing.assert_array_equal(h, s.astype("float16"))
        if which == "gradient" or case.op.__name__ not in SHARP:
            np.testing.assert_allclose(s[fits], d[fits], rtol=0, atol=n * float(np.finfo("float32").eps) * scale)


# -- long rows: n additions ---------------------------------------------------------------------------------------------

N = 100_000


def labels(rows):
    return np.zeros(rows, int)


LONG = {  # name: (call, shapes of inputs); every input is positive, so that a sum is its largest partial sum
    "sum": (lambda x: ops.sum(x, axis=0), [(N, 2)]),
    "mean": (ops.mean, [(N,)]), "mean of rows": (lambda x: ops.mean(x, axis=0), [(N, 2)]),
    "mse": (ops.mse, [(N // 4, 4), (N // 4, 4)]),
    "softmax": (ops.softmax, [(2, N)]), "log_softmax": (ops.log_softmax, [(2, N)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, labels(2)), [(2, N)]),
    "cross_entropy of rows": (lambda x: ops.cross_entropy(x, labels(N)), [(N, 2)]),
    "linear_cross_entropy": (lambda h, W: ops.linear_cross_entropy(h, W, labels(2)), [(2, 1), (N, 1)]),
    "layer_norm": (ops.layer_norm, [(2, N), (N,), (N,)]), "layer_norm of rows": (ops.layer_norm, [(N, 2), (2,), (2,)]),
    "rms_norm": (ops.rms_norm, [(2, N), (N,)]), "rms_norm of rows": (ops.rms_norm, [(N, 2), (2,)]),
    "group_norm": (lambda x, w, b: ops.group_norm(x, 1, w, b), [(2, 2, N), (2,), (2,)]),
    "linear": (ops.linear, [(2, N), (3, N), (3,)]), "linear of rows": (ops.linear, [(N, 2), (3, 2), (3,)]),
    "matmul": (ops.matmul, [(2, N), (N, 2)]), "matmul of matrices": (ops.matmul, [(2, 2, N), (2, N, 2)]),
    "attention": (ops.attention, [(1, 1, 1), (1, N, 1), (1, N, 1)]),
    "conv1d": (ops.conv1d, [(1, 1, N), (1, 1, 3), (1,)]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, (1, 900)), [(1, 1, 1, 900)]),
    "upsample": (lambda x: ops.upsample(x, (1, 900)), [(1, 1, 1, 1)]),
    "embedding": (lambda W: ops.embedding(labels(N), W), [(2, 2)]),
    "getitem": (lambda x: x[backend.asarray(labels(N))], [(2,)]),
    **{f"{op.__name__} broadcast": (op, [(N, 2), (2,)]) for op in (ops.add, ops.sub, ops.mul, ops.div)},
}


@pytest.mark.parametrize(("name", "large"), [(n, large) for n in LONG for large in (False, True)
                                             if not (large and n in ("attention", "linear_cross_entropy"))])  # SHARP
@PROOF
@np.errstate(all="ignore")
def test_long_rows(name, large, device):
    """|y - exact| <= 2^-11 |exact| + n 2^-24 sum |terms|: one rounding to float16, and n additions in float32."""
    call, shapes = LONG[name]
    rng = np.random.default_rng(len(name))
    between = np.log((300.0, 6e4) if large else (0.01, 1.0))
    arrays = [np.asarray(np.exp(rng.uniform(*between, shape)), "float16") for shape in shapes]
    dy = np.asarray(rng.uniform(0.5, 2.0, call(*[Parameter(place(a, "float64")) for a in arrays]).shape), "float16")
    case = SimpleNamespace(call=call)
    half, single, double = (results(case, arrays, dy, dtype) for dtype in ("float16", "float32", "float64"))
    for h, s, d in zip(half, single, double):
        np.testing.assert_array_equal(h, s.astype("float16"))
        fits = abs(d) <= LARGEST
        assert np.isfinite(h[fits]).all()
        scale = max(1.0, abs(d).max())
        np.testing.assert_allclose(h[fits], d[fits], rtol=2 ** -11, atol=2 ** -25 + N * 2.0 ** -24 * scale)


# -- what goes on around it ---------------------------------------------------------------------------------------------


@np.errstate(over="ignore")
def test_the_numbers_that_were_wrong(device):
    """Each of them was 0, infinite or NaN when float16 was added up in float16."""
    def of(call, *hosts, **settings):
        return fetch(call(*[Tensor(place(host, "float16")) for host in hosts], **settings)).astype(float)

    np.testing.assert_allclose(of(ops.layer_norm, [[2000, 1, 2, 3] * 8])[0, :4], [1.732, -0.579, -0.577, -0.576], atol=2e-3)
    np.testing.assert_array_equal(of(ops.rms_norm, [[300.0] * 4]), 1.0)
    assert of(ops.mean, np.full((100, 1000), 1000.0)) == 1000.0
    assert of(ops.mse, np.full((1000, 20), 20.0), np.zeros((1000, 20))) == 400.0
    assert of(ops.softmax, np.zeros(100_000)).sum() == pytest.approx(1.0, rel=5e-3)  # 1e-5 has 8 bits in float16
    assert of(ops.cross_entropy, np.zeros((1, 100_000)), labels=[0]) == pytest.approx(np.log(100_000), rel=2 ** -11)
    np.testing.assert_array_equal(of(ops.layer_norm, np.ones((2, 8)), eps=1e-12), 0.0)
    np.testing.assert_allclose(of(ops.gelu, [60.0, -60.0, 6e4]), [60.0, 0.0, 6e4])


def test_inputs_are_kept_in_float16(device):
    """What an operation makes of them, it keeps in float32: two numbers a row here. A view of an input is none of it."""
    class Square(Op):
        def forward(self, x):
            self.save(x.reshape(-1), None)
            return x * x

        def backward(self, dy):
            x, _ = self.saved
            return (2.0 * dy * x.reshape(dy.shape),)

    x = ops.neg(Parameter(place(-np.ones((4, 8)), "float16")))
    assert engine.ledger(apply(Square, x)).nbytes == 2 * 32
    assert engine.ledger(ops.layer_norm(x)).nbytes == 2 * 32 + 4 * 2 * 4
    assert engine.ledger(ops.relu(x)).nbytes == 2 * 32


def test_the_name_of_an_operation_stays(device):
    y = ops.layer_norm(Parameter(place(np.ones((4, 8)), "float16")))
    assert isinstance(y.node, ops.LayerNorm)
    assert engine.ledger(y).rows[-1].op == "LayerNorm"


def test_what_only_moves_is_not_copied():
    x = Parameter(np.ones((4, 8), "float16"))
    for y in (ops.reshape(x, (8, 4)), ops.transpose(x), x[1:]):
        assert np.shares_memory(y.data, x.data)


def test_a_graph_can_be_used_again_after_an_error(device):
    """The arrays that are widened for the backward pass of an operation are float16 again after it."""
    class Odd(Op):
        fails = True

        def forward(self, x):
            self.save(x)
            return x * 2.0

        def backward(self, dy):
            if Odd.fails:
                raise RuntimeError
            return (dy * 2.0,)

    x = Parameter(place([3.0], "float16"))
    y = apply(Odd, x)
    with pytest.raises(RuntimeError):
        y.backward(place([1.0], "float16"))
    assert y.node.saved[0] is x.data
    Odd.fails = False
    y.backward(place([1.0], "float16"))
    assert fetch(x.grad) == 2.0


def test_an_operation_may_see_to_it_itself():
    class Own(Op):
        widens = False

        def forward(self, x):
            assert x.dtype == "float16"
            return x * 2.0

        def backward(self, dy):
            assert dy.dtype == "float16"
            return (dy * 2.0,)

    x = Parameter(np.ones(3, "float16"))
    apply(Own, x).backward(np.ones(3, "float16"))
    assert x.grad.tolist() == [2.0] * 3
