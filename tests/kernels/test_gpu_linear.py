"""The linear layer whose product adds the bias: emulated, as the stand-in counts it, and on a real GPU (-m gpu)."""
import emulator
import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu, place

import minilora
from minilora import Parameter, Tensor, backend, engine, nn, ops, optim, quant, stored


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    if request.param == "gpu":
        need_gpu()
        with backend.use("gpu") as device:
            yield device
    else:
        with emulator.emulated_device():
            yield backend.current_device()


def hosts(shape=(3, 5), out=4, dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in (shape, (out, shape[-1]), (out,))]


def launches(call):
    with standin.capturing(), standin.counting() as counts:
        result = call()
    return result, counts


def test_one_launch_forward_and_three_behind():
    with standin.card():
        x, W, b = (Parameter(place(a)) for a in hosts())
        y, counts = launches(lambda: ops.linear(x, W, b))
        assert counts.launches == counts.calls["gemm"] == 1 and y.node.kernel == "FusedLinear"
        dy = place(np.ones((3, 4)), "float32")
        _, counts = launches(lambda: y.node.backward(dy))
        assert counts.launches == 3 and (counts.calls["gemm"], counts.calls["sum"]) == (2, 1)
        y, counts = launches(lambda: ops.linear(x, W))
        assert counts.launches == counts.calls["gemm"] == 1 and y.node.kernel == ""


@pytest.mark.parametrize("light", ["refuses", "missing"])
def test_where_the_bias_cannot_be_added_in_passing_it_has_a_launch(light):
    made = (lambda: standin.Light({"cublasLtMatmulAlgoGetHeuristic": 15})) if light == "refuses" else lambda: None
    with standin.card(light=made):
        x, W, b = hosts()
        y, counts = launches(lambda w=[Tensor(place(a)) for a in (x, W, b)]: ops.linear(*w))
        assert counts.launches == 2 and counts.calls["gemm"] == 1
        np.testing.assert_allclose(fetch(y), x @ W.T + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_values_and_shapes(shape, dtype, card):
    x, W, b = hosts(shape, dtype=dtype)
    y = ops.linear(*(Tensor(place(a)) for a in (x, W, b)))
    assert (y.shape, y.dtype) == ((*shape[:-1], 4), dtype)
    wide = [a.astype("float64") for a in (x, W, b)]
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(fetch(y), wide[0] @ wide[1].T + wide[2], rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("inner", [0, 5])
@pytest.mark.parametrize("out", [0, 1, 4])
def test_no_inputs_and_no_outputs(inner, out, card):
    x, W, b = hosts((3, inner), out)
    parameters = [Parameter(place(a)) for a in (x, W, b)]
    y = ops.linear(*parameters)
    np.testing.assert_allclose(fetch(y), x @ W.T + b, rtol=1e-5, atol=1e-6)
    y.backward(place(np.ones((3, out)), "float32"))
    assert [p.grad.shape for p in parameters] == [x.shape, W.shape, b.shape]


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_goes_where_it_goes_in_the_reference(number, card):
    for place_of in range(3):
        arrays = hosts()
        arrays[place_of].flat[1] = number
        x, W, b = arrays
        with np.errstate(invalid="ignore"):
            expected = x @ W.T + b
        got = fetch(ops.linear(*(Tensor(place(a)) for a in arrays)))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))


def test_no_input_is_changed_and_the_output_is_fresh(card):
    arrays = [place(a) for a in hosts()]
    before = [fetch(a).tobytes() for a in arrays]
    y = ops.linear(*map(Tensor, arrays))
    y.data[...] = 7.0
    assert [fetch(a).tobytes() for a in arrays] == before


@pytest.mark.parametrize("kind", ["float16", "int8", "nf4"])
def test_a_weight_in_low_precision_goes_its_own_way(kind, card):
    layer = nn.Linear(64, 8, rng=np.random.default_rng(0))
    layer.bias.data[...] = place(np.arange(8.0), "float32")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype("float32")
    quant.quantize(layer.requires_grad(False), kind)
    W = fetch(stored.dense(layer.weight.data))
    y = layer(minilora.tensor(x))
    tolerance = 2e-2 if kind == "float16" else 1e-4
    np.testing.assert_allclose(fetch(y), x @ W.T + np.arange(8.0), rtol=tolerance, atol=tolerance)


def test_the_gradients_are_written_where_the_optimizer_wants_them():
    """Of the bias, too, which was copied there."""
    with standin.card():
        layer = nn.Linear(5, 4, rng=np.random.default_rng(0))
        optimizer = optim.SGD(list(layer.parameters()), lr=0.1)
        x = place(np.ones((3, 5)), "float32")
        layer(x).backward(place(np.ones((3, 4)), "float32"))
        optimizer.step(), optimizer.zero_grad()
        y = layer(x)
        with standin.counting() as counts:
            y.backward(place(np.ones((3, 4)), "float32"))
        assert counts.calls["setitem"] == 0 and counts.launches == 2
        assert all(p.gathered is p.room for p in layer.parameters())
        assert fetch(layer.bias.grad).tolist() == [3.0] * 4


@pytest.mark.parametrize("before", range(5))
def test_a_trained_bias_anywhere_in_the_flat_array(before, card):
    """Begins at a multiple of 16 bytes or not: the same numbers."""
    results = []
    for device in (card.name, "cpu"):
        with backend.use(device):
            model = nn.Linear(5, 4, rng=np.random.default_rng(3))
            other = Parameter(place(np.ones(before), "float32"))
            optimizer = optim.SGD([other, model.bias, model.weight], lr=0.1)
            for x, y in np.random.default_rng(4).standard_normal((3, 2, 4, 5)).astype("float32"):
                loss = ops.mse(model(minilora.tensor(x)), minilora.tensor(y[:, :4]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            results.append([fetch(p) for p in model.parameters()])
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_ledger_names_the_kernel(card):
    x, W, b = (Parameter(place(a)) for a in hosts())
    assert "Linear*" in str(engine.ledger(ops.linear(x, W, b))) and "Linear*" not in str(engine.ledger(ops.linear(x, W)))


def test_with_kernels_off_the_reference_runs(card):
    x, W, b = hosts()
    with backend.use(card.name, kernels=False):
        y = ops.linear(*(Parameter(place(a)) for a in (x, W, b)))
    assert type(y.node) is ops.Linear
    np.testing.assert_allclose(fetch(y), x @ W.T + b, rtol=1e-5, atol=1e-6)
