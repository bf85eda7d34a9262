"""Folders that PEFT wrote, stored byte for byte: their updates are those that PEFT computes, and nothing is lost on writing.

Made by tests/data/make_peft_folders.py. More of them, drawn: tests/parity/test_peft_files.py.
"""
from pathlib import Path

import numpy as np
import pytest

from minilora.formats.adapters.reading import read_adapter
from minilora.formats.adapters.writing import write_adapter
from minilora.formats.tensors.reading import open_state
from minilora.lora.gradient import delta

STORED = Path(__file__).parents[2] / "data" / "peft_folders.npz"
CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")
# What each folder holds beside its updates: saved, biases, tokens; and a word from each note.
HOLDS = {
    "kinds": ([], [], [], []), "dora": ([], [], [], []), "rslora": ([], [], [], []), "lora_bias": ([], [], [], []),
    "biases": ([], ["lin.bias"], [], []),
    "all_biases": (["head.bias", "head.weight", "pre_head.bias", "pre_head.weight"],
                   ["att.out_proj.bias", "conv1.bias", "conv2.bias", "conv3.bias", "lin.bias", "ln.bias"], [],
                   ["head.original_module.bias: the base's own", "pre_head.original_module.bias: the base's own"]),
    "attention": ([], [], [], []), "tokens": ([], [], ["wte"], []), "half": ([], [], [], []), "eva": ([], [], [], []),
    "gpt2_classifier": (["score.weight"], [], [], []),
    "distilbert_classifier": ([
        "classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"], [], [], []),
    "llama_embedding": (["model.embed_tokens.weight"], [], [], ["saved beside its update"]),
    "llama_tokens": ([], [], ["model.embed_tokens"], []),
}


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(params=HOLDS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, stored, tmp_path):
    for file in FILES:
        (tmp_path / file).write_bytes(stored[f"{name}/{file}"].tobytes())
    return tmp_path


def test_every_stored_folder_is_looked_at(stored):
    assert {key.split("/")[0] for key in stored} == {*HOLDS, "versions"}


def test_the_updates_are_those_of_peft(name, folder, stored):
    adapter = read_adapter(folder)
    of_peft = {key.split("/")[2]: value for key, value in stored.items() if key.startswith(f"{name}/s/")}
    assert {path: update.s for path, update in adapter.updates.items()} == {path: float(s) for path, s in of_peft.items()}
    for path, update in adapter.updates.items():
        A, B = (array.astype("float32").reshape(len(array), -1) for array in (update.A, update.B))
        D, expected = delta(A, B, update.s), stored.get(f"{name}/D/{path}")
        if expected is not None:
            turned = update.kind == "embedding" or adapter.config.fan_in_fan_out
            np.testing.assert_allclose(D, expected.T if turned else expected.reshape(D.shape), rtol=1e-5, atol=1e-6)


def test_what_it_holds_beside(name, folder):
    adapter = read_adapter(folder)
    saved, biases, tokens, notes = HOLDS[name]
    assert (sorted(adapter.saved), sorted(adapter.biases), sorted(adapter.tokens)) == (saved, biases, tokens)
    assert len(adapter.notes) == len(notes) and all(word in note for word, note in zip(notes, adapter.notes))
    assert all((update.magnitude is not None) == (name == "dora") for update in adapter.updates.values())
    assert all((update.bias is not None) == (name == "lora_bias") for update in adapter.updates.values())
    if name == "half":
        assert adapter.updates["lin"].A.dtype == "float16" and adapter.config.revision == "main"


def test_nothing_is_lost(name, folder):
    write_adapter(read_adapter(folder), folder / "again")
    assert (folder / "again" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    theirs, ours = open_state(folder / TENSORS), open_state(folder / "again" / TENSORS)
    dropped = {key for key in theirs if "head.modules_to_save." in key or "head.original_module." in key}
    assert ours.keys() == theirs.keys() - dropped and bool(dropped) == (name == "all_biases")
    assert ours.metadata == theirs.metadata == {"format": "pt"}
    for key, array in ours.items():
        assert array.dtype == theirs[key].dtype and array.shape == theirs[key].shape
        assert array.tobytes() == theirs[key].tobytes(), key
    if not dropped:
        assert (folder / "again" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
