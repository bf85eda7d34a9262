"""`minilora plan`: the figures of lora.plan for the model of a folder, whose numbers are not read."""
import json
import shutil

import example_folder
import pytest

from minilora import formats, lora, models
from minilora.cli.main import main
from minilora.models.checkpoints.outline import outline

KEYS = ["schema", "model", "architecture", "rows", "adapters", "lora", "full", "fewer_trained", "less_memory",
        "smaller_checkpoint", "tokens_for_each", "left_out", "saved", "notes", "steps", "fit"]
COSTS = ["trained", "total", "weights", "gradients", "moments", "activations", "checkpoint", "forward", "backward", "memory"]


def reported(capsys, *words):
    assert main(["plan", *map(str, words), "--json"]) == 0, capsys.readouterr()
    return json.loads(capsys.readouterr().out)


def test_the_report_is_that_of_lora_plan(examples, capsys):
    report = reported(capsys, examples / "base", "--rank", 2, "--alpha", 4, "--target", "q_proj,down_proj", "--rows", 32,
                      "--tokens", 1000, "--dtype", "float16")
    assert list(report) == KEYS and report["schema"] == "minilora.plan/1" and report["architecture"] == "Llama"
    config = lora.Config(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    made = lora.plan(models.load(examples / "base"), config, batch=32, dtype="float16")
    for name, costs in (("lora", made.lora), ("full", made.full)):
        assert list(report[name]) == COSTS and report[name] == {**costs._asdict(), "memory": costs.memory}
    assert [a["path"] for a in report["adapters"]] == [a.target.path for a in made.adapters]
    assert report["tokens_for_each"] == 1000 / made.lora.trained and report["fewer_trained"] == made.fewer_trained


def test_the_text_fits_a_terminal(examples, capsys):
    assert main(["plan", str(examples / "base"), "--dora", "--rslora", "--save", "lm_head", "--tokens", "10"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.split("\n"))) <= 80
    words = " ".join(out.split())
    assert "trained as a whole: lm_head" in words and "fewer tokens than trained numbers" in words and "notes more" in words


def test_whole_steps_and_what_fits(examples, capsys):
    words = (examples / "base", "--rank", 2, "--target", "q_proj", "--length", 8, "--batch", 2)
    report = reported(capsys, *words, "--fit", "200kB")
    model, config = models.load(examples / "base"), lora.Config(r=2, lora_alpha=32, target_modules=["q_proj"])
    made = lora.plan(model, config, example=(2, 8))
    assert [step["name"] for step in report["steps"]] == [name for name, _ in made.steps]
    assert [step["peak"] for step in report["steps"]] == [step.peak for _, step in made.steps]
    found = lora.what_fits(model, config, 200_000, length=8, rows=2)
    assert report["fit"]["memory"] == 200_000 and report["fit"]["first"] == (found.first and found.first.name)
    assert [way["largest"] for way in report["fit"]["ways"]] == [way.largest for way in found.ways]
    assert main(["plan", *map(str, words), "--fit", "1kB", "--largest", "rank"]) == 0
    out = capsys.readouterr().out
    assert "nothing fits into 1.00 kB" in out and "a whole step" in out and max(map(len, out.split("\n"))) <= 90


def test_rows_longer_than_the_model_reads_are_remarked(examples, capsys):
    words = (examples / "base", "--rank", 2, "--target", "q_proj")
    most = models.load(examples / "base").config.max_position_embeddings
    long = [note for note in reported(capsys, *words, "--length", most + 1)["notes"] if "positions" in note]
    assert long == [f"rows of {most + 1:,} tokens are planned, and the model has {most:,} positions: train cuts longer rows"]
    assert not any("positions" in note for note in reported(capsys, *words, "--length", most)["notes"])
    assert not any("positions" in note for note in reported(capsys, *words)["notes"])


def test_an_encoder(examples, capsys):
    report = reported(capsys, examples / "encoder", "--target", "query,value", "--init", "pissa")
    assert len(report["adapters"]) == 4 and report["architecture"] == "Bert"


def test_no_number_is_read(tmp_path, capsys):
    """A file whose numbers are a hole in it."""
    models.save(example_folder.llama(), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    size = path.stat().st_size
    header = path.read_bytes()[:8 + int.from_bytes(path.read_bytes()[:8], "little")]
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)
    assert reported(capsys, tmp_path / "base")["lora"]["trained"] > 0
    made = outline(tmp_path / "base")
    assert all(p.data.strides == (0,) * p.data.ndim for p in made.model.parameters())


def test_the_outline_takes_what_is_asked_for(examples):
    made, whole = outline(examples / "base"), dict(models.load(examples / "base").named_parameters())
    path = "model.layers.1.mlp.up_proj.weight"
    made.take([path])
    own = dict(made.model.named_parameters())
    assert (own[path].data == whole[path].data).all() and not any(own["lm_head.weight"].data.strides)


@pytest.mark.parametrize(("words", "status", "said"), [
    (["--target", "q_prj"], 1, "q_proj"), (["--rank", "0"], 1, "r"), (["--target", ","], 2, "names between commas"),
    (["--dtype", "int8"], 2, "invalid choice"), (["--init", "x"], 2, "invalid choice"), (["--rows", "0"], 1, "batch"),
    (["--fit", "much"], 2, "expected a size"), (["--fit", "0"], 2, "expected a size"),
    (["--length", "8", "--batch", "0"], 1, "batch"),
    (["--head", "nose"], 1, "head must be one of"), (["--rnk", "1"], 2, "did you mean '--rank'"),
])
def test_what_is_wrong(words, status, said, examples, capsys):
    assert main(["plan", str(examples / "base"), *words]) == status
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_what_is_no_model(examples, tmp_path, capsys):
    for path, said in ((examples / "adapter", "an adapter"), (tmp_path, "no config.json"), (tmp_path / "x", "no such folder")):
        assert main(["plan", str(path)]) == 1
        assert said in capsys.readouterr().err
    shutil.copytree(examples / "base", tmp_path / "base")
    formats.save_state(tmp_path / "base" / "model.safetensors", {})
    assert main(["plan", str(tmp_path / "base")]) == 1
    assert capsys.readouterr().out == ""
