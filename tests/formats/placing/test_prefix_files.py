"""Prefixes and prompts in files: there and back, to be trained on, for another model, damaged."""
import json
import shutil

import numpy as np
import pytest

import minilora
from minilora import formats, lora, models, nn, train, tuners
from minilora.errors import ConfigError, FileError, FormatError, MiniloraError
from minilora.train.data.arrays import Arrays
from minilora.train.outcome import written

IDS = np.random.default_rng(0).integers(2, 19, (3, 6))


def gpt2(**more):
    return nn.GPT2(nn.GPT2Config(**{**dict(vocab_size=19, n_positions=24, n_embd=8, n_layer=2, n_head=2), **more}), rng=0)


CONFIGS = {"prefix": tuners.PrefixConfig(num_virtual_tokens=2), "prompt": tuners.PromptConfig(num_virtual_tokens=2),
           "mlp": tuners.PrefixConfig(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=3)}


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back(tmp_path, config, device):
    model = gpt2()
    tuners.inject(model, CONFIGS[config], "p", rng=1)
    formats.save_prefix(model, tmp_path / "p")
    formats.save_prefix(model, tmp_path / "p", "p")  # over itself
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"] + [
        "minilora_prefix.safetensors"] * (config == "mlp")
    state = formats.load_state(tmp_path / "p" / "adapter_model.safetensors")
    assert {name: a.shape for name, a in state.items()} == {"prompt_embeddings": (2, 8 if config == "prompt" else 32)}
    for trainable in (False, True):
        other = gpt2()
        report = formats.load_prefix(other, tmp_path / "p", "q", trainable=trainable)
        np.testing.assert_allclose(other(IDS).numpy(), model(IDS).numpy(), rtol=0, atol=1e-6)
        trained = sum(p.size for p in other.parameters() if p.trainable)
        assert trained == (sum(p.size for p in model.front.parameters()) if trainable else 0)
        assert "2 virtual tokens" in str(report) and ("MLP of 3" in str(report)) == (config == "mlp")
    assert str(formats.read_prefix(tmp_path / "p")) in str(report)
    formats.load_prefix(model, report.saved, "again")
    assert tuners.names(model) == ["p", "again"]
    with pytest.raises(FormatError, match="formats.load_prefix"):
        formats.load_adapter(gpt2(), tmp_path / "p")


def test_trained_on_with_its_mlp(tmp_path):
    """The same numbers as if training had not been interrupted by a file."""
    def step(model):
        optimizer = minilora.optim.SGD([p for p in model.parameters() if p.trainable], lr=0.1)
        model.loss(IDS, IDS).backward()
        optimizer.step()

    model = gpt2()
    tuners.inject(model, CONFIGS["mlp"], rng=1)
    step(model)
    formats.save_prefix(model, tmp_path / "p")
    other = gpt2()
    formats.load_prefix(other, tmp_path / "p", trainable=True)
    for one in (model, other):
        for p in one.parameters():
            p.grad = None
        step(one)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_classifier_goes_with_it(tmp_path):
    labels = models.Labels(["bad", "good"])
    config = nn.BertConfig(vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                           max_position_embeddings=24)
    for make, head in ((lambda seed: models.SentenceClassifier(nn.Bert(config, rng=0), labels, rng=seed), "classifier"),
                       (lambda seed: models.GPT2Classifier(gpt2().config, labels, rng=0), "score")):
        model = make(0)
        tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2, task_type="SEQ_CLS"), rng=1)
        getattr(model, head).weight.data[...] += 1.0
        formats.save_prefix(model, tmp_path / head)
        keys = set(formats.load_state(tmp_path / head / "adapter_model.safetensors"))
        own = {f"base_model.{head}.{name}" for name, _ in getattr(model, head).named_parameters()}
        assert keys == {"prompt_embeddings"} | own
        other = make(5)
        assert formats.load_prefix(other, tmp_path / head, trainable=True).heads
        np.testing.assert_array_equal(other(IDS).numpy(), model(IDS).numpy())
        assert getattr(other, head).weight.trainable


def test_a_run_writes_both(tmp_path):
    """`fit` trains a prefix and LoRA together on a frozen base, and leaves each as a folder of its own."""
    model = gpt2()
    tuners.inject(model, CONFIGS["mlp"], "p", rng=1)
    lora.inject(model, lora.Config(r=2, target_modules=["c_attn"]), "l", rng=1)
    before = {name: a.copy() for name, a in model.state_dict().items()}
    data = Arrays(ids=IDS, labels=IDS)
    train.fit(model, data, train.Settings(steps=3, batch_size=3, learning_rate=0.01), folder=tmp_path / "run", quiet=True)
    moved = {name for name, a in model.state_dict().items() if (a != before[name]).any()}
    assert all(name.startswith("front.own.p.") or ".adapters.l." in name for name in moved) and len(moved) >= 7
    other = gpt2()
    formats.load_prefix(other, tmp_path / "run" / "p")
    formats.load_adapter(other, tmp_path / "run" / "l")
    np.testing.assert_allclose(other(IDS).numpy(), model(IDS).numpy(), rtol=0, atol=1e-6)
    alone = gpt2()
    tuners.inject(alone, CONFIGS["prefix"], rng=1)
    assert written(alone, tmp_path / "alone") == []
    assert (tmp_path / "alone" / "adapter_config.json").is_file()


@pytest.fixture
def saved(tmp_path):
    model = gpt2()
    tuners.inject(model, CONFIGS["mlp"], rng=1)
    formats.save_prefix(model, tmp_path / "p")
    return tmp_path / "p"


def with_settings(folder, **changes):
    path = folder / "adapter_config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(("sizes", "text"), [
    (dict(n_layer=3), "num_layers: 2, and this model has 3"),
    (dict(n_head=4), "num_attention_heads: 2, and this model has 4"),
    (dict(n_embd=12), "token_dim: 8, and this model has 12 .2 key and value heads of 6"),
    (dict(n_layer=1, n_head=1), "num_layers.*\n.*num_attention_heads")])
def test_for_another_model(saved, sizes, text):
    model = gpt2(**sizes)
    with pytest.raises(FormatError, match=text):
        formats.load_prefix(model, saved)
    assert model.front is None


@pytest.mark.parametrize(("changes", "text"), [
    (dict(num_layers=3), r"expected \(2, 48\) = \(N, 2 num_layers token_dim\)"), (dict(num_virtual_tokens=...), "missing"),
    (dict(num_virtual_tokens=2.5), "num_virtual_tokens must be an int"), (dict(num_virtual_tokens=True), "must be an int"),
    (dict(num_attention_heads=3), "no multiple"), (dict(token_dim=None), "token_dim: missing"),
    (dict(num_transformer_submodules=2), "an encoder and a decoder"), (dict(magic=1), "no such setting"),
    (dict(peft_type="P_TUNING"), "no prefix and no prompt"), (dict(peft_type=["x"]), "no prefix and no prompt"),
    (dict(encoder_hidden_size=4), r"hidden_weight.*expected \(4, 8\)"), (dict(prefix_projection="yes"), "True or False")])
def test_contradictions(saved, changes, text):
    model = gpt2()
    with pytest.raises(FormatError, match=text):
        formats.load_prefix(model, with_settings(saved, **changes))
    assert model.front is None
    if "magic" in changes:
        assert "off: magic" in str(formats.read_prefix(with_settings(saved, magic=None)))


def test_damaged_tensors(saved, tmp_path):
    tensors = dict(formats.load_state(saved / "adapter_model.safetensors"))
    P = tensors["prompt_embeddings"]
    for name, state, text in [("nan", {"prompt_embeddings": P * np.float32("nan")}, "64 NaN"),
                              ("none", {"x": P}, "missing: expected"),
                              ("more", {**tensors, "h.0.lora_A": P}, "neither prompt_embeddings"),
                              ("flat", {"prompt_embeddings": P[0]}, r"expected \(2, 32\)"),
                              ("ints", {"prompt_embeddings": P.astype("int32")}, "int32: expected one of"),
                              ("head", {**tensors, "base_model.score.weight": P}, "no such parameters")]:
        folder = shutil.copytree(saved, tmp_path / name)
        formats.save_state(folder / "adapter_model.safetensors", state, {"format": "pt"})
        model = gpt2()
        with pytest.raises(FormatError, match=text):
            formats.load_prefix(model, folder)
        assert model.front is None
    folder = shutil.copytree(saved, tmp_path / "other")
    formats.save_state(folder / "adapter_model.safetensors", {"prompt_embeddings": P + 1}, {"format": "pt"})
    with pytest.raises(FormatError, match="not saved together"):
        formats.load_prefix(gpt2(), folder, trainable=True)
    formats.load_prefix(gpt2(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="no adapter_config.json"):
        formats.load_prefix(gpt2(), folder)
    with pytest.raises(FileError):
        formats.load_prefix(gpt2(), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="say which|no prefix"):
        formats.save_prefix(gpt2(), tmp_path / "empty")
    model = gpt2()
    lora.inject(model, lora.Config(r=2, target_modules=["c_attn"]), rng=0)
    formats.save_adapter(model, tmp_path / "lora")
    with pytest.raises(FormatError, match="load_adapter"):
        formats.load_prefix(gpt2(), tmp_path / "lora")


def test_spoiled_bytes_are_refused_or_harmless(saved, tmp_path):
    """Whatever is damaged: an error of ours, a model as before, or the numbers that the file then says."""
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = shutil.copytree(saved, tmp_path / str(i))
        path = folder / ["adapter_model.safetensors", "adapter_config.json", "minilora_prefix.safetensors"][i % 3]
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, len(data) if i % 2 else min(len(data), 200), 3):
            data[at] = rng.integers(256)
        path.write_bytes(bytes(data[:len(data) - int(rng.integers(0, 5)) * (i % 5 == 0)]))
        model = gpt2()
        try:
            formats.load_prefix(model, folder, trainable=True, allow_nonfinite=True)
        except MiniloraError:
            assert model.front is None


def test_a_prompt_of_pefts_for_an_encoders_classes(tmp_path):
    config = nn.BertConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                           max_position_embeddings=24)
    model = models.BertClassifier(config, models.Labels(2), rng=0)
    tuners.inject(model, tuners.PromptConfig(num_virtual_tokens=2, task_type="SEQ_CLS"), rng=0)
    formats.save_prefix(model, tmp_path / "p")
    other = models.BertClassifier(config, models.Labels(2), rng=0)
    formats.load_prefix(other, tmp_path / "p")
    np.testing.assert_array_equal(other(IDS).numpy(), model(IDS).numpy())
    state = dict(formats.load_state(tmp_path / "p" / "adapter_model.safetensors"))
    formats.save_state(tmp_path / "p" / "adapter_model.safetensors", state, {"format": "pt"})
    with pytest.raises(FormatError, match="first vector of the prompt"):
        formats.load_prefix(models.BertClassifier(config, models.Labels(2), rng=0), tmp_path / "p")
