"""minilora train and minilora eval, end to end on small models: what is trained, written, said and refused."""

import json
import math
import sys

import numpy as np
import pytest
from example_folder import write_rows

from minilora import formats, models
from minilora.cli.main import main
from minilora.train.metrics import rows_of

pytest.importorskip("tokenizers")

QUICK = ["--iters", "4", "--batch-size", "8", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take a second each, and have a test of their own."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


def said(capsys, *words):
    """The JSON object that a command prints."""
    assert main([*words, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    status = main([*map(str, words)])
    out, err = capsys.readouterr()
    assert status and not out
    return status, err


def test_an_adapter_of_a_decoder(there, capsys):
    assert main(["train", "base", "--data", "data", "-o", "run", "--rank", "2", "--learning-rate", "0.02", "--iters", "12",
                 "--steps-per-eval", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith("run: 12 steps in ") and "best evaluation, after step" in out
    assert err.index("the prompt is masked") < err.index("trainable params: ") < err.index("step 4/12")
    before, after = said(capsys, "eval", "base", "--data", "data"), said(capsys, "eval", "base", "run", "--data", "data")
    assert after["loss"] < before["loss"] and after["part"] == "valid" and after["adapters"] == [{"path": "run", "weight": 1.0}]
    best = json.loads((there / "run" / "report.json").read_text())["best"]
    assert after["loss"] == pytest.approx(best["loss"], rel=1e-6) and after["targets"] == best["targets"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"])) and after["accuracy"] is None
    assert formats.read_adapter(there / "run").config.r == 2
    half = said(capsys, "eval", "base", "run=0.5", "--data", "data", "--part", "train")
    assert half["part"] == "train" and half["rows"] == 40


def test_in_mixed_precision(there, capsys):
    """The same run in both precisions ends at nearly the same loss; the base may be float16 then."""
    losses = []
    mixed = ["--precision", "mixed"]
    for out, more in (("full", []), ("mixed", mixed), ("half", [*mixed, "--dtype", "float16"])):
        assert main(["train", "base", "--data", "data", "-o", out, "--rank", "2", *more, *QUICK]) == 0
        capsys.readouterr()
        losses.append(json.loads((there / out / "report.json").read_text())["best"]["loss"])
        row = rows_of(there / out / "metrics.jsonl")[-1]
        assert ("loss_scale" in row) == bool(more) and ("skipped" in row) == bool(more)
    np.testing.assert_allclose(losses, losses[0], rtol=5e-3)
    assert losses[0] != losses[1]
    status, err = refused(capsys, "train", "base", "--data", "data", "-o", "no", "--full", "--dtype", "float16", *mixed, *QUICK)
    assert status == 1 and "is float16: convert the model first" in err and "--dtype float32, or leave it out" in err


def test_a_classifier_with_a_new_head(there, capsys):
    assert main(["train", "encoder", "--data", "reviews", "-o", "run", "--rank", "2", "--alpha", "4", "--epochs", "10",
                 "--learning-rate", "0.02", "--quiet"]) == 0
    capsys.readouterr()
    run, adapter = json.loads((there / "run" / "run.json").read_text()), formats.read_adapter(there / "run")
    assert run["labels"] == ["bad", "good"] and adapter.config.modules_to_save == ("classifier",)
    assert sorted(adapter.saved) == ["classifier.bias", "classifier.weight"]
    found = said(capsys, "eval", "encoder", "run", "--data", "reviews", "--part", "train")
    assert found["accuracy"] >= 0.9 and found["targets"] == 40 and found["perplexity"] is None
    assert found["accuracy_error"] == pytest.approx(math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 40))
    only_bad = [json.loads(line) for line in (there / "reviews" / "train.jsonl").read_text().splitlines()]
    write_rows(there / "bad.jsonl", [row for row in only_bad if row["label"] == "bad"])
    again = said(capsys, "eval", "encoder", "run", "--data", "bad.jsonl")  # its labels alone would be one class
    assert again["accuracy"] > 0.8 and again["part"] == "train"


def test_a_regression(there, capsys):
    rows = [{"text": f"the {'cat' if i % 2 else 'dog'} sat", "score": 2.0 + i % 2} for i in range(16)]
    write_rows(there / "scores" / "train.jsonl", rows)
    assert main(["train", "encoder", "--data", "scores", "-o", "run", "--learning-rate", "0.02", "--epochs", "10",
                 "--rank", "2", "--alpha", "4", "--valid-fraction", "0.25", "--quiet"]) == 0
    capsys.readouterr()
    found = said(capsys, "eval", "encoder", "run", "--data", "scores")
    assert found["root_mean_square_error"] == pytest.approx(math.sqrt(found["loss"])) and found["loss"] < 0.5
    assert found["accuracy"] is None


def test_a_whole_model(there, capsys):
    assert main(["train", "base", "--data", "data", "-o", "run", "--full", "--grad-checkpoint", *QUICK]) == 0
    capsys.readouterr()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (there / "run").iterdir()}
    found = said(capsys, "eval", "run", "--data", "data")
    assert found["loss"] == pytest.approx(rows_of(there / "run" / "metrics.jsonl")[-1]["valid_loss"], rel=1e-6)


def test_a_whole_classifier_goes_on_with_its_own_classes(there, capsys):
    assert main(["train", "encoder", "--data", "reviews", "-o", "run", "--full", *QUICK]) == 0
    assert models.load(there / "run").labels.names == ("bad", "good")
    assert main(["train", "run", "--data", "reviews", "-o", "more", "--target", "query,value", *QUICK]) == 0
    capsys.readouterr()
    assert formats.read_adapter(there / "more").config.modules_to_save == ("classifier",)
    write_rows(there / "others" / "train.jsonl", [{"text": "the cat sat", "label": name} for name in ("x", "y", "z")] * 4)
    _, err = refused(capsys, "train", "run", "--data", "others", "-o", "not", *QUICK)
    assert "'x' is not one of those" in err and not (there / "not").exists()


def test_a_dry_run_writes_nothing(there, capsys):
    before = sorted(there.rglob("*"))
    found = said(capsys, "train", "base", "--data", "data", "-o", "run", "--epochs", "3", "--batch-size", "16", "--dry-run")
    assert found["steps"] == 9 and found["trained"] == 7424 and found["predicted_bytes"] > 4 * found["total"]
    assert sorted(there.rglob("*")) == before
    assert main(["train", "base", "--data", "data", "-o", "run", "--dry-run"]) == 0
    assert "would write run; nothing was written" in capsys.readouterr().out


def test_sanity_checks_come_first(there, capsys):
    words = ["train", "base", "--data", "data", "-o", "run", "--rank", "2", "--learning-rate", "1e-12", *QUICK]
    status, err = refused(capsys, *words, "--sanity")
    assert status == 3 and "loss at chance     ln 37 = 3.611" in err and "8 rows overfitted" in err and "FAILED" in err
    assert "nothing trains" in err and "too small" in err and "nothing was trained" in err and not (there / "run").exists()
    assert max(map(len, err.splitlines())) <= 80
    full = ["train", "base", "--data", "data", "-o", "run", "--full", "--learning-rate", "0.02", *QUICK[:-1]]
    assert main([*full, "--sanity"]) == 0
    err = capsys.readouterr().err
    assert err.index("what moves") < err.index("trainable params") and "FAILED" not in err


def test_settings_reach_the_run(there, capsys):
    (there / "config.toml").write_text('[train]\nlearning-rate = 0.5\nschedule = "constant"\nwarmup = 0\nmax-grad-norm = 0\n'
                                       "steps-per-report = 1\ngrad-accumulation-steps = 2\nseed = 7\npatience = 3\n")
    assert main(["train", "base", "--data", "data", "-o", "run", "--config", "config.toml", "--learning-rate", "0.001",
                 *QUICK]) == 0
    kept = json.loads((there / "run" / "run.json").read_text())["settings"]
    assert kept["learning_rate"] == 0.001 and kept["schedule"] == "constant" and kept["max_grad_norm"] is None
    assert kept["accumulation"] == 2 and kept["seed"] == 7 and kept["patience"] == 3 and kept["steps"] == 4
    assert [row["learning_rate"] for row in rows_of(there / "run" / "metrics.jsonl")] == [0.001] * 4


def test_the_default_rate_depends_on_the_model(there, capsys):
    for model, data, rate in (("base", "data", 2e-4), ("encoder", "reviews", 1e-3)):
        assert said(capsys, "train", model, "--data", data, "-o", "run", "--dry-run")["settings"]["learning_rate"] == rate


def test_divergence_has_its_exit_code(there, capsys):
    array = formats.load_state(there / "base" / "model.safetensors")
    array["model.norm.weight"][...] = np.nan
    formats.save_state(there / "base" / "model.safetensors", array, {"format": "pt"})
    status, err = refused(capsys, "train", "base", "--data", "data", "-o", "run", *QUICK)
    assert status == 4 and "the weight model.norm.weight (16,), 16 of 16 NaN" in err and "--learning-rate" not in err
    assert json.loads((there / "run" / "report.json").read_text())["status"].startswith("diverged")


def test_a_run_goes_on(there, capsys):
    words = ["train", "base", "--data", "data", "-o", "run", *QUICK]
    assert main(words) == 0
    capsys.readouterr()
    assert "--resume" in refused(capsys, *words)[1]
    assert "learning_rate" in refused(capsys, *words, "--resume", "--learning-rate", "0.5")[1]
    longer = ["train", "base", "--data", "data", "-o", "run", "--iters", "6", *QUICK[2:], "--resume"]
    assert "--permit steps" in refused(capsys, *longer)[1]
    assert main([*longer, "--permit", "steps"]) == 0
    assert [row["step"] for row in rows_of(there / "run" / "metrics.jsonl")] == [4, 5, 6]


@pytest.mark.parametrize(("words", "status", "text"), [
    (["train", "encoder", "--data", "data"], 1, "rows of completion ask for the head 'causal_lm'"),
    (["train", "encoder", "--data", "reviews", "--problem-type", "regression"], 2, 'with a "score" a regression is trained'),
    (["train", "base", "--data", "data", "--labels", "a,b"], 2, 'are for rows with a "label"'),
    (["train", "base", "--data", "data", "--full", "--loraplus-ratio", "4"], 2, "is for adapters"),
    (["train", "base", "--data", "data", "--target", "q_proy"], 1, "nearest"),
    (["train", "base", "--data", "data", "--rank", "0", "--dropout", "2"], 1, "dropout must be a number"),
    (["train", "base", "--data", "nowhere"], 1, "nowhere"),
    (["train", "nowhere", "--data", "data"], 1, "nowhere"),
    (["train", "base", "--data", "data", "--batch-size", "0", "--warmup", "-1"], 1, "warmup must be a number"),
])
def test_what_cannot_be_meant(there, capsys, words, status, text):
    found, err = refused(capsys, *words, "-o", "run")
    assert found == status and text in err and not (there / "run").exists(), err


def test_eval_refuses(there, capsys):
    assert "--part test: data has valid, train only" in refused(capsys, "eval", "base", "--data", "data", "--part", "test")[1]
    assert "--batch-size must be an int >= 1" in refused(capsys, "eval", "base", "--data", "data", "--batch-size", 0)[1]
    (there / "adapter" / "run.json").write_text("[1]")
    assert main(["eval", "base", "adapter", "--data", "data", "--batches", "1", "--quiet"]) == 0


def test_a_prefix_in_place_of_an_adapter(there, capsys):
    """Trained, written as PEFT has it, looked at, and refused where it does not go together."""
    assert main(["train", "base", "--data", "data", "-o", "run", "--prefix", "3", "--prefix-projection", *QUICK]) == 0
    capsys.readouterr()
    report = said(capsys, "inspect", "run")
    assert (report["kind"], report["config"]["num_virtual_tokens"], report["resumable"]) == ("prefix", 3, True)
    assert main(["inspect", "run"]) == 0 and "prefix of 3 virtual tokens" in capsys.readouterr().out
    before, after = said(capsys, "eval", "base", "--data", "data"), said(capsys, "eval", "base", "run", "--data", "data")
    assert after["loss"] != before["loss"]
    best = json.loads((there / "run" / "run.json").read_text())
    assert best["trained"] > 0
    for words, text in [(["--prefix-projection"], "give --prefix N"), (["--prefix", "3", "--full"], "--full does not go"),
                        (["--prefix", "0"], "num_virtual_tokens must be an int >= 1")]:
        status, err = refused(capsys, "train", "base", "--data", "data", "-o", "other", *words, *QUICK)
        assert text in err, err
    assert main(["train", "encoder", "--data", "reviews", "-o", "classes", "--prefix", "2", *QUICK]) == 0
    assert formats.read_prefix(there / "classes").saved.keys() == {"classifier.weight", "classifier.bias"}
