"""Models saved: what is written, the round trip to the bit, and what is refused."""
import json
import os

import numpy as np
import pytest
from checkpoint_cases import ARCHITECTURES, SIZES, batch, write_vectors

import minilora
from conftest import fetch, place
from minilora import lora, models, nn, optim
from minilora.errors import DTypeError, FileError, StateError
from minilora.formats.tensors.reading import open_state
from minilora.models.families import FAMILIES


def made(architecture, dtype="float32", rng=0):
    """A model that no file made."""
    family, _ = ARCHITECTURES[architecture]
    family = FAMILIES[family]
    head = next(head for head in family.heads.values() if head.architecture == architecture)
    config = family.config(**family.read(SIZES[family.model_type]))
    return head.model(config, *[models.Labels(3)] * head.labelled, dtype=dtype, rng=rng)


def bits(model):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in model.state_dict().items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, tmp_path, device):
    own = made(architecture)
    rng = np.random.default_rng(0)
    for p in own.parameters():  # NaN, infinities, zeros with a sign: bits are bits
        p.data = place(rng.integers(0, 1 << 32, p.shape, "uint32").view("float32"))
    models.save(own, tmp_path / "a")
    again = models.load(tmp_path / "a")
    assert type(again) is type(own) and again.config == own.config and bits(again) == bits(own)
    again.save(tmp_path / "b", max_shard_bytes=1500)
    assert bits(models.load(tmp_path / "b")) == bits(own)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first == second
    assert [first["architectures"], first["dtype"]] == [[architecture], "float32"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_what_transformers_wrote(architecture, tmp_path):
    """Names and shapes, none missing and none more; fields, also those that nothing here reads."""
    vectors = write_vectors(tmp_path / "a", architecture, config={"something_else": [1, {"a": None}]})
    models.save(models.load(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    first.pop("_name_or_path", None)  # where transformers had it from: not from there any more
    assert {name: second.get(name) for name in first} == first and second["something_else"] == [1, {"a": None}]
    assert open_state(tmp_path / "b" / "model.safetensors").metadata == {"format": "pt"}
    assert vectors["tensors"].keys() == open_state(tmp_path / "b" / "model.safetensors").shapes.keys()


def test_the_old_spelling_is_written_in_the_new_one(tmp_path):
    write_vectors(tmp_path, "BertModel", dtype="float32", config={"torch_dtype": "float64", "dtype": None})
    models.save(models.load(tmp_path), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["dtype"] == "float32" and "torch_dtype" not in fields


def test_labels_are_written(tmp_path):
    write_vectors(tmp_path, "BertForSequenceClassification")
    own = models.load(tmp_path, labels=["ham", "spam", "eggs"], problem_type="multi_label_classification")
    models.save(own, tmp_path / "b")
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    assert fields["id2label"] == {"0": "ham", "1": "spam", "2": "eggs"}
    assert fields["label2id"] == {"ham": 0, "spam": 1, "eggs": 2}
    again = models.load(tmp_path / "b")
    assert again.labels == own.labels and again.labels.problem_type == "multi_label_classification"


def test_over_the_file_that_it_was_loaded_from(tmp_path):
    """Its weights are views of that file: they are read while the new one is written. What else is there stays."""
    write_vectors(tmp_path, "GPT2LMHeadModel", dtype="float32")
    (tmp_path / "tokenizer.json").write_text("mine")
    own = models.load(tmp_path)
    before = bits(own)
    models.save(own, tmp_path)
    assert bits(own) == before == bits(models.load(tmp_path))
    optimizer = optim.SGD(own.parameters(), lr=0.1)
    ids, _ = batch("gpt2", "none")
    own.loss(ids, ids).backward()
    optimizer.step()
    models.save(own, tmp_path, max_shard_bytes=2000)
    assert not (tmp_path / "model.safetensors").exists() and bits(models.load(tmp_path)) == bits(own) != before
    models.save(own, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_adapters_are_not_part_of_a_model(tmp_path):
    """Refused while they are beside the weights or merged into them for a time; after bake they are weights."""
    ids, _ = batch("gpt2", "none")
    own = made("GPT2LMHeadModel").eval()
    lora.inject(own, lora.Config(r=2, target_modules=["c_attn"]), rng=0)
    own.h[1].attn.c_attn.lora_B.data[...] = 0.1
    for _ in range(2):
        with pytest.raises(StateError) as caught:
            models.save(own, tmp_path / "a")
        for text in ("extra    h.0.attn.c_attn.adapters.default.lora_A", "lora.bake(model)"):
            assert text in str(caught.value)
        assert not (tmp_path / "a").exists()
        if not any(module.holds_merged() for _, module in own.named_modules()):
            lora.merge(own)
    expected = own(ids).numpy()
    lora.bake(own)
    models.save(own, tmp_path / "a")
    again = models.load(tmp_path / "a")
    assert bits(again) == bits(own)
    np.testing.assert_allclose(again(ids).numpy(), expected, atol=1e-6)  # transposed views: products are summed otherwise


def test_what_is_no_model_of_ours(tmp_path):
    class Mine(nn.GPT2):
        pass

    config = made("GPT2LMHeadModel").config
    for other in (nn.Linear(2, 2), Mine(config), made("GPT2LMHeadModel").h[0], made("BertForMaskedLM").cls):
        with pytest.raises(DTypeError, match="expected a whole model of minilora.models"):
            models.save(other, tmp_path / "a")
    own = made("GPT2LMHeadModel")
    own.h[0].mlp.c_fc = nn.Linear(8, 5)
    own.extra = nn.Linear(2, 2)
    with pytest.raises(StateError) as caught:
        models.save(own, tmp_path / "a")
    for text in ("extra    extra.weight (2, 2)", "shape    h.0.mlp.c_fc.weight: expected (12, 8), got (5, 8)"):
        assert text in str(caught.value)
    own = made("GPT2LMHeadModel")
    own.h.pop()
    with pytest.raises(StateError, match="missing  h.1.ln_1.weight"):
        models.save(own, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    own = made("BertModel")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError):
        models.save(own, tmp_path / "file")
    models.save(own, tmp_path / "new" / "folders")
    assert type(models.load(tmp_path / "new" / "folders")) is nn.Bert


def test_an_error_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    own = made("BertModel")
    models.save(own, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", broken)
    with pytest.raises(KeyboardInterrupt):
        models.save(made("BertModel", rng=1), tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_model_made_on_a_device_is_saved_from_there(tmp_path, device):
    own = made("RobertaForSequenceClassification")
    models.save(own, tmp_path / "a")
    with minilora.use("cpu"):
        again = models.load(tmp_path / "a")
    assert bits(again) == bits(own)
    moved = models.load(tmp_path / "a", device=device)
    assert {p.device.name for p in moved.parameters()} == {device}
    ids, mask = batch("roberta", "left")
    np.testing.assert_allclose(fetch(moved(ids, attention_mask=mask)), again(ids, attention_mask=mask).numpy(), atol=1e-6)
