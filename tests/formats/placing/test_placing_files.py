"""Adapters through folders on the disk, by the public names; and rows of embeddings in files."""
import json

import numpy as np
import pytest

import minilora
from minilora import formats, lora, nn, optim
from minilora.errors import ConfigError, FileError, FormatError
from minilora.formats import SavedAdapter, TokenRows, Update

pytest.importorskip("safetensors")

IDS = [[1, 4, 2], [0, 3, 3]]


class Net(nn.Module):
    def __init__(self, seed=0, dtype="float32"):
        made = dict(dtype=dtype, rng=np.random.default_rng(seed))
        self.emb, self.layers = nn.Embedding(6, 4, **made), [nn.Linear(4, 4, **made), nn.Linear(4, 4, **made)]
        self.score = nn.Linear(4, 2, **made)

    @property
    def embedding(self):
        return self.emb

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


def trained(**settings):
    """A model with an adapter of every part, after three steps."""
    model = Net()
    settings = {**dict(r=2, lora_alpha=3, target_modules=["layers.0", "layers.1"], rank_pattern={"1": 4}, use_rslora=True,
                       modules_to_save=["score"], trainable_token_indices=[4, 1], lora_dropout=0.25), **settings}
    lora.inject(model, lora.Config(**settings), "one", rng=0)
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        y = model(IDS)
        (y * y).sum().backward()
        optimizer.step()
    return model.eval()


SETTINGS = {
    "all parts": {}, "dora": dict(use_dora=True), "lora_bias": dict(lora_bias=True), "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only", modules_to_save=None), "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora", use_rslora=False), "tokens by name": dict(trainable_token_indices={"emb": [0, 5]}),
    "table": dict(target_modules=["emb", "layers.0", "layers.1"], trainable_token_indices=None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_out_and_in_again(name, tmp_path):
    model = trained(**SETTINGS[name])
    formats.save_adapter(model, tmp_path / "a")
    again = Net().eval()
    report = formats.load_adapter(again, tmp_path / "a", "again")
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert report.fingerprint.startswith("the base is") and report.source == f"{tmp_path / 'a'} (peft)"
    config = again.layers[0].adapters["again"].config
    assert config.lora_dropout == again.layers[0].adapters["again"].lora_dropout.p == 0.25
    formats.save_adapter(again, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_pissa_doubles_its_rank_and_its_alpha(tmp_path):
    for use_rslora, alpha in ((False, 6.0), (True, 3 / 2 ** 0.5 * 2)):
        model = trained(init_lora_weights="pissa", use_rslora=use_rslora, rank_pattern={}, modules_to_save=None,
                        trainable_token_indices=None)
        formats.save_adapter(model, tmp_path / "p")
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"], config["use_rslora"]) == (4, True, use_rslora)
        assert config["lora_alpha"] == pytest.approx(alpha, rel=1e-12) and config["rank_pattern"] == {}


def test_rows_of_a_table_by_hand():
    E, rows = np.arange(24.0, dtype="float32").reshape(6, 4), np.full((2, 4), -1, "float16")
    model = Net()
    model.emb.weight.data = E.copy()
    update = Update("linear", np.zeros((1, 4), "float32"), np.zeros((4, 1), "float32"), 1.0)
    saved = SavedAdapter({"layers.0": update}, lora.Config(r=1, target_modules=["layers.0"], trainable_token_indices=[5, 0]),
                         tokens={"emb": TokenRows((5, 0), rows)})
    report = formats.load_adapter(model, saved)
    assert report.tokens == {"emb": (5, 0)} and "rows of emb: 5, 0" in str(report)
    expected = E.copy()
    expected[[5, 0]] = -1
    np.testing.assert_array_equal(model.emb(np.arange(6)).data, expected)
    assert model.emb.current.rows.dtype == "float32"
    np.testing.assert_array_equal(model.emb.original.weight.data, E)


@pytest.mark.parametrize("tokens, words", [
    ({"emb": TokenRows((6,), np.ones((1, 4)))}, "got 6"), ({"emb": TokenRows((1, 1), np.ones((2, 4)))}, "comes twice"),
    ({"emb": TokenRows((1,), np.ones((1, 3)))}, r"expected rows \(1, 4\), got \(1, 3\)"),
    ({"emb": TokenRows((1,), np.full((1, 4), np.nan))}, "emb.rows: 4 of 4"),
    ({"layers.1": TokenRows((1,), np.ones((1, 4)))}, "got Linear"),
    ({"table": TokenRows((1,), np.ones((1, 4)))}, "table"),
])
def test_rows_that_do_not_fit(tokens, words):
    update = Update("linear", np.ones((1, 4)), np.ones((4, 1)), 1.0)
    saved = SavedAdapter({"layers.0": update}, lora.Config(r=1, target_modules=["layers.0"]), tokens=tokens)
    model = Net()
    with pytest.raises(FormatError, match=words):
        formats.load_adapter(model, saved)
    assert type(model.emb) is nn.Embedding and type(model.layers[0]) is nn.Linear


def test_rows_and_an_update_of_one_table():
    update = Update("embedding", np.ones((1, 6)), np.ones((4, 1)), 1.0)
    saved = SavedAdapter({"emb": update}, lora.Config(r=1, target_modules=["emb"]),
                         tokens={"emb": TokenRows((1,), np.ones((1, 4)))})
    with pytest.raises(FormatError, match="it can be one"):
        formats.load_adapter(Net(), saved)


def test_a_longer_table_beside_its_update_becomes_the_bases_by_the_line_in_the_error(tmp_path):
    """PEFT saves the whole table where the vocabulary grew and the table has an update."""
    A, B, table = np.ones((1, 8), "float32"), np.ones((4, 1), "float32"), np.arange(32, dtype="float32").reshape(8, 4)
    saved = SavedAdapter({"emb": Update("embedding", A, B, 1.0)}, lora.Config(r=1, lora_alpha=1, target_modules=["emb"]),
                         saved={"emb.weight": table})
    formats.write_adapter(saved, path := tmp_path / "a")
    model = Net()
    with pytest.raises(FormatError) as caught:
        formats.load_adapter(model, path)
    line = str(caught.value).split("If it is to be the base's: ")
    assert len(line) == 2, str(caught.value)
    exec(line[1].splitlines()[0], {"minilora": minilora, "path": path, "model": model})
    formats.load_adapter(model, path)
    np.testing.assert_array_equal(model.emb(np.arange(8)).data, table + 1)


def test_saving_again_over_the_file_just_loaded(tmp_path):
    model = trained()
    formats.save_adapter(model, tmp_path / "a")
    again = Net().eval()
    formats.load_adapter(again, tmp_path / "a")
    formats.save_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    last = Net().eval()
    formats.load_adapter(last, tmp_path / "a")
    np.testing.assert_array_equal(last(IDS).data, model(IDS).data)


def test_a_folder_of_several_and_read_first(tmp_path):
    formats.save_adapter(trained(), tmp_path / "all" / "one")
    formats.save_adapter(trained(use_dora=True), tmp_path / "all" / "two")
    model = Net().eval()
    formats.load_adapter(model, tmp_path / "all" / "one", "one")
    formats.load_adapter(model, formats.read_adapter(tmp_path / "all", name="two"), "two")
    np.testing.assert_array_equal(model(IDS).data, trained(use_dora=True)(IDS).data)


def test_other_dialects_and_options_are_passed_on(tmp_path):
    model = Net()
    lora.inject(model, lora.Config(r=2, lora_alpha=3, target_modules=["layers.0", "layers.1"]), "one", rng=0)
    model.layers[0].lora_B.data += 1
    with pytest.raises(ConfigError, match="dialect"):
        formats.save_adapter(model, tmp_path / "x", dialect="none")
    with pytest.raises(FileError):
        formats.load_adapter(Net(), tmp_path / "nothing")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dialect, written, read", [
    ("peft", {}, {}), ("kohya", {}, {}), ("mlx", {}, {}), ("loralib", {}, dict(lora_alpha=3)),
    ("diffusers", dict(component="unet"), {})])
def test_every_dialect_into_a_model(tmp_path, dialect, written, read):
    """kohya's names have no dots: the model's modules tell where they were."""
    model = Net()
    lora.inject(model, lora.Config(r=2, lora_alpha=3, target_modules=["layers.0", "layers.1"]), "one", rng=0)
    for layer in model.layers:
        layer.lora_B.data += 0.5
    formats.save_adapter(model, tmp_path / "a", dialect=dialect, **written)
    again = Net()
    mapping = {"unet.": ""} if dialect == "diffusers" else None
    report = formats.load_adapter(again, tmp_path / "a", mapping=mapping, **read)
    np.testing.assert_allclose(again(IDS).data, model(IDS).data, rtol=1e-5)
    assert dialect in report.source and len(report.layers) == 2


def test_gpt2_is_written_for_peft_under_the_names_of_transformers(tmp_path):
    model = nn.GPT2(nn.GPT2Config(vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2), rng=0)
    lora.inject(model, lora.Config(r=1, target_modules=["c_attn", "wte"]), rng=0)
    formats.save_adapter(model, tmp_path / "a")
    assert [*formats.read_adapter(tmp_path / "a").updates] == ["lm_head", "transformer.h.0.attn.c_attn", "transformer.wte"]
    formats.save_adapter(model, tmp_path / "b", mapping={"": "x."})
    assert [*formats.read_adapter(tmp_path / "b").updates] == ["x.h.0.attn.c_attn", "x.lm_head", "x.wte"]
    assert [*formats.saved_adapter(model).updates] == ["wte", "h.0.attn.c_attn", "lm_head"]


def test_nan_in_a_file_is_refused_and_taken_if_asked(tmp_path):
    model = trained()
    model.layers[0].lora_B.data[0, 0] = np.nan
    formats.save_adapter(model, tmp_path / "a")
    before = Net()
    with pytest.raises(FormatError, match="layers.0"):
        formats.load_adapter(before, tmp_path / "a")
    assert type(before.layers[0]) is nn.Linear
    formats.load_adapter(before, tmp_path / "a", allow_nonfinite=True)
    assert np.isnan(before(IDS).data).any()


def test_the_public_names_are_lazy():
    assert formats.load_adapter is minilora.formats.placing.loading.load_adapter
    assert {"load_adapter", "save_adapter", "read_adapter", "saved_adapter"} <= set(dir(formats))
