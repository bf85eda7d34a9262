"""The folder of a run: metrics, report, run.json, what was trained; and what is printed."""

import json
import sys

import numpy as np
import pytest
from conftest import fetch
from hypothesis import given
from hypothesis import strategies as st
from rows_of_numbers import Net, WithAccuracy, drawn, loss_of

from minilora import formats, lora, nn
from minilora.errors import DivergedError, FileError
from minilora.train import Settings, fit
from minilora.train.beside import Beside
from minilora.train.distributed.comm import Serial
from minilora.train.header import Header
from minilora.train.metrics import Metrics, rows_of
from minilora.train.outcome import written
from minilora.train.report import draw
from minilora.train.run import Run

SETTINGS = Settings(steps=12, batch_size=4, steps_per_report=4, steps_per_eval=6, learning_rate=0.02, threads=1)


def adapted(seed=0):
    model = Net(seed=seed)
    lora.inject(model, lora.Config(r=2, target_modules=["inner", "outer"]), rng=0)
    return model


def test_a_run_folder(tmp_path):
    folder, model = tmp_path / "runs" / "one", adapted()
    made = fit(model, drawn(), SETTINGS, loss=WithAccuracy(), valid=drawn(seed=1), folder=folder, quiet=True)
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 6, 8, 12] and [row["tokens"] for row in rows] == [48, 72, 96, 144]
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_bytes"} <= rows[0].keys()
    assert [row["step"] for row in rows if "valid_loss" in row] == [6, 12] and rows[1]["valid_accuracy"] is not None
    assert [(row["step"], row["loss"]) for row in rows] == made.losses
    report, kept = (json.loads((folder / name).read_text()) for name in ("report.json", "run.json"))
    assert report["status"] == "done" and report["best"]["loss"] == made.best.loss and report["targets_of_an_epoch"] > 12
    assert kept["settings"] == SETTINGS.as_dict() and Settings.read(kept["settings"]) == SETTINGS
    assert kept["adapters"] == ["default"] and kept["trained"] == 42
    other = Net()
    formats.load_adapter(other, folder)
    x = drawn().batch([0, 1]).inputs
    assert loss_of(other, x).item() == loss_of(model, x).item()


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    fit(Net(), drawn(), SETTINGS, loss=loss_of, folder=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    one = {"step": 1, "loss": None, "learning_rate": 0.1, "gradient_norm": None, "valid_loss": 2.0}
    assert draw([one], tmp_path / "one.png", "") and (tmp_path / "one.png").stat().st_size > 1000


def test_without_matplotlib_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    fit(Net(), drawn(), SETTINGS, loss=loss_of, folder=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "report.json").is_file() and not (tmp_path / "run" / "report.png").exists()


class Killed(BaseException):
    pass


class Kill(Beside):
    def __init__(self, step):
        self.step = step

    def after_step(self, run, made):
        if run.step == self.step:
            raise Killed


def rows_without_times(path):
    changing = ("tokens_per_second", "peak_bytes")
    return [{key: value for key, value in row.items() if key not in changing} for row in rows_of(path)]


@given(st.integers(1, 11), st.data())
def test_metrics_after_a_resume_are_those_of_the_run_that_went_on(tmp_path_factory, killed, data):
    """A run goes on from a step at or before that at which it was killed; the last row may be torn."""
    folder = tmp_path_factory.mktemp("run")
    saved = data.draw(st.integers(0, killed))
    (folder / "whole").mkdir(), (folder / "cut").mkdir()

    def go(run, metrics, until):
        metrics.begin(run)
        while run.step < until:
            metrics.after_step(run, run.update())
        metrics.end(run)

    def run_at(step):
        run = Run(Net(), drawn(), SETTINGS, loss_of, Serial())
        while run.step < step:
            run.update()
        return run

    go(run_at(0), Metrics(folder / "whole"), 12)
    go(run_at(0), Metrics(folder / "cut"), killed)
    path = folder / "cut" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 99, "lo')
    go(run_at(saved), Metrics(folder / "cut"), 12)
    assert rows_without_times(path) == rows_without_times(folder / "whole" / "metrics.jsonl")
    assert len(path.read_bytes().splitlines()) == len(rows_of(path))


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n"x"\n\xff\xfe\n{"step": "2"}\n{"step": 3}\n{"step": 4}')
    assert [row["step"] for row in rows_of(path)] == [1, 3] and rows_of(tmp_path / "none.jsonl") == []


def test_a_killed_run_leaves_no_adapter_and_says_so(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        fit(adapted(), drawn(), SETTINGS, loss=loss_of, folder=folder, quiet=True, beside=[Kill(5)])
    assert json.loads((folder / "report.json").read_text())["status"] == "failed: Killed"
    assert not (folder / "adapter_model.safetensors").exists()
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == [4]


def test_a_diverged_run_leaves_its_files(tmp_path):
    data, folder = drawn(), tmp_path / "run"
    data.x[7, 0, 0] = np.nan
    with pytest.raises(DivergedError):
        fit(adapted(), data, SETTINGS, loss=loss_of, folder=folder, quiet=True)
    assert json.loads((folder / "report.json").read_text())["status"].startswith("diverged: diverged in step")
    assert not (folder / "adapter_model.safetensors").exists()


def test_a_folder_that_cannot_be_written_is_found_before_any_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="current working folder"):
        fit(Net(), drawn(), SETTINGS, loss=loss_of, folder=".", quiet=True, beside=[Kill(1)])
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="this is a file"):
        fit(Net(), drawn(), SETTINGS, loss=loss_of, folder="file", quiet=True, beside=[Kill(1)])


def same(model, state):
    return all(np.array_equal(fetch(p), state[name]) for name, p in model.named_parameters())


def test_what_is_written_of_which_model(tmp_path):
    whole = Net(p=0.5)
    assert written(whole, tmp_path) == []
    other = Net(p=0.5, seed=1)
    other.load_state_dict(formats.load_state(tmp_path / "state.safetensors"))
    assert same(other, whole.state_dict())
    config = nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    gpt2 = nn.GPT2(config, rng=0)
    assert written(gpt2, tmp_path / "gpt2") == [] and (tmp_path / "gpt2" / "model.safetensors").is_file()
    from minilora import models

    again = models.load(tmp_path / "gpt2")
    assert again([[1, 2, 3]]).numpy().tobytes() == gpt2([[1, 2, 3]]).numpy().tobytes()
    again.origin.folder.joinpath("tokenizer.json").write_text("{}")
    assert written(again, tmp_path / "more") == [] and (tmp_path / "more" / "tokenizer.json").read_text() == "{}"
    gpt2.extra = nn.Linear(2, 2)
    (note,) = written(gpt2, tmp_path / "odd")
    assert "state.safetensors holds what was trained" in note and "extra" in note
    assert "extra.weight" in formats.load_state(tmp_path / "odd" / "state.safetensors")


def test_several_adapters_and_what_belongs_to_none(tmp_path):
    model = adapted()
    lora.inject(model, lora.Config(r=1, target_modules=["outer"]), "second", rng=0)
    assert written(model, tmp_path) == [] and (tmp_path / "adapter_config.json").is_file()  # only the active one is trained
    lora.activate(model, "default", "second")
    written(model, tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["default", "second"]
    model.inner.bias.trainable = True
    (note,) = written(model, tmp_path / "bias")
    assert "1 trained parameters belong to no adapter (inner.bias)" in note
    assert list(formats.load_state(tmp_path / "bias" / "state.safetensors")) == ["inner.bias"]
    model = Net()
    lora.inject(model, lora.Config(r=1, target_modules=["inner"], modules_to_save=["outer"], bias="all"), rng=0)
    assert written(model, tmp_path / "saved") == [] and not (tmp_path / "saved" / "state.safetensors").exists()


def test_what_is_said(capsys, monkeypatch):
    fit(adapted(), drawn(), SETTINGS, loss=WithAccuracy(), valid=drawn(seed=1))
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("trainable params: 42 || all params: 107 || trainable%: 39.2523\n")
    for text in ("12 rows, 12 to evaluate on", "steps     12, of 1 x 4 rows: 4 epochs of 3 batches",
                 "at least: weights 428 bytes", "step 4/12  loss ", "step 6  evaluation: loss ", "accuracy", "to go at"):
        assert text in err
    fit(adapted(), drawn(), SETTINGS, loss=loss_of, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(adapted(), drawn(), SETTINGS, loss=loss_of)
    err = capsys.readouterr().err
    assert "12/12" in err and "step 4/12  loss " in err


def test_the_header_changes_no_state():
    model, data = Net(p=0.5), drawn()
    run = Run(model, data, SETTINGS, loss_of, Serial())
    before = model.state_dict()
    header = Header(run, drawn(seed=1))
    assert same(model, before) and {name: a.tobytes() for name, a in model.state_dict().items()} == \
        {name: a.tobytes() for name, a in before.items()}
    assert header.bytes.weights == 65 * 4 and header.bytes.kept > 0 and header.targets == data.targets({"labels": data.labels})
