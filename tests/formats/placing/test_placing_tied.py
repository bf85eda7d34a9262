"""A table that makes the logits too: PEFT's update of it is not in them, ours is, and a file says which."""
import copy
import dataclasses

import numpy as np
import pytest

from minilora import lora, models, nn
from minilora.errors import FormatError, StateError
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter

IDS = [[1, 4, 2], [0, 3, 3]]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def gpt2():
    return nn.GPT2(nn.GPT2Config(vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2), rng=0).eval()


def from_peft(**more):
    update = Update("embedding", draw(2, 7), draw(8, 2, seed=1), 0.5)
    return SavedAdapter({"transformer.wte": update}, lora.Config(r=2, lora_alpha=1, target_modules=["wte"]), **more)


def table(saved):
    """The table with the update of the file."""
    update = saved.updates["transformer.wte"]
    return gpt2().wte.weight.data + update.s * (update.B @ update.A).T


def ours(**settings):
    model = gpt2()
    lora.inject(model, lora.Config(r=2, lora_alpha=1, target_modules=["wte"], **settings), rng=0)
    model.wte.lora_A.data += draw(2, 7)
    return model


def test_the_update_of_peft_is_not_in_the_logits():
    model, other = gpt2(), gpt2()
    report = load_adapter(model, from_peft(), "one")
    assert report.layers[0].more == "not in the logits"
    other.wte.weight.data = table(from_peft()).astype("float32")
    h = other.hidden(IDS).data
    np.testing.assert_allclose(model(IDS).data, h @ gpt2().wte.weight.data.T, rtol=1e-5, atol=1e-6)
    for call in (lora.merge, lora.bake):
        with pytest.raises(StateError, match="does not take part in the logits"):
            call(model)
    with pytest.raises(StateError, match="not in the logits"):
        lora.low_rank_updates(model)
    back = saved_adapter(model)
    assert [*back.updates] == ["wte"] and back.metadata.keys() == {"minilora"}


def test_ours_is_in_them_and_is_written_as_a_table_and_a_head():
    model = ours()
    saved = saved_adapter(model)
    assert [*saved.updates] == ["wte", "lm_head"]
    emb, head = saved.updates.values()
    np.testing.assert_array_equal(head.A, emb.B.T)
    np.testing.assert_array_equal(head.B, emb.A.T)
    again = gpt2()
    report = load_adapter(again, saved)
    assert report.layers[0].more == "logits too" and len(report.layers) == 1
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    lora.merge(again)
    np.testing.assert_allclose(again(IDS).data, model(IDS).data, rtol=1e-4, atol=1e-6)
    # in a model whose head is its own, they are two updates
    untied = gpt2()
    untied.lm_head = nn.Linear(8, 7, bias=False)
    untied.lm_head.weight.data = untied.wte.weight.data.copy()
    assert len(load_adapter(untied, saved).layers) == 2
    np.testing.assert_allclose(untied(IDS).data, model(IDS).data, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_not_the_tables_is_refused():
    saved = saved_adapter(ours())
    updates = dict(saved.updates)
    updates["lm_head"] = dataclasses.replace(updates["lm_head"], s=0.25)
    with pytest.raises(FormatError, match="the head of this model is tied"):
        load_adapter(gpt2(), dataclasses.replace(saved, updates=updates))


def test_two_of_them_together_and_in_a_mixed_batch():
    model = ours()
    mine = model(IDS[:1]).data
    load_adapter(model, from_peft(), "peft")
    theirs = model(IDS[:1]).data
    with lora.mixed(model, adapter_names=["default", "peft", "__base__"]):
        got = model(np.repeat(np.array(IDS[:1]), 3, 0)).data
    np.testing.assert_allclose(got, np.concatenate([mine, theirs, gpt2()(IDS[:1]).data]), rtol=1e-5, atol=1e-6)
    lora.activate(model, "default", "peft", weights=[1.0, 0.5])
    h = model.hidden(IDS).data
    W = gpt2().wte.weight.data + model.wte.adapters["default"].scaling * (
        model.wte.adapters["default"].lora_B.data @ model.wte.adapters["default"].lora_A.data).T
    np.testing.assert_allclose(model(IDS).data, h @ W.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(copy.deepcopy(model)(IDS).data, model(IDS).data)


@pytest.mark.parametrize("settings", [dict(use_dora=True)])
def test_what_no_head_can_say_is_said_in_the_metadata(settings):
    model = ours(**settings)
    saved = saved_adapter(model)
    assert [*saved.updates] == ["wte"] and saved.metadata["minilora.in_head"] == '["wte"]'
    load_adapter(again := gpt2(), saved)
    np.testing.assert_allclose(again(IDS).data, model(IDS).data, rtol=1e-6)
    with pytest.raises(FormatError, match="no list of paths"):
        load_adapter(gpt2(), dataclasses.replace(saved, metadata={"minilora.in_head": "{}"}))


def test_a_masked_language_model_is_tied_too():
    model = models.BertMaskedLM(nn.BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                              intermediate_size=8, max_position_embeddings=5), rng=0).eval()
    base = copy.deepcopy(model)
    lora.inject(model, lora.Config(r=1, target_modules=["word_embeddings"]), rng=0)
    model.embedding.lora_A.data += 1.0
    saved = saved_adapter(model)
    load_adapter(again := copy.deepcopy(base), saved)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    (path, update), *_ = saved.updates.items()
    load_adapter(other := copy.deepcopy(base), SavedAdapter({path: update}, saved.config))
    assert np.abs(other(IDS).data - again(IDS).data).max() > 1e-3
    with pytest.raises(StateError, match="does not take part"):
        lora.merge(other)


def test_a_table_that_makes_none_merges():
    class Net(nn.Module):
        def __init__(self):
            self.wte, self.fc = nn.Embedding(7, 8, rng=0), nn.Linear(8, 2, rng=0)

        def forward(self, ids):
            return self.fc(self.wte(ids))

    model = Net().eval()
    load_adapter(model, from_peft())
    y = model(IDS).data
    lora.merge(model)
    np.testing.assert_allclose(model(IDS).data, y, rtol=1e-5, atol=1e-6)
