"""LoRA+: which parameters learn faster, and by how much."""
import numpy as np
import pytest

import minilora
from minilora import lora, nn, optim
from minilora.errors import ConfigError


def model(**settings):
    net = nn.Sequential(nn.Embedding(5, 4, rng=0), nn.Linear(4, 3, rng=1), nn.Linear(3, 2, rng=2))
    lora.inject(net, lora.Config(r=2, target_modules=["0", "1"], **settings), rng=0)
    return net


def rates(net, groups):
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)].replace("adapters.default.", ""): group["lr"] for group in groups for p in group["params"]}


def test_what_starts_at_0_learns_faster():
    net = model()
    found = rates(net, lora.lora_plus_groups(net, 0.5, 8))
    assert found == {"0.lora_A": 4.0, "0.lora_B": 0.5, "1.lora_A": 0.5, "1.lora_B": 4.0}


def test_vectors_learn_at_the_rate_of_B_and_all_else_at_that_of_A():
    net = model(use_dora=True, bias="lora_only", modules_to_save=["2"])
    found = rates(net, lora.lora_plus_groups(net, 1.0, 3))
    assert {name for name, lr in found.items() if lr == 3.0} == {
        "0.lora_A", "0.magnitude", "1.lora_B", "1.magnitude", "1.bias", "2.copies.default.bias"}
    assert {name for name, lr in found.items() if lr == 1.0} == {
        "0.lora_B", "1.lora_A", "2.copies.default.weight"}
    assert set(found) == {name.replace("adapters.default.", "") for name, p in net.named_parameters() if p.trainable}


def test_settings_go_to_both_groups_and_the_steps_follow_the_rates(device):
    net = nn.Sequential(nn.Linear(4, 3, rng=1, dtype="float64"))
    lora.inject(net, lora.Config(r=2, target_modules=["0"], init_lora_weights="orthogonal"), rng=0)
    groups = lora.lora_plus_groups(net, 1e-3, 16, weight_decay=0.0)
    assert [set(group) for group in groups] == [{"params", "lr", "weight_decay"}] * 2
    optimizer = optim.AdamW(groups)
    before = net.state_dict()
    (net(minilora.tensor(np.ones((2, 4)))) ** 2).sum().backward()
    optimizer.step()
    moved = {name[-6:]: np.abs(value - before[name]).max() for name, value in net.state_dict().items()}
    np.testing.assert_allclose([moved["lora_A"], moved["lora_B"]], [1e-3, 16e-3], rtol=1e-3)  # Adam's first step is lr


def test_one_group_where_A_is_frozen():
    net = nn.Sequential(nn.Linear(4, 3, rng=1))
    lora.inject(net, lora.Config(r=2, target_modules=["0"]))
    lora.freeze_A(net)
    (group,) = lora.lora_plus_groups(net, 1e-3)
    assert group["lr"] == 16e-3 and len(group["params"]) == 1


@pytest.mark.parametrize("settings, match", [
    (dict(lr=0.0), "lr must be above 0"), (dict(lr=-1), "lr must be above 0"), (dict(lr=np.nan), "lr must be a finite number"),
    (dict(lr="1"), "lr must be a finite number"), (dict(lr=1, ratio=0), "ratio must be above 0"),
    (dict(lr=1, ratio=np.inf), "ratio must be a finite number"),
], ids=str)
def test_settings_out_of_range(settings, match):
    with pytest.raises(ConfigError, match=match):
        lora.lora_plus_groups(model(), **settings)


def test_nothing_to_learn():
    net = model()
    lora.activate(net)
    for other in (net, nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="no B of an adapter is trained"):
            lora.lora_plus_groups(other, 1.0)
