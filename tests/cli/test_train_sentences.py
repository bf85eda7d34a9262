"""minilora train on an encoder of sentences: the classifier stands on what it knows of a text; on another BERT it does not."""
import json
import shutil

import pytest
from example_folder import write_rows, write_tokenizer

from minilora import formats, models
from minilora.cli.main import main

pytest.importorskip("tokenizers")

QUICK = ["--iters", "4", "--batch-size", "8", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


def test_an_encoder_of_sentences(there, capsys):
    assert main(["train", "encoder", "--data", "reviews", "-o", "run", *QUICK]) == 0
    saved = formats.read_adapter(there / "run")
    assert all(path.startswith("encoder.layer.") for path in saved.updates) and len(saved.updates) == 12  # and no pooler
    assert saved.config.task_type == "FEATURE_EXTRACTION" and sorted(saved.saved) == ["classifier.bias", "classifier.weight"]
    model = models.load("encoder", head="sentence_classification", labels=["bad", "good"], rng=5)
    formats.load_adapter(model, "run")
    capsys.readouterr()
    assert main(["eval", "encoder", "run", "--data", "reviews", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"] == 8


def test_scores_too(there, capsys):
    write_rows(there / "scores.jsonl", [{"text": f"the cat sat {'. ' * (i % 3)}", "score": float(i % 3)} for i in range(16)])
    assert main(["train", "encoder", "--data", "scores.jsonl", "-o", "run", *QUICK]) == 0
    assert formats.read_adapter(there / "run").saved["classifier.weight"].shape == (1, 16)


def test_a_bert_that_is_none(there, capsys):
    models.load("encoder", head="base").save("plain")
    write_tokenizer(there / "plain", "[CLS]", "[SEP]")
    assert main(["train", "plain", "--data", "reviews", "-o", "run", *QUICK]) == 0
    saved = formats.read_adapter(there / "run")
    assert saved.config.task_type == "SEQ_CLS" and any("pooler" in path for path in saved.updates)


def test_a_whole_one_has_its_classes(there, capsys):
    assert main(["train", "encoder", "--data", "reviews", "-o", "run", "--full", *QUICK]) == 0
    model = models.load("run")
    assert type(model) is models.SentenceClassifier and model.labels.names == ("bad", "good")
    write_rows(there / "one.jsonl", [{"text": "the cat sat", "label": "good"}] * 16)
    assert main(["train", "run", "--data", "one.jsonl", "-o", "more", *QUICK]) == 0  # both classes are there still
    assert formats.read_adapter(there / "more").saved["classifier.weight"].shape == (2, 16)
    capsys.readouterr()
    write_rows(there / "others.jsonl", [{"text": "the cat sat", "label": name} for name in ("x", "y", "z")] * 4)
    assert main(["train", "run", "--data", "others.jsonl", "-o", "not", *QUICK]) == 1
    assert "'x' is not one of those" in capsys.readouterr().err


def test_texts_are_as_long_as_the_encoder_was_trained_to_read(there, capsys):
    write_rows(there / "long.jsonl", [{"text": "cat " * 50, "label": "good"}, {"text": "dog " * 50, "label": "bad"}] * 8)
    assert main(["train", "encoder", "--data", "long.jsonl", "-o", "run", "--iters", "1", "--threads", "1"]) == 0
    assert "32" in capsys.readouterr().err  # of 64 positions
    shutil.rmtree(there / "run")
    path = there / "encoder" / "sentence_bert_config.json"
    path.unlink()
    assert main(["train", "encoder", "--data", "long.jsonl", "-o", "run", *QUICK]) == 0
