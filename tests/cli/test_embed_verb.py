"""`minilora embed`: vectors to a file, or a table of cosines."""
import io
import json
import os
import sys

import numpy as np
import pytest

from minilora import lora, models
from minilora.cli.main import main
from minilora.formats import load_adapter, save_adapter

pytest.importorskip("tokenizers")


def said(capsys, *words, code=0):
    assert main(["embed", *map(str, words)]) == code, capsys.readouterr()
    return capsys.readouterr()


def by_hand(texts, adapter=None, weight=1.0):
    model, tokenizer = models.load("encoder"), models.Tokenizer("encoder")
    if adapter is not None:
        load_adapter(model, adapter, "a")
        lora.activate(model, "a", weights=[weight])
    model.eval()
    return model.embed(tokenizer.encode(texts).ids)


def lines():
    with open("texts.txt", encoding="utf-8") as file:
        return file.read().splitlines()


def test_vectors_as_npy(there, capsys):
    out = said(capsys, "encoder", "texts.txt", "-o", "vectors.npy").out
    found = np.load("vectors.npy", allow_pickle=False)
    assert out.startswith("vectors.npy: 6 vectors of 16 numbers") and found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(lines()), atol=1e-6)


def test_vectors_as_jsonl(there, capsys):
    said(capsys, "encoder", "texts.txt", "-o", "vectors.jsonl", "--batch-size", 2)
    rows = [json.loads(line) for line in (there / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == lines()
    np.testing.assert_allclose(np.array([row["vector"] for row in rows]), by_hand(lines()), atol=1e-6)


def test_a_table_of_cosines(there, capsys):
    out = said(capsys, "encoder", "texts.txt").out
    vectors = by_hand(lines())
    rows = out.splitlines()[2:]
    assert len(rows) == 6 and all(text in row for text, row in zip(lines(), rows))
    assert [float(value) for value in rows[2].split()[-6:]] == pytest.approx((vectors @ vectors[2]).tolist(), abs=0.006)
    report = json.loads(said(capsys, "encoder", "texts.txt", "--json").out)
    assert report["schema"] == "minilora.embed/1" and report["of"] == lines() and report["width"] == 16
    np.testing.assert_allclose(report["cosines"], vectors @ vectors.T, atol=1e-5)


def test_an_adapter_by_weight(there, capsys):
    model = models.load("encoder")
    lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=["query", "value"]), rng=1)
    for parameter in model.parameters():
        if parameter.trainable:
            parameter.data[...] += 0.3
    save_adapter(model, there / "tone")
    said(capsys, "encoder", "tone=0.5", "texts.txt", "-o", "half.npy")
    said(capsys, "encoder", "tone", "texts.txt", "-o", "whole.npy")
    half, whole = np.load("half.npy"), np.load("whole.npy")
    np.testing.assert_allclose(half, by_hand(lines(), "tone", 0.5), atol=1e-6)
    np.testing.assert_allclose(whole, by_hand(lines(), "tone"), atol=1e-6)
    assert abs(half - whole).max() > 1e-3 < abs(half - by_hand(lines())).max()


@pytest.mark.parametrize("content", [b"the cat\n\n we saw it\n", b"\xef\xbb\xbfthe cat\r\n we saw it"])
def test_texts_from_stdin_and_files_of_all_systems(content, there, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    report = json.loads(said(capsys, "encoder", "-", "--json").out)
    assert report["of"] == ["the cat", " we saw it"]
    (there / "lines").write_bytes(content)
    assert json.loads(said(capsys, "encoder", "lines", "--json").out)["cosines"] == report["cosines"]


def test_texts_from_json_lines(there, capsys):
    (there / "rows.jsonl").write_text('{"text": "the cat", "label": 1}\n\n{"text": "a dog"}\n')
    assert json.loads(said(capsys, "encoder", "rows.jsonl", "--json").out)["of"] == ["the cat", "a dog"]
    (there / "rows.jsonl").write_text('{"text": "the cat"}\n{"texts": "a dog"}\n{"text": 5}\n[]\n')
    err = said(capsys, "encoder", "rows.jsonl", code=1).err
    assert all(f"rows.jsonl:{n}: " in err for n in (2, 3, 4))


def test_texts_are_cut_and_that_is_said(there, capsys):
    (there / "long.txt").write_text("the cat " * 40 + "\nthe cat\n")
    err = said(capsys, "encoder", "long.txt", "-o", "v.npy").err
    assert "1 of 2 texts were cut to 32 tokens" in err
    tokenizer = models.Tokenizer("encoder")
    ids = tokenizer.encode("the cat " * 40, max_length=32).ids
    assert ids[0][-1] == tokenizer.id_of("[SEP]")
    np.testing.assert_allclose(np.load("v.npy")[:1], models.load("encoder").embed(ids), atol=1e-6)


def test_an_output_that_is_there_is_not_overwritten_unasked(there, capsys):
    (there / "v.npy").write_bytes(b"mine")
    assert "v.npy is there already: give another name, or --overwrite" in said(
        capsys, "encoder", "texts.txt", "-o", "v.npy", code=2).err
    assert (there / "v.npy").read_bytes() == b"mine"
    said(capsys, "encoder", "texts.txt", "-o", "v.npy", "--overwrite")
    assert np.load("v.npy").shape == (6, 16)


def test_a_dry_run_writes_nothing(there, capsys):
    before = sorted(os.listdir(there))
    out = said(capsys, "encoder", "texts.txt", "-o", "v.npy", "--dry-run").out
    assert out == "would make 6 vectors of 16 numbers and write v.npy\n" and sorted(os.listdir(there)) == before


@pytest.mark.parametrize(("words", "code", "expected"), [
    (("encoder", "texts.txt", "-o", "v.txt"), 2, ".npy or .jsonl"), (("encoder", "texts.txt", "-o", "data"), 2, "the ending"),
    (("encoder", "texts.txt", "-o", "none/v.npy"), 2, "there is no folder none"), (("encoder",), 2, "FILE"),
    (("encoder", "texts.txt", "--batch-size", "0"), 2, "--batch-size"),
    (("encoder", "none.txt"), 1, "none.txt: cannot be read"),
    (("encoder", "empty.txt"), 1, "empty.txt: there are no texts"), (("encoder", "latin.txt"), 1, "no UTF-8 at byte 4"),
    (("encoder", "many.txt"), 2, "has 13 texts, too many for a table: write the vectors, -o vectors.npy"),
    (("encoder", "none=nan", "texts.txt"), 2, "expected ADAPTER or ADAPTER=WEIGHT"), (("none", "texts.txt"), 1, "none"),
    (("encoder", "adapter", "texts.txt"), 1, "minilora embed: adapter"),
])
def test_what_cannot_be_done(words, code, expected, there, capsys):
    (there / "empty.txt").write_text("\n \n")
    (there / "latin.txt").write_bytes(b"caf\xe9")
    (there / "many.txt").write_text("the cat\n" * 13)
    err = said(capsys, *words, code=code).err
    assert expected in err and "Traceback" not in err


def test_a_plain_encoder_gives_means(there, capsys):
    models.save(models.load("encoder").model, there / "plain")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (there / "plain" / file).write_bytes((there / "encoder" / file).read_bytes())
    said(capsys, "plain", "texts.txt", "-o", "v.npy")
    found, unit = np.load("v.npy"), by_hand(lines())
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), unit, atol=1e-5)
