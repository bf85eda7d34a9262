"""`minilora merge`, `unmerge` and `verify`."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from example_folder import write_rows, write_tokenizer

from minilora import models
from minilora.cli.main import main
from minilora.formats import load_state, open_state
from minilora.formats.merging.checkpoint import OF_A_RUN

ROOT = Path(__file__).resolve().parents[2]


def said(capsys, *words, status=0):
    assert main([*words, "--json", "--quiet"]) == status
    return json.loads(capsys.readouterr().out)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(there, capsys):
    report = said(capsys, "merge", "base", "adapter", "-o", "merged")
    assert report["schema"] == "minilora.merge/1" and report["written"] and len(report["tensors"]) == 14
    assert all(0.99 < row["gain"] < 1.01 for row in report["tensors"])
    tuned, merged = (load_state(name + "/model.safetensors") for name in ("tuned", "merged"))
    for name, array in tuned.items():
        np.testing.assert_array_equal(merged[name], array)
    rehearsed = said(capsys, "unmerge", "merged", "-o", "again", "--dry-run")
    assert not rehearsed["written"] and rehearsed["restored"] == 14 and not Path("again").exists()
    report = said(capsys, "unmerge", "merged", "-o", "again")
    assert report["schema"] == "minilora.unmerge/1" and report["restored"] == 14
    assert files_in(there / "again") == files_in(there / "base")
    report = said(capsys, "verify", "merged", "base", "adapter")
    assert report["schema"] == "minilora.verify/1" and report["sound"] and not report["different"]


def test_weights_and_dtype(there, capsys):
    report = said(capsys, "merge", "base", "adapter=0.5", "other=-0.25", "-o", "out", "--dtype", "float16", "--rounding",
                  "stochastic", "--seed", "3", "--no-patch")
    assert report["adapters"] == {"adapter": 0.5, "other": -0.25} and report["patch_nbytes"] == 0
    assert set(open_state("out/model.safetensors").dtypes.values()) == {"F16"}
    assert said(capsys, "verify", "out", "base", "adapter=0.5", "other=-0.25")["sound"]
    wrong = said(capsys, "verify", "out", "base", "adapter=0.5", status=3)
    assert not wrong["sound"] and "model.layers.0.self_attn.q_proj.weight" in wrong["different"]


def test_verify_says_which_tensor_in_words(there, capsys):
    main(["merge", "base", "adapter", "-o", "merged", "--quiet"])
    part, entry = open_state("merged/model.safetensors").place("model.norm.weight")
    data = bytearray(part.path.read_bytes())
    data[part.header.start + entry.begin] ^= 1
    part.path.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "merged", "base", "adapter"]) == 3
    assert "differs: model.norm.weight: 1 of 16 numbers" in capsys.readouterr().out


def test_rehearsal_writes_nothing(there, capsys):
    before = sorted(there.rglob("*"))
    report = said(capsys, "merge", "base", "adapter", "-o", "merged", "--dry-run")
    assert not report["written"] and len(report["tensors"]) == 14 and sorted(there.rglob("*")) == before
    assert main(["merge", "base", "adapter", "-o", "merged", "--dry-run"]) == 0
    assert "nothing was written: this was a rehearsal" in capsys.readouterr().out


@pytest.mark.parametrize("words, code, text", [
    (["merge", "base", "adapter", "-o", "base"], 1, "from which the result is made"),
    (["merge", "base", "adapter", "-o", "tuned"], 1, "--overwrite"),
    (["merge", "adapter", "base", "-o", "out"], 1, "this is an adapter, and a base is expected"),
    (["merge", "base", "nobody", "-o", "out"], 1, "no such file"),
    (["merge", "encoder", "adapter", "-o", "out"], 1, "nothing was written"),
    (["merge", "base", "adapter=x", "-o", "out"], 2, "ADAPTER=WEIGHT"),
    (["merge", "base", "adapter", "-o", "out", "--memory", "lots"], 2, "expected a size"),
    (["merge", "base", "adapter", "-o", "out", "--memory", "1KB"], 1, "give more"),
    (["merge", "base", "adapter", "-o", "out", "--names", "thinker"], 2, "OLD=NEW"),
    (["unmerge", "base", "-o", "out"], 1, "no minilora_patch.safetensors"),
    (["verify", "nobody", "base", "adapter"], 1, "no such file"),
])
def test_what_is_refused(there, capsys, words, code, text):
    before = sorted(there.rglob("*"))
    assert main(words) == code
    assert text in capsys.readouterr().err and sorted(there.rglob("*")) == before


def test_names_of_another_program(there, capsys):
    from minilora import formats

    saved = formats.read_adapter("adapter")
    odd = formats.SavedAdapter({f"thinker.{path}": u for path, u in saved.updates.items()}, saved.config)
    formats.write_adapter(odd, "odd")
    assert main(["merge", "base", "odd", "-o", "out"]) == 1
    assert "mapping={'thinker.': ''}" in capsys.readouterr().err
    said(capsys, "merge", "base", "odd", "-o", "out", "--names", "thinker.=")
    assert said(capsys, "verify", "out", "base", "odd", "--names", "thinker.=")["sound"]


def test_no_library_that_merging_does_not_need(there):
    code = ("import sys; from minilora.cli.main import main; main(['merge', 'base', 'adapter', '-o', 'm', '--quiet']); "
            "print([name for name in ('matplotlib', 'tokenizers', 'cupy', 'torch', 'minilora.models') if name in sys.modules])")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.stdout.splitlines()[-1] == "[]"


QUICK = ["--threads", "1", "--quiet"]


@pytest.mark.parametrize("kind", ["encoder", "plain"])
def test_a_classifier_is_one_after_the_merge(there, capsys, monkeypatch, kind):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    models.save(models.load("encoder", head="base"), "plain")
    write_tokenizer(there / "plain", "[CLS]", "[SEP]")
    assert main(["train", kind, "--data", "reviews", "-o", "run", "--iters", "4", *QUICK]) == 0
    capsys.readouterr()
    assert said(capsys, "merge", kind, "run", "-o", "merged")["written"]
    beside = said(capsys, "eval", kind, "run", "--data", "reviews")
    merged = said(capsys, "eval", "merged", "--data", "reviews")
    assert abs(beside["loss"] - merged["loss"]) < 1e-5 and merged["accuracy"] == beside["accuracy"]
    found = models.load("merged").labels
    assert found.names == ("bad", "good") and found.problem_type == "single_label_classification"
    assert said(capsys, "verify", "merged", kind, "run")["sound"]
    assert main(["generate", "merged", "--prompt", "the cat", "--quiet"]) == 1
    assert "needs a model that predicts the next token" in capsys.readouterr().err
    if kind == "encoder":
        assert main(["embed", "merged", "texts.txt", "--quiet"]) == 1
        assert "no encoder of sentences" in capsys.readouterr().err
    said(capsys, "unmerge", "merged", "-o", "again")
    assert tree(there / "again") == tree(there / kind)


def test_scores_stay_scores(there, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    write_rows(there / "scores.jsonl", [{"text": f"the cat sat {'. ' * (i % 3)}", "score": float(i % 3)} for i in range(16)])
    assert main(["train", "encoder", "--data", "scores.jsonl", "-o", "run", "--iters", "2", *QUICK]) == 0
    assert main(["merge", "encoder", "run", "-o", "merged", "--quiet"]) == 0
    assert models.load("merged").labels.problem_type == "regression"


def test_a_run_in_the_base_is_left_there(there, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["train", "base", "--data", "data", "-o", "run", "--full", "--iters", "2", *QUICK]) == 0
    (there / "run" / "report.png").write_bytes(b"a picture")
    (there / "run" / "LICENSE").write_text("yours")
    written = {path.name for path in (there / "run").iterdir()}
    models.save(models.load("run"), "model")
    of_a_model = {path.name for path in (there / "model").iterdir()} | {path.name for path in (there / "base").iterdir()}
    assert written - of_a_model - {"LICENSE"} == set(OF_A_RUN) - {"state.safetensors"}  # all that a run writes is known
    assert main(["train", "run", "--data", "data", "-o", "more", "--iters", "1", *QUICK]) == 0
    capsys.readouterr()
    report = said(capsys, "merge", "run", "more", "-o", "merged")
    assert {path.name for path in (there / "merged").iterdir()} == \
        of_a_model | {"LICENSE", "minilora_merge.json", "minilora_patch.safetensors"}
    assert any("left where they are: checkpoints, metrics.jsonl, report.json" in note for note in report["notes"])
    assert said(capsys, "verify", "merged", "run", "more")["sound"]
    said(capsys, "unmerge", "merged", "-o", "again")
    assert tree(there / "again") == {name: data for name, data in tree(there / "run").items()
                                     if name.partition("/")[0] not in OF_A_RUN}
