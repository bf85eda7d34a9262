"""An adapter of a model, saved in each dialect and loaded into another copy of the model: the same logits, to the bit."""
import numpy as np
import pytest

from minilora import formats, lora, nn, no_grad
from minilora.formats.adapters.registry import DIALECTS
from minilora.lora.layers.places import layers_of

IDS = np.arange(12).reshape(2, 6) % 7
WRITE = {"mlx": dict(num_layers=2), "diffusers": dict(component="transformer"), "gguf": dict(architecture="gpt2")}
READ = {"loralib": dict(lora_alpha=8)}


def gpt2():
    return nn.GPT2(nn.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=2, n_head=2), rng=0)


def logits(model):
    with no_grad():  # the trained model's adapter is trained, the loaded one's is not: attention then sums in another order
        return model(IDS).numpy()


@pytest.fixture
def trained():
    model = gpt2()
    lora.inject(model, lora.Config(r=2, lora_alpha=8, target_modules=["c_attn", "c_fc"]), rng=1)
    rng = np.random.default_rng(2)
    for layer in layers_of(model).values():
        layer.lora_B.data[...] = rng.normal(size=layer.lora_B.shape)
    return model


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_model_goes_through_each_dialect(tmp_path, trained, dialect):
    if dialect == "gguf":
        pytest.importorskip("gguf")
    notes = formats.save_adapter(trained, tmp_path / "a", dialect=dialect, **WRITE.get(dialect, {}))
    assert not any("rounded" in note for note in notes)
    model = gpt2()
    before = logits(model)
    report = formats.load_adapter(model, tmp_path / "a", **READ.get(dialect, {}))
    assert dialect in str(report) and np.array_equal(logits(model), logits(trained))
    assert not np.array_equal(before, logits(model))


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "loralib"])
def test_convolutions_and_their_lengths(tmp_path, dialect):
    def net():
        return nn.Sequential(nn.Conv2d(2, 4, 3, rng=0), nn.Conv2d(4, 3, 1, rng=1))

    model = net()
    lora.inject(model, lora.Config(r=2, lora_alpha=8, target_modules=["0", "1"], use_dora=dialect != "loralib"), rng=1)
    for layer in layers_of(model).values():
        layer.lora_B.data[...] = np.random.default_rng(2).normal(size=layer.lora_B.shape)
    formats.save_adapter(model, tmp_path / "a", dialect=dialect, **({"component": ""} if dialect == "diffusers" else {}))
    other, x = net(), np.random.default_rng(3).normal(size=(1, 2, 5, 5)).astype("float32")
    told = dict(lora_alpha=8, convolutions={"0": 3, "1": 1}) if dialect == "loralib" else {}
    formats.load_adapter(other, tmp_path / "a", **told)
    assert np.array_equal(model(x).numpy(), other(x).numpy())
