"""loralib's calls: what is trained, what is saved, and a load that is strict."""

import numpy as np
import pytest
from conftest import fetch, place

from minilora import lora, nn, ops, optim
from minilora.errors import ConfigError, StateDictError, StateError


def model(seed=0):
    rng = np.random.default_rng(seed)
    return nn.Sequential(nn.Linear(4, 5, rng=rng), nn.Tanh(), lora.Linear(5, 3, r=2, lora_alpha=4, rng=rng),
                         lora.Linear(3, 2, r=1, bias=False, rng=rng))


TRAINED = {
    "none": ["2.lora_A", "2.lora_B", "3.lora_A", "3.lora_B"],
    "lora_only": ["2.bias", "2.lora_A", "2.lora_B", "3.lora_A", "3.lora_B"],
    "all": ["0.bias", "2.bias", "2.lora_A", "2.lora_B", "3.lora_A", "3.lora_B"],
}


def paths(keys):
    """The paths of parameters in the model, where loralib writes path.lora_A."""
    return [key.replace(".lora_", ".adapters.default.lora_") for key in keys]


@pytest.mark.parametrize("bias", TRAINED)
def test_marks_exactly_what_is_asked(bias, device):
    net = model()
    assert lora.mark_only_lora_as_trainable(net, bias) == TRAINED[bias]
    assert [name for name, p in net.named_parameters() if p.trainable] == paths(TRAINED[bias])
    assert list(lora.lora_state_dict(net, bias)) == TRAINED[bias]


def test_a_parameter_called_lora_elsewhere_is_not_trained():
    net = model()
    net[0].lora_weight = nn.Linear(1, 1)
    assert lora.mark_only_lora_as_trainable(net) == TRAINED["none"]


def test_frozen_parameters_lose_their_gradient(device):
    net = model()
    x = np.ones((3, 4), "float32")
    ops.mse(net(place(x)), place(np.zeros((3, 2), "float32"))).backward()
    assert net[0].weight.grad is not None
    lora.mark_only_lora_as_trainable(net)
    assert net[0].weight.grad is None and net[2].lora_B.grad is not None


def test_three_calls_train_save_and_load(device):
    net, other = model(), model()
    rng = np.random.default_rng(1)
    lora.mark_only_lora_as_trainable(net)
    before = {name: value.tobytes() for name, value in net.state_dict().items()}
    optimizer = optim.Adam(net.parameters(), lr=0.1)
    x, t = place(rng.standard_normal((6, 4)), "float32"), place(rng.standard_normal((6, 2)), "float32")
    for _ in range(3):
        optimizer.zero_grad()
        ops.mse(net(x), t).backward()
        optimizer.step()
    moved = {name for name, value in net.state_dict().items() if value.tobytes() != before[name]}
    assert moved == set(paths(TRAINED["none"]))
    lora.load_lora_state_dict(other, lora.lora_state_dict(net))
    np.testing.assert_array_equal(fetch(other(x)), fetch(net(x)))


def test_state_is_a_copy():
    net = model()
    state = lora.lora_state_dict(net)
    state["2.lora_A"][...] = 7.0
    assert not (fetch(net[2].lora_A) == 7.0).any()


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s.pop("2.lora_A"), ["missing    2.lora_A"]),
    (lambda s: s.update({"9.lora_A": s["2.lora_A"]}), ["unexpected 9.lora_A"]),
    (lambda s: s.update({"2.lora_A": s["2.lora_A"].T}), ["misfit", "2.lora_A", "(2, 5)", "(5, 2)"]),
    (lambda s: s.update({"2.lora_A": s["2.lora_A"].astype("float64")}), ["2.lora_A", "float32", "float64"]),
])
def test_a_state_that_does_not_fit_changes_nothing(change, words):
    net, state = model(), lora.lora_state_dict(model(1))
    change(state)
    before = {name: value.tobytes() for name, value in net.state_dict().items()}
    with pytest.raises(StateDictError) as caught:
        lora.load_lora_state_dict(net, state)
    assert all(word in str(caught.value) for word in words)
    assert "adapters" not in str(caught.value)
    assert {name: value.tobytes() for name, value in net.state_dict().items()} == before


def test_a_merged_layer_is_refused():
    net, state = model(), lora.lora_state_dict(model(1))
    net[2].merge()
    with pytest.raises(StateError, match=r"\['2'\].*unmerge"):
        lora.load_lora_state_dict(net, state)


@pytest.mark.parametrize("call", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_bad_use(call):
    with pytest.raises(ConfigError, match="no LoRA layer"):
        call(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="bias must be one of none, all, lora_only, got 'some'"):
        call(model(), bias="some")


def test_merged_biases_are_not_saved_as_the_bases():
    layer = lora.Linear(3, 2, r=1, lora_bias=True, rng=0)
    layer.adapter.lora_bias.data[...] = 1.0
    layer.merge()
    assert set(lora.lora_state_dict(layer)) == {"lora_A", "lora_B", "lora_bias"}
    with pytest.raises(StateError, match="biases may hold a part of it"):
        lora.lora_state_dict(layer, bias="lora_only")
