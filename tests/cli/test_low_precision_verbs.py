"""Bases in low precision on the command line: made, trained beside, merged into, looked at."""
import json
import sys

import numpy as np
import pytest

from minilora import formats, models
from minilora.cli.main import main


def run(capsys, *words, code=0):
    assert main([str(word) for word in words]) == code, capsys.readouterr()
    return capsys.readouterr()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take a second each, and are not what this is about."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


@pytest.fixture
def four(there, capsys):
    run(capsys, "quantize", "base", "-o", "four", "--quiet")
    return there / "four"


def test_quantize_and_back(there, capsys):
    words = ["quantize", "base", "-o", "four", "--kind", "fp4", "--no-double", "--skip", "mlp", "--json"]
    said = json.loads(run(capsys, *words).out)
    assert (said["kind"], said["double"], len(said["weights"]), said["written"]) == ("fp4", False, 8, True)
    assert 0.05 < said["error"] < 0.2 and said["bits"] >= 4.5 and {group["layers"] for group in said["groups"]} == {2}
    assert (there / "four" / "tokenizer.json").read_bytes() == (there / "base" / "tokenizer.json").read_bytes()
    assert "exists" in run(capsys, "quantize", "base", "-o", "four", code=1).err
    assert "quantised already" in run(capsys, "quantize", "four", "-o", "x", code=1).err
    both = ["--dequantize", "float32", "--kind", "fp4"]
    assert "takes the codes as they are" in run(capsys, "quantize", "four", "-o", "x", *both, code=2).err
    out = run(capsys, "quantize", "four", "-o", "back", "--dequantize", "float32").out
    assert "decoded from 4 bits to float32" in out and "written: back" in out
    np.testing.assert_allclose(models.load("back")([[1, 2]]).data, models.load("four")([[1, 2]]).data, atol=1e-6)
    assert "is not in 4 bits" in run(capsys, "quantize", "base", "-o", "x", "--dequantize", "float32", code=1).err
    assert "bits a weight" in run(capsys, "quantize", "base", "-o", "x", "--dry-run").out and not (there / "x").exists()


def test_what_is_told_of_a_base_in_four_bits(four, capsys):
    out = run(capsys, "inspect", four, "--numbers").out
    assert "3,840 NF4" in out and "bits a weight" in out and "16 x 24" in out and "absmax" not in out
    assert "all numbers finite" in out and "read here    yes" in out
    report = json.loads(run(capsys, "inspect", four, "--json").out)
    assert report["bytes"] < (four / "model.safetensors").stat().st_size
    assert report["bits"]["NF4"] == pytest.approx(4.36, abs=0.01)
    plan = json.loads(run(capsys, "plan", four, "--json").out)
    assert any("held in NF4: 3,840 numbers" in note for note in plan["notes"])


def test_merge_refuses_and_its_advice_works(there, four, capsys):
    run(capsys, "merge", "base", "adapter", "-o", "plain", "--quiet")  # a base that is not in 4 bits is merged as before
    assert "another base" in run(capsys, "merge", four, "adapter", "-o", "merged", code=1).err
    err = run(capsys, "merge", four, "adapter", "-o", "merged", "--force", code=1).err
    assert "it is in 4 bits (nf4)" in err and "--dequantize bfloat16" in err and not (there / "merged").exists()
    pytest.importorskip("ml_dtypes")
    out = run(capsys, "merge", four, "adapter", "-o", "merged", "--force", "--dequantize", "bfloat16").out
    assert "decoded from 4 bits to bfloat16: rounding changes a number by at most 2^-8 of it" in out
    run(capsys, "verify", "merged", four, "adapter")
    assert models.load("merged")([[1, 2]]).shape == (1, 2, 37)
    assert "in 4 bits again" not in run(capsys, "check", "adapter", four, code=3).out


@pytest.mark.parametrize("kind", ["nf4", "int8", "float16"])
def test_train_beside_a_base_in(kind, there, capsys):
    pytest.importorskip("tokenizers")
    train = ["train", "base", "--data", "data", "-o", "run", "--rank", 2, "--save-every", 1, "--base-dtype", kind]
    err = run(capsys, *train, "--iters", 2).err
    count = 16 if kind == "float16" else 14  # the table of tokens, and the head
    assert f"base: {count} layers held in {kind}" in err
    assert json.loads((there / "run" / "run.json").read_text())["stored"] == {kind: count}
    said = run(capsys, *train[:-1], "fp4", "--iters", 2, "--resume", code=1).err
    assert "in what the frozen weights are held: {'" + kind in said and "stored" in said
    run(capsys, *train, "--iters", 2, "--resume")
    first, again = (json.loads(run(capsys, "eval", "base", "run", "--data", "data", "--json", *more).out)["loss"]
                    for more in (["--base-dtype", kind], ["--base-dtype", kind, "--batch-size", 3]))
    assert first == pytest.approx(again, abs=1e-5)
    if kind == "float16":  # exact when it is decoded, but the base was rounded
        return
    err = run(capsys, "eval", "base", "run", "--data", "data", code=1).err
    assert f"a base in {kind} is another one than that from which it was made" in err and "--base-dtype" in err
    run(capsys, "eval", "base", "run", "--data", "data", "--force")


def test_a_folder_in_four_bits_is_the_base_in_four_bits(there, four, capsys):
    pytest.importorskip("tokenizers")
    run(capsys, "train", four, "--data", "data", "-o", "run", "--iters", 2, "--rank", 2)
    losses = [json.loads(run(capsys, "eval", *words, "--data", "data", "--json").out)["loss"] for words in (
        [four, "run"], [four, "run", "--base-dtype", "nf4"], ["base", "run", "--base-dtype", "nf4"],
        [four, "run", "--base-dtype", "float32"])]
    assert max(losses) - min(losses) < 1e-5
    assert "is in nf4 already" in run(capsys, "eval", four, "--data", "data", "--base-dtype", "int8", code=2).err
    assert "fits four: yes" in run(capsys, "check", "run", "four").out
    saved = formats.read_adapter("run")
    assert all(update.A.dtype == np.float32 for update in saved.updates.values())
    for words, text in ((["base", "--base-dtype", "nf4"], "--full trains the base itself, and in nf4 it is read only"),
                        ([four], "held as nf4, which is read only")):
        assert text in run(capsys, "train", *words, "--full", "--data", "data", "-o", "x", "--iters", 1, code=2 if "base" in
                           words else 1).err


def test_a_classifier_learns_beside_four_bits(there, capsys):
    pytest.importorskip("tokenizers")
    run(capsys, "train", "encoder", "--data", "reviews", "-o", "run", "--iters", 2, "--rank", 2, "--base-dtype", "nf4")
    assert formats.read_adapter("run").saved  # its head as a whole, in float32
    run(capsys, "quantize", "encoder", "-o", "encoder4", "--quiet")
    run(capsys, "train", "encoder4", "--data", "reviews", "-o", "run4", "--iters", 2, "--rank", 2)
    run(capsys, "embed", "encoder4", "texts.txt", "-o", "vectors.npy")
    assert np.load("vectors.npy").shape == (6, 16)
