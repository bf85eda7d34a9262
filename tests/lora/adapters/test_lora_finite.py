"""NaN and inf in what is to become a part of a model are named and refused, unless they are asked for."""
import numpy as np
import pytest
from conftest import fetch, place

from minilora import lora, nn, optim
from minilora.errors import StateDictError

NAN, INF = float("nan"), float("inf")


def make(dtype="float32"):
    """An adapted embedding, and an adapted linear layer inside of another module."""
    model = nn.Sequential(nn.Embedding(6, 4, dtype=dtype, rng=0), nn.Sequential(nn.Linear(4, 3, dtype=dtype, rng=1)))
    lora.inject(model, lora.Config(r=2, target_modules=["0", "1.0"]), rng=2)
    return model


def bare():
    return nn.Sequential(nn.Embedding(6, 4, rng=0), nn.Sequential(nn.Linear(4, 3, rng=1)))


def updates(a=0.5, b=0.25, dtype="float32"):
    found = {path: [np.full(shape, value, dtype) for shape, value in (((2, n), 1.0), ((out, 2), 2.0))]
             for path, n, out in (("0", 6, 4), ("1.0", 4, 3))}
    found["0"][1][1, 0], found["1.0"][0][0, 1:3] = a, b
    return {path: lora.LowRank(place(A), place(B), 0.5) for path, (A, B) in found.items()}


def state(a=0.5, b=0.25):
    values = lora.lora_state_dict(make())
    values["0.lora_B"][1, 0], values["1.0.lora_A"][0, 1:3] = a, b
    return values


CALLS = {  # the model, what it is given with two bad places, the call
    "load_lora_state_dict": (make, state, lora.load_lora_state_dict),
    "hotswap": (make, updates, lora.hotswap),
    "inject_updates": (bare, updates, lora.inject_updates),
}


def picture(model):
    return [(path, fetch(p).tobytes(), p.trainable) for path, p in model.named_parameters()], str(lora.status(model))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("a, b", [(NAN, INF), (-INF, NAN)])
def test_they_are_named_all_of_them_and_refused(device, name, a, b):
    start, given, call = CALLS[name]
    model = start()
    before = picture(model)
    with pytest.raises(StateDictError) as caught:
        call(model, given(a, b))
    lines = str(caught.value).splitlines()
    assert lines[1:] == ["  not finite 0.lora_B: 1 of 8 numbers are NaN or inf",
                         "  not finite 1.0.lora_A: 2 of 8 numbers are NaN or inf",
                         "  If NaN and inf are meant, give allow_nonfinite=True"]
    assert picture(model) == before
    call(model, given())
    assert all(np.isfinite(fetch(p)).all() for p in model.parameters())


@pytest.mark.parametrize("name", CALLS)
def test_they_are_taken_on_request(device, name):
    start, given, call = CALLS[name]
    model = start()
    call(model, given(NAN, INF), allow_nonfinite=True)
    adapters = {path: layer.adapter for path, layer in model.named_modules() if hasattr(layer, "adapters")}
    assert np.isnan(fetch(adapters["0"].lora_B)).sum() == 1 and np.isinf(fetch(adapters["1.0"].lora_A)).sum() == 2


@pytest.mark.parametrize("name", CALLS)
def test_beside_other_problems(name):
    start, given, call = CALLS[name]
    model, values = start(), given(NAN, 0.0)
    key = "1.0" if "1.0" in values else "1.0.lora_A"
    wrong = {**{other: value for other, value in values.items() if other != key}, "9.9": values[key]}
    with pytest.raises(StateDictError) as caught:
        call(model, wrong)
    assert "not finite 0.lora_B: 1 of 8" in str(caught.value) and "9.9" in str(caught.value)
    misfit = {**values, key: values["0"] if key == "1.0" else values["0.lora_B"]}
    with pytest.raises(StateDictError) as caught:
        call(model, misfit)
    assert "not finite 0.lora_B: 1 of 8" in str(caught.value) and f" {key}: expected" in str(caught.value)


@pytest.mark.parametrize("call", [lora.hotswap, lora.inject_updates])
def test_what_overflows_the_layers_dtype_is_not_finite_there(call):
    model = (make if call is lora.hotswap else bare)()
    with pytest.raises(StateDictError, match="not finite 1.0.lora_A: 2 of 8 numbers"):
        call(model, updates(1e30, 1e39, "float64"))
    call(model, updates(1e30, 1e38, "float64"))


def test_a_bias_of_the_base_and_one_layer_alone():
    layer = lora.Linear(3, 2, r=1, lora_bias=True, rng=0)
    values = lora.lora_state_dict(layer, bias="all")
    values["bias"][0], values["lora_bias"][:] = NAN, INF
    with pytest.raises(StateDictError, match=r"bias: 1 of 2 .*\n  not finite lora_bias: 2 of 2"):
        lora.load_lora_state_dict(layer, values, bias="all")


def test_an_optimizer_keeps_its_arrays():
    model = make()
    optimizer = optim.SGD([p for p in model.parameters() if p.trainable], lr=0.1)
    arrays = [p.data for p in optimizer.groups[0].parameters]
    lora.load_lora_state_dict(model, state())
    assert all(p.data is array for p, array in zip(optimizer.groups[0].parameters, arrays))
