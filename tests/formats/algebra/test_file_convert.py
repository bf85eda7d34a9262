"""`formats.convert`: there and back through every pair of dialects, on folders that PEFT wrote; and what it refuses."""
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import oracle
from minilora import formats
from minilora.errors import ConfigError, FormatError
from minilora.formats.algebra.convert import renamed
from minilora.formats.placing.fingerprint import KEY

STORED = Path(__file__).parents[2] / "data" / "peft_folders.npz"
DIALECTS = ("peft", "loralib", "mlx", "kohya", "diffusers")
# What each stored folder can be said in, besides PEFT's: see the table of docs/dialects.md.
EVERY = {"loralib", "mlx", "kohya", "diffusers"}
SAYS = {
    "kinds": set(), "kinds lin emb": {"loralib", "mlx"}, "kinds lin conv1 conv2 conv3": {"kohya", "diffusers"}, "dora": set(),
    "dora lin": {"mlx", "kohya", "diffusers"}, "dora lin conv2": {"kohya", "diffusers"}, "rslora": EVERY,
    "lora_bias": {"diffusers"}, "biases": {"loralib"}, "all_biases": set(), "attention": EVERY, "tokens": set(), "half": EVERY,
    "eva": EVERY, "gpt2_classifier": set(), "distilbert_classifier": set(), "llama_embedding": set(), "llama_tokens": set(),
}


def writing(to):
    return {"loralib": {"lora_alpha": 8, "fold": True}, "mlx": {"fold": True, "pad": True, "tied": False},
            "kohya": {"fold": True}, "diffusers": {"component": ""}}.get(to, {})


def reading(dialect, adapter):
    if dialect == "kohya":
        return {"modules": list(adapter.updates)}
    if dialect == "loralib":
        return {"lora_alpha": 8, "embeddings": [p for p, u in adapter.updates.items() if u.kind == "embedding"],
                "convolutions": {p: u.A.shape[-1] for p, u in adapter.updates.items() if u.kind == "convolution"}}
    return {}


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", SAYS)
def test_there_and_back_by_every_pair(name, stored, tmp_path):
    name, *only = name.split()
    says, source = SAYS[" ".join([name, *only])], tmp_path / "source"
    source.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (source / file).write_bytes(stored[f"{name}/{file}"].tobytes())
    adapter = formats.read_adapter(source)
    if only:
        updates = {path.replace("emb", "embed_tokens"): adapter.updates[path] for path in only}  # mlx knows tables by name
        adapter = dataclasses.replace(adapter, updates=updates, saved={}, biases={}, tokens={})
        formats.write_adapter(adapter, source)
    said, at = {"peft"}, {"peft": source}
    for to in DIALECTS[1:]:
        try:
            formats.convert(source, tmp_path / to, to, **writing(to))
        except FormatError as error:  # each part that has no place, with the way out
            assert "write_adapter" in str(error) and (" problem" in str(error)), error
            assert not (tmp_path / to).exists()
        else:
            said.add(to)
            at[to] = tmp_path / to
    assert said - {"peft"} == says
    pairs = itertools.permutations(sorted(said), 2)
    for first, second in [("peft", to) for to in says] if name in ("half", "eva") else pairs:  # as rslora, with other numbers
        there, back = tmp_path / f"{first}-{second}", tmp_path / f"{first}-{second}-peft"
        formats.convert(at[first], there, second, reading=reading(first, adapter), **writing(second))
        formats.convert(there, back, "peft", reading=reading(second, adapter))
        found = formats.difference(adapter, formats.read_adapter(back), tolerance=1e-6 if name != "half" else 1e-3)
        assert found.same, (first, second, str(found))


def test_other_names(tmp_path):
    rng = np.random.default_rng(0)
    adapter = dataclasses.replace(oracle.adapter(rng), biases={"h.0.attn.bias": np.ones(7, "float32")},
                                  saved={"h.2.head.weight": np.ones((2, 3), "float32")},
                                  metadata={KEY: json.dumps({"version": 1}), "author": "me"})
    adapter = oracle.with_settings(adapter, bias="lora_only", modules_to_save=["h.2.head"])
    moved = renamed(adapter, {"h.": "model.layers."})
    assert sorted(moved.updates) == ["model.layers.0.attn", "model.layers.0.mlp"]
    assert list(moved.biases) == ["model.layers.0.attn.bias"] and list(moved.saved) == ["model.layers.2.head.weight"]
    assert moved.metadata == {"author": "me"}  # a fingerprint speaks of the old names
    assert renamed(adapter, None) is adapter
    formats.write_adapter(moved, tmp_path / "moved")
    again = formats.read_adapter(tmp_path / "moved")
    assert [u.s for u in again.updates.values()] == [u.s for u in moved.updates.values()]
    assert list(again.saved) == ["model.layers.2.head.weight"]
    with pytest.raises(FormatError, match="both become"):
        renamed(adapter, {"h.0.attn": "fc", "h.0.mlp": "fc"})
    with pytest.raises(ConfigError, match="start of no path"):
        renamed(adapter, {"transformer.": ""})


def test_a_base_that_was_moved_is_said_in_peft_alone(tmp_path):
    adapter = oracle.with_settings(oracle.adapter(np.random.default_rng(0)), init_lora_weights="pissa")
    formats.write_adapter(adapter, tmp_path / "pissa")
    for to in DIALECTS[1:]:
        with pytest.raises(FormatError, match="pissa.*save_adapter"):
            formats.convert(tmp_path / "pissa", tmp_path / "out", to)
    formats.convert(tmp_path / "pissa", tmp_path / "again", "peft")
    assert formats.read_adapter(tmp_path / "again").config.init_lora_weights == "pissa"


def test_a_fingerprint_goes_along(tmp_path):
    adapter = oracle.adapter(np.random.default_rng(0))
    said = {"version": 1, "base": "b", "tensors": {path: {"sha256": "c"} for path in adapter.updates}, "rule": "alpha / r",
            "s": {path: update.s for path, update in adapter.updates.items()}}
    formats.write_adapter(dataclasses.replace(adapter, metadata={KEY: json.dumps(said)}), tmp_path / "one")
    formats.convert(tmp_path / "one", tmp_path / "two.safetensors", "kohya")
    formats.convert(tmp_path / "two.safetensors", tmp_path / "three", "peft", reading={"modules": list(adapter.updates)})
    back = json.loads(formats.read_adapter(tmp_path / "three").metadata[KEY])
    assert back["tensors"] == said["tensors"] and back["s"] == said["s"]
