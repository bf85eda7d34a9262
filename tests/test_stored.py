"""Weights that are held in low precision, as operations, parameters, modules and state dicts see them."""

import copy
import pickle

import numpy
import pytest

import minilora
from minilora import lora, nn, ops, optim, quant
from minilora.backend import device_of, to_host
from minilora.errors import DTypeError, StateDictError
from minilora.stored import Stored
from minilora.tensor import Parameter


@pytest.fixture(params=["float16", "bfloat16"])
def codes(request):
    """A function: random numbers of this shape as codes in 16 bits."""
    def make(*shape, seed=0):
        drawn = numpy.random.default_rng(seed).normal(size=shape).astype("float32")
        if request.param == "float16":
            return drawn.astype("float16")
        return (drawn.view("uint32") >> 16).astype("uint16")
    return make


@pytest.fixture
def narrow(monkeypatch):
    """Tiles of few rows, so that small matrices have several."""
    monkeypatch.setattr("minilora.stored.TILE", 20)


def held(layer, codes, dtype="float32"):
    """The same layer with its weight in 16 bits."""
    layer.weight = Parameter(quant.Sixteen(codes, dtype), trainable=False)
    return layer


def test_products_are_those_of_the_dense_matrix(codes, narrow):
    W = quant.Sixteen(codes(13, 7), "float64")
    rng = numpy.random.default_rng(1)
    for matrix, whole in ((W, W.dense()), (W.T, W.dense().T), (W.T.T, W.dense())):
        assert matrix.shape == whole.shape and matrix.dtype == "float64" and len(matrix) == len(whole)
        for n in (0, 1, 5):
            x, x_t = rng.normal(size=(n, matrix.shape[0])), rng.normal(size=(n, matrix.shape[1]))
            numpy.testing.assert_allclose(matrix.after(x), x @ whole, rtol=1e-13, atol=1e-13)
            numpy.testing.assert_allclose(matrix.after_transposed(x_t), x_t @ whole.T, rtol=1e-13, atol=1e-13)
            out = numpy.full((n, matrix.shape[1]), numpy.nan)
            assert matrix.after(x, out) is out and numpy.isfinite(out).all()
        numpy.testing.assert_array_equal(matrix[2:5], whole[2:5])
        numpy.testing.assert_array_equal(matrix[5:2], whole[5:2])
        numpy.testing.assert_array_equal(matrix[::2], whole[::2])
        places = numpy.array([[0, 5], [5, 6]])
        numpy.testing.assert_array_equal(matrix[places], whole[places])
        numpy.testing.assert_array_equal(numpy.asarray(matrix), whole)


@pytest.mark.parametrize("kind", ["float16", "int8", "nf4"])
def test_rows_are_named_as_those_of_an_array(kind, narrow):
    W = quant.stored(numpy.random.default_rng(4).normal(size=(13, 6)).astype("float32"), kind)
    whole = W.dense()
    for index in (3, -1, numpy.int64(12), numpy.array(5), numpy.array([-1, 0, 12, -13]), whole[:, 0] > 0, [2, 2],
                  numpy.zeros((0, 2), "int64"), slice(-3, None), slice(None, None, -2), slice(20, 30)):
        numpy.testing.assert_array_equal(W[index], whole[index])
    for places in (numpy.array([13]), numpy.array([0, -14])):
        with pytest.raises(IndexError):
            W[places]
        with pytest.raises(IndexError):
            W.take(places)


@pytest.mark.parametrize("needs_x", [False, True])
def test_layers_compute_as_with_the_dense_weight(codes, narrow, needs_x):
    rng = numpy.random.default_rng(2)
    x = rng.normal(size=(4, 5, 7))
    results = []
    for stored in (False, True):
        matrix = quant.Sixteen(codes(13, 7), "float64")
        layer = lora.adapt(nn.Linear(7, 13, dtype="float64", rng=0), r=2, rng=1)
        layer.weight = Parameter(matrix if stored else matrix.dense(), trainable=False)
        layer.lora_B.data[...] = rng.normal(size=(13, 2)) if not stored else results[0][2]
        given = Parameter(x.copy(), trainable=needs_x)
        y = layer(given) * minilora.tensor(numpy.cos(numpy.arange(4 * 5 * 13)).reshape(4, 5, 13))
        y.sum().backward()
        results.append((y.data, layer.lora_A.grad, layer.lora_B.data.copy(), layer.lora_B.grad, given.grad))
    for one, other in zip(*results):
        if one is not None:
            numpy.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_it_computes_in_any_dtype_and_holds_the_same_arrays(codes):
    W = quant.Sixteen(codes(3, 4))
    assert W.astype("float32") is W
    for dtype in ("float16", "float64"):
        other = W.astype(dtype)
        assert other.codes is W.codes and other.dtype == dtype and other.dense().dtype == dtype and other.T.dtype == dtype
        assert W.T.astype(dtype).dtype == dtype
    layer = held(nn.Linear(4, 3, rng=0), codes(3, 4))
    assert layer.to(dtype="float64").weight.dtype == "float64" and layer.weight.data.nbytes == 24
    assert layer(numpy.ones((1, 4))).dtype == "float64"
    assert layer.to("cpu").weight.data.kind == W.kind


def test_a_state_dict_holds_the_codes_and_gives_them_back(codes):
    layer, other = held(nn.Linear(4, 3, rng=0), codes(3, 4)), held(nn.Linear(4, 3, rng=1), codes(3, 4, seed=5))
    state = layer.state_dict()
    assert state["weight"].dtype == codes(1).dtype and state["weight"].flags.owndata
    before = other.weight.data
    other.load_state_dict(state)
    numpy.testing.assert_array_equal(other.weight.data.codes, layer.weight.data.codes)
    assert other.weight.data is not before and other.weight.data.codes is not state["weight"]
    with pytest.raises(StateDictError, match="misfit .*weight.*uint8"):
        other.load_state_dict({**state, "weight": state["weight"].astype("uint8")})
    with pytest.raises(StateDictError, match="missing"):
        other.load_state_dict({"bias": state["bias"]})


def test_half_of_its_arrays_is_no_weight():
    class Two(quant.Sixteen):
        scale = numpy.ones(3, "float32")

        def arrays(self):
            return {"": self.codes, "scale": self.scale}

        def with_arrays(self, arrays):
            other = Two(arrays[""], self.dtype)
            other.scale = arrays["scale"]
            return other

    layer = nn.Linear(4, 3, bias=False, rng=0)
    layer.weight = Parameter(Two(numpy.ones((3, 4), "float16")), trainable=False)
    state = layer.state_dict()
    assert sorted(state) == ["weight", "weight.scale"]
    state["weight.scale"][:] = 7.0
    layer.load_state_dict(state)
    assert layer.weight.data.scale.tolist() == [7.0] * 3
    del state["weight"]
    with pytest.raises(StateDictError, match="incomplete weight.scale: without weight|incomplete weight: without weight"):
        layer.load_state_dict(state, strict=False)


def test_it_cannot_be_trained_and_nothing_changes(codes):
    model = nn.Sequential(nn.Linear(4, 4, rng=0), held(nn.Linear(4, 3, rng=0), codes(3, 4))).requires_grad(False)
    with pytest.raises(DTypeError, match="1.weight: held as .*float16.*inject"):
        model.requires_grad()
    assert not any(p.trainable for p in model.parameters())
    with pytest.raises(DTypeError, match="read only"):
        Parameter(quant.Sixteen(codes(3, 4)))
    model.parameters
    p = list(model.parameters())[2]
    p.trainable = True
    with pytest.raises(DTypeError, match="adapter"):
        optim.SGD([p], lr=0.1)
    with pytest.raises(DTypeError, match="Sixteen holds"):
        quant.Sixteen(numpy.ones((2, 2), "float32"))


def test_copies_and_pickles(codes):
    layer = held(nn.Linear(4, 3, rng=0), codes(3, 4))
    x = numpy.ones((2, 4), "float32")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert isinstance(other.weight.data, Stored) and not other.weight.trainable
        assert (other(x).data == layer(x).data).all()
        assert repr(other.weight) == repr(layer.weight) and "float16" in repr(other.weight)


def test_it_is_no_array_but_reads_as_one(codes):
    W = quant.Sixteen(codes(3, 4))
    assert device_of(W).name == "cpu" and to_host(W).dtype == "float32"
    assert (Parameter(W, trainable=False).numpy() == W.dense()).all()
    with pytest.raises(AttributeError, match=r"dense\(\)"):
        W.swapaxes(0, 1)
    with pytest.raises(TypeError):
        numpy.exp(W)


def test_the_head_of_a_language_model(codes, narrow):
    h, labels = numpy.random.default_rng(3).normal(size=(6, 7)), numpy.array([0, 12, 5, -100, 5, 1])
    W = quant.Sixteen(codes(13, 7), "float64")
    grads = []
    for weight in (W, W.dense()):
        given = Parameter(h.copy())
        loss = ops.linear_cross_entropy(given, Parameter(weight, trainable=False), labels, chunk_rows=4)
        loss.backward()
        grads.append((loss.item(), given.grad))
    numpy.testing.assert_allclose(grads[0][0], grads[1][0], rtol=1e-12)
    numpy.testing.assert_allclose(grads[0][1], grads[1][1], rtol=1e-11, atol=1e-14)
