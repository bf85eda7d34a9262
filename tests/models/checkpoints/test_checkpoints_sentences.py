"""Classifiers of texts on a sentence encoder: loaded from an encoder's folder, saved, read again; and their adapters."""
import json

import numpy as np
import pytest
from checkpoint_cases import batch, write_vectors

from minilora import formats, lora, models, nn, optim
from minilora.errors import ConfigError, FileError, FormatError, StateError

IDS, MASK = batch("bert", "right")
HEAD = dict(head="sentence_classification", labels=["bad", "good"], rng=3)


@pytest.fixture
def folder(tmp_path):
    """A sentence encoder of two layers."""
    write_vectors(tmp_path / "body", "BertModel")
    models.save(models.SentenceEncoder(models.load(tmp_path / "body"), "mean", True, 5), tmp_path / "encoder")
    return tmp_path / "encoder"


def bits(model):
    return model(IDS, key_padding=MASK).numpy().tobytes()


def test_from_an_encoder_s_folder(folder):
    own = models.load(folder, **HEAD)
    assert type(own) is models.SentenceClassifier and not own.training
    assert (own.labels.names, own.pooling, own.max_tokens, own.body.pooler) == (("bad", "good"), "mean", 5, None)
    assert own.origin.notes[-1] == "drawn, because the file has no such head: classifier.weight, classifier.bias"
    assert bits(own) == bits(models.load(folder, **HEAD)) != bits(models.load(folder, **{**HEAD, "rng": 4}))
    assert {p.dtype.name for p in own.parameters()} == {"float64"}
    assert {p.dtype.name for p in models.load(folder, dtype="float32", **HEAD).parameters()} == {"float32"}
    plain = models.load(folder.parent / "body", **HEAD)  # without modules.json: the mean
    assert bits(plain) == bits(own) and plain.max_tokens is None
    assert type(models.load(folder)) is models.SentenceEncoder


def test_saved_and_read_again(folder, tmp_path):
    own = models.load(folder, **HEAD, problem_type="single_label_classification")
    for target in (tmp_path / "saved", folder):  # a new folder, and over the encoder's own
        own.save(target)
        again = models.load(target)
        assert type(again) is models.SentenceClassifier and again.labels == own.labels and bits(again) == bits(own)
        assert not any(note.startswith("drawn") for note in again.origin.notes)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    assert [one["type"].rpartition(".")[2] for one in json.loads((folder / "modules.json").read_text())] == [
        "Transformer", "Pooling", "Dense"]
    assert type(models.load(folder, head="base")) is nn.Bert
    with pytest.raises(FormatError, match='head="sentence_classification"'):
        models.load(folder, head="sentences")


@pytest.mark.parametrize("change, text", [
    ({"out_features": 3}, "out_features is 3, expected 2"), ({"bias": False}, "bias is False, expected True"),
    ({"bias": 1}, "bias is 1, expected True"),
    ({"activation_function": "torch.nn.modules.activation.Tanh"}, "activation_function is"),
    ({"in_features": None}, "in_features is None"),
])
def test_a_dense_that_is_no_classifier(change, text, folder):
    models.load(folder, **HEAD).save(folder)
    path = folder / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError) as caught:
        models.load(folder)
    assert text in str(caught.value)


def test_a_dense_with_other_tensors(folder):
    models.load(folder, **HEAD).save(folder)
    path = folder / "2_Dense" / "model.safetensors"
    formats.save_state(path, {"linear.weight": np.zeros((8, 2)), "more": np.zeros(1)})
    with pytest.raises(FormatError) as caught:
        models.load(folder)
    for text in ("linear.weight: expected (2, 8), got (8, 2)", "linear.bias: expected (2,), got None", "more: unexpected"):
        assert text in str(caught.value)
    formats.save_state(path, {"linear.weight": np.zeros((2, 8), "int64"), "linear.bias": np.zeros(2)})
    with pytest.raises(FormatError, match="linear.weight: expected numbers of a float, got I64"):
        models.load(folder)
    with pytest.raises(FormatError, match="4 classes"):
        models.load(folder, labels=4)
    path.unlink()
    with pytest.raises(FileError):
        models.load(folder)


def test_labels_that_are_none(folder):
    with pytest.raises(ConfigError, match="labels must be"):
        models.load(folder, head="sentence_classification", labels=[])
    with pytest.raises(ConfigError, match="labels and problem_type are for classifiers"):
        models.load(folder, labels=2)


def trained(folder, targets):
    own = models.load(folder, **HEAD)
    lora.inject(own, lora.Config(r=2, target_modules=targets, modules_to_save=["classifier"]), rng=0)
    optimizer = optim.Adam(own.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        own(IDS, [0, 1], MASK).backward()
        optimizer.step()
    return own


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"], "all-linear"])
def test_adapters_have_the_names_of_the_encoder_alone(targets, folder, tmp_path):
    own = trained(folder, targets)
    formats.save_adapter(own, tmp_path / "adapter")
    saved = formats.read_adapter(tmp_path / "adapter")
    assert all(path.startswith("encoder.layer.") for path in saved.updates)
    assert set(saved.saved) == {"classifier.weight", "classifier.bias"}
    again = models.load(folder, **{**HEAD, "rng": 7})
    formats.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(IDS, key_padding=MASK).numpy(), own(IDS, key_padding=MASK).numpy(), atol=1e-12)


def test_an_encoder_s_adapters_have_them_too(folder, tmp_path):
    encoder = models.load(folder)
    lora.inject(encoder, lora.Config(r=2, target_modules=["query"], init_lora_weights=False), rng=0)
    formats.save_adapter(encoder, tmp_path / "adapter")
    assert all(path.startswith("encoder.layer.") for path in formats.read_adapter(tmp_path / "adapter").updates)
    again = models.load(folder)
    formats.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(IDS).numpy(), encoder(IDS).numpy(), atol=1e-12)
    body = models.load(folder, head="base")
    formats.load_adapter(body, tmp_path / "adapter")


def test_a_model_with_an_adapter_is_baked_before_it_is_saved(folder, tmp_path):
    own = trained(folder, ["query"])
    with pytest.raises(StateError, match="bake"):
        own.save(tmp_path / "saved")
    head = models.load(folder, **HEAD)
    head.classifier = nn.Linear(8, 3, dtype="float64", rng=0)
    with pytest.raises(StateError, match="beside the encoder expected"):
        head.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    before = own(IDS, key_padding=MASK).numpy()
    lora.bake(own)
    own.save(tmp_path / "saved")
    np.testing.assert_allclose(models.load(tmp_path / "saved")(IDS, key_padding=MASK).numpy(), before, atol=1e-12)
