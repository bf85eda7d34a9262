"""Mixed precision for every operation, and sums of gradients: what is added is added in at least float32."""
import numpy as np
import pytest
from cases import CASES, one_of_each
from conftest import PROOF, fetch, place

import minilora
from minilora import Parameter, Tensor, blas, engine, lora, nn, ops, optim, parallel
from minilora.engine import Op, apply
from minilora.errors import DTypeError
from minilora.half import mixed, mixing

EVERY = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
WIDE = {"CrossEntropy", "LinearCrossEntropy", "MSE", "Sum", "Mean", "Pow", "Exp", "LogSoftmax", "Cast"}
PRODUCTS = {"MatMul", "Linear", "LoRALinear", "LoRAUpdate", "Conv", "LoRAConv", "Attention", "PackedAttention",
            "DisentangledAttention", "PrefixAttention", "PackedPrefixAttention",
            "Embedding", "LoRAEmbedding", "LoRAMergedLinear", "LoRAMergedUpdate", "TokenEmbedding", "TokenHead", "WithWeights"}
ITSELF = {"DoRAScale", "Recompute", "WithWeights"}  # they see to float16 themselves: no inputs of two dtypes
EPS = float(np.finfo("float16").eps)


def generator(case):
    return np.random.default_rng(sum(map(ord, case.name)))


@EVERY
@PROOF
def test_every_operation_in_mixed_precision(case, device):
    """The output has the dtype that the rule says, each gradient that of its input; and both are float32's, rounded once."""
    for half in ("first", "last", "none") if device == "cpu" else ("first",):
        check_in_mixed(case, half)


@pytest.mark.parametrize("device", ["standin"], indirect=True)
@pytest.mark.parametrize("case", one_of_each(CASES))
def test_mixed_precision_on_the_stand_in(case, device):
    check_in_mixed(case, "last")


def check_in_mixed(case, half):
    rng = generator(case)
    arrays = [a.astype("float16") for a in case.inputs(rng, "float16")]
    name = case.op.__name__
    which = {"first": [0], "last": [len(arrays) - 1], "none": []}[half]
    if (name in ITSELF or name == "Rotary") and which:  # a rotary table is of one dtype with x
        return
    dtypes = ["float16" if i in which else "float32" for i in range(len(arrays))]
    parameters = [Parameter(place(a, dtype)) for a, dtype in zip(arrays, dtypes)]
    plain = [Parameter(place(a, "float32")) for a in arrays]
    expected = case.call(*plain)
    with mixed():
        y = case.call(*parameters)
    cast = case.name == "cast and back"
    narrow = name in PRODUCTS or (name not in WIDE and bool(which)) or cast and bool(which)
    assert y.dtype == ("float16" if narrow else "float32"), (name, y.dtype)
    atol = EPS * max(1.0, float(abs(fetch(expected)).max(initial=0.0)))
    np.testing.assert_allclose(fetch(y), fetch(expected), rtol=0, atol=atol if narrow else 1e-6 * max(1.0, atol / EPS))
    dy = rng.standard_normal(expected.shape).astype("float16")
    expected.backward(place(dy, "float32"))
    with mixed():
        y.backward(place(dy, y.dtype))
    for p, q in zip(parameters, plain):
        assert p.grad.dtype == p.dtype
        scale = max(1.0, float(abs(fetch(q.grad)).max(initial=0.0)))
        np.testing.assert_allclose(fetch(p.grad), fetch(q.grad), rtol=0, atol=16 * EPS * scale)


def test_a_gradient_of_a_weight_is_never_rounded(device):
    """It is float32's to the bit, for the same activations and dy."""
    rng = np.random.default_rng(0)
    x, W, dy = (rng.standard_normal(shape).astype("float16") for shape in ((64, 8), (5, 8), (64, 5)))
    one, other = Parameter(place(W, "float32")), Parameter(place(W, "float32"))
    with mixed():
        ops.linear(Tensor(place(x, "float16")), one).backward(place(dy, "float16"))
    ops.linear(Tensor(place(x, "float32")), other).backward(place(dy, "float32"))
    np.testing.assert_array_equal(fetch(one.grad), fetch(other.grad))
    assert (fetch(one.grad) != fetch(one.grad).astype("float16")).any()


# -- sums of gradients ------------------------------------------------------------------------------------------------

MANY = 4097  # ones: in float16 their sum stands still at 2048


def added_up(kind):
    """A float16 parameter's gradient of 4096 as the rule of sums has it: 4097 of ones, rounded once."""
    p = Parameter(place([1.0], "float16"))
    optimizer = optim.SGD([p], lr=1.0) if "room" in kind else None
    one = place([1.0], "float16")
    if kind.startswith("tensor"):  # of a tensor that is no leaf
        x = ops.mul(p, 1.0)
        apply(Everything, *[x] * MANY).backward(one)
    elif kind.startswith("uses"):
        apply(Everything, *[p] * MANY).backward(one)
    elif kind.startswith("micro-batches"):
        for _ in range(MANY):
            ops.mul(p, 1.0).backward(one)
    elif kind == "recomputed":
        ops.recompute(lambda x: apply(Everything, *[x] * MANY), [], ops.mul(p, 1.0)).backward(one)
    if optimizer is not None:
        optimizer.clip_grad_norm(1e30)
        assert float(fetch(optimizer.groups[0].grad)[0]) == MANY
    return float(fetch(p.grad)[0])


class Everything(Op):
    """y = the first of the inputs; each has the gradient dy."""

    def forward(self, *xs):
        return xs[0] * 1.0

    def backward(self, dy):
        return (dy,) * len(self.needs)


@pytest.mark.parametrize("kind", ["tensor", "uses", "uses, room", "micro-batches", "micro-batches, room", "recomputed"])
def test_sums_of_float16_gradients_do_not_stand_still(kind, device):
    if device == "cpu" or not kind.startswith("micro"):  # 4097 backwards, the same on any device
        assert added_up(kind) == 4096.0  # 4097 rounded to float16


@pytest.mark.skipif(not blas.can_hold(), reason="needs an OpenBLAS whose threads can be set")
def test_parts_of_a_batch_are_added_in_float32():
    p = Parameter(np.ones(1, "float16"))
    x = np.array([2048.0, 1.0], "float16")[:, None]
    parallel.backward(lambda part: ops.cast(ops.mul(p, minilora.tensor(part)).sum() * 2.0, "float32"), x, 2)
    assert p.gathered.dtype == "float32" and float(p.gathered[0]) == 2049.0


def test_the_norm_of_gradients_in_float16():
    p = Parameter(np.ones(4, "float16"))
    optimizer = optim.SGD([p], lr=0.0)
    p.grad = np.full(4, 6e4, "float16")
    assert float(optimizer.clip_grad_norm(1e30)) == pytest.approx(2 * 6e4, rel=1e-3)


def test_what_is_read_is_rounded_and_is_the_gradient_from_then_on(device):
    p = Parameter(place([1.0, 2.0], "float16"))
    optim.SGD([p], lr=1.0)
    for _ in range(2):
        ops.mul(p, 3.0).backward(place([1.0, 1.0], "float16"))
    grad = p.grad
    assert grad.dtype == "float16" and p.grad is grad
    grad *= 0.5
    ops.mul(p, 3.0).backward(place([1.0, 1.0], "float16"))
    np.testing.assert_array_equal(fetch(p.grad), 6.0)


# -- the context ------------------------------------------------------------------------------------------------------


def test_outside_of_it_two_dtypes_do_not_meet():
    x, W = minilora.tensor(np.ones((2, 3), "float16")), Parameter(np.ones((2, 3), "float32"))
    with pytest.raises(DTypeError, match="two dtypes"):
        ops.linear(x, W)
    with mixed(), pytest.raises(DTypeError, match="two dtypes"):
        ops.linear(x, Parameter(np.ones((2, 3))))
    with mixed(), mixed(False), pytest.raises(DTypeError, match="two dtypes"):
        ops.linear(x, W)
    with pytest.raises(ZeroDivisionError), mixed():
        raise ZeroDivisionError
    assert mixing.get() is False


def test_float64_stays(device):
    with mixed():
        layer = nn.Linear(3, 2, dtype="float64", rng=0)
        assert layer(Tensor(place(np.ones((2, 3)), "float64"))).dtype == "float64"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"use_rslora": True}])
def test_adapters_keep_half_of_it(options):
    """Whatever an adapter is, activations stay float16 through the layer, and its gradients are float32."""
    def kept(on):
        model = nn.Sequential(nn.Linear(64, 64, rng=0), nn.GELU(), nn.Linear(64, 64, rng=1))
        lora.inject(model, lora.Config(r=2, target_modules=["0", "2"], **options), rng=0)
        with mixed(on):
            y = model(minilora.tensor(np.ones((256, 64), "float32")))
            loss = ops.mean(y * y)
            found = engine.ledger(loss).nbytes
            loss.backward()
        assert {p.grad.dtype.name for p in model.parameters() if p.trainable} == {"float32"}
        assert y.dtype == ("float16" if on else "float32")
        return found

    assert kept(True) < 0.75 * kept(False)
