"""What goes wrong before, in and after a training: one sentence, an exit code, and nothing that was there is lost."""
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from example_folder import write_rows

from minilora import formats
from minilora.cli.main import main
from minilora.train.checkpoints import files, scan

pytest.importorskip("tokenizers")

TRAIN = ["train", "base", "--data", "data", "-o", "run", "--batch-size", "8", "--rank", "2", "--threads", "1", "--quiet"]
SHORT = [*TRAIN, "--iters", "3", "--save-every", "1"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def seen(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fails(capsys, words, *named, status=1):
    """Run a command that must fail, with one line on stderr that names all this."""
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    missing = [part for part in named if part not in err]
    assert not out and err.startswith("minilora") and not missing, f"{missing} not in {err}"
    return err


def row(**fields):
    return json.dumps(fields) + "\n"


GOOD = row(prompt="the cat", completion=" on the mat .")

# name: what becomes of the files, and what the message names
BAD_DATA = {
    "a row that is no object": (lambda there: (there / "data" / "train.jsonl").write_text(GOOD + "[1, 2]\n"), "train.jsonl:2"),
    "an empty file": (lambda there: (there / "data" / "train.jsonl").write_text(""), "train.jsonl"),
    "empty lines": (lambda there: (there / "data" / "train.jsonl").write_text("\n\n"), "train.jsonl"),
    "bad JSON": (lambda there: (there / "data" / "train.jsonl").write_text(GOOD + '{"prompt": "a",\n' + GOOD), "train.jsonl:2"),
    "bad UTF-8": (lambda there: (there / "data" / "train.jsonl").write_bytes(GOOD.encode() + b'{"text": "\xff"}\n'),
                  "train.jsonl:2"),
    "rows of two forms": (lambda there: (there / "data" / "train.jsonl").write_text(GOOD + row(text="a", label="b")),
                          "train.jsonl:2"),
    "no such file": (lambda there: (there / "data" / "train.jsonl").unlink(), "train.jsonl"),
    "a bad row of the evaluation": (lambda there: (there / "data" / "valid.jsonl").write_text("3\n"), "valid.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name, there, capsys):
    spoil, *named = BAD_DATA[name]
    spoil(there)
    before = seen(there)
    fails(capsys, SHORT, *named)
    assert seen(there) == before


def test_a_label_unseen_in_training(there, capsys):
    write_rows(there / "reviews" / "valid.jsonl", [{"text": "a cat", "label": "good"}, {"text": "a dog", "label": "middling"}])
    before = seen(there)
    fails(capsys, ["train", "encoder", "--data", "reviews", "-o", "run", "--quiet"], "valid.jsonl:2", "'middling'")
    assert seen(there) == before


@pytest.mark.parametrize("text, named", [
    ("[train]\nlearning-rte = 0.1\n", "learning_rate"), ("[train]\nitres = 3\n", "iters"),
    ("[train]\npermits = 'a'\n", "permit")])
def test_a_config_file_with_a_misspelt_key(text, named, there, capsys):
    (there / "config.toml").write_text(text)
    before = seen(there)
    with_config = [*SHORT, "--config", "config.toml"]
    try:
        status = main(with_config)
    except SystemExit as error:  # as argparse ends for a misspelt flag
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and named in err and "config.toml" in err and seen(there) == before


def test_tensor_cores_on_a_cpu(there, capsys):
    before = seen(there)
    fails(capsys, [*SHORT, "--base-dtype", "float16", "--half-products"], "on the cpu", "add --device gpu", status=2)
    assert seen(there) == before


def test_no_gpu(there, capsys):
    from minilora import backend

    if not backend.gpu_problem():
        pytest.skip("there is one")
    before = seen(there)
    fails(capsys, [*SHORT, "--device", "gpu"], "GPU")
    assert seen(there) == before


# -- where it is written ----------------------------------------------------------------------------------------------


def test_into_the_folder_of_the_base(there, capsys):
    """The base would be written over by what it becomes."""
    before = seen(there)
    for words in ([*SHORT[:5], "base", *SHORT[6:]], [*SHORT[:5], "base", *SHORT[6:], "--full"],
                  [*SHORT[:5], there / "base" / ".." / "base", *SHORT[6:]]):
        fails(capsys, words, "base", "another folder")
        assert seen(there) == before


def test_the_output_is_a_file(there, capsys):
    (there / "run").write_text("mine")
    before = seen(there)
    fails(capsys, SHORT, "run", "this is a file")
    assert seen(there) == before


def test_a_run_is_there_already(there, capsys):
    assert main(SHORT) == 0
    capsys.readouterr()
    before = seen(there)
    assert "To go on with it: --resume;" in fails(capsys, SHORT, "holds a run already")
    assert seen(there) == before


def test_a_disk_that_is_full_from_the_beginning(there, capsys, monkeypatch):
    before = seen(there)
    monkeypatch.setattr(files, "save_state", full)
    fails(capsys, SHORT, "the disk is full")
    assert seen(there) == before


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up(there, capsys, monkeypatch):
    """The last checkpoint stays, it is told and tried again; the exit code is not 0; and the run goes on when there is room."""
    assert main([*SHORT[:5], "alone", *SHORT[6:]]) == 0
    save, calls = files.save_state, []

    def some(*arguments):
        calls.append(1)
        (save if len(calls) < 3 else full)(*arguments)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.setattr(files, "save_state", some)
        assert main(SHORT) == 1
    err = capsys.readouterr().err
    assert "The last checkpoint, of step 1, is whole. Saving is tried again after step 3" in err
    assert "of step 1, is whole; what was trained after it is in memory only" in err and len(calls) == 4
    assert scan.steps(there / "run") == [0, 1] and not (there / "run" / "adapter_model.safetensors").exists()
    assert main([*SHORT, "--resume"]) == 0
    assert (there / "run" / "adapter_model.safetensors").read_bytes() == \
        (there / "alone" / "adapter_model.safetensors").read_bytes()


# -- when it goes on --------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(there, capsys):
    """A run with checkpoints of its three steps."""
    assert main([*SHORT, "--keep", "9"]) == 0
    capsys.readouterr()
    return there


@pytest.mark.parametrize("more, named", [
    (["--learning-rate", "0.5"], ["learning_rate", "--permit"]), (["--rank", "3"], ["another folder"]),
    (["--seed", "3"], ["seed"]), (["--iters", "2"], ["step 3 was made", "step 2"]), (["--full"], ["trained here"]),
    (["--threads", "2"], ["threads"]), (["--permit", "nonsense"], ["'nonsense'", "expected some of"])])
def test_going_on_with_something_else(more, named, begun, capsys):
    before = seen(begun)
    fails(capsys, [*SHORT, "--resume", *more], *named)
    assert seen(begun) == before


def test_going_on_with_other_data_or_another_base(begun, capsys):
    rows = (begun / "data" / "train.jsonl").read_text().splitlines(True)
    (begun / "data" / "train.jsonl").write_text("".join(rows[1:] + rows[:1]))
    arrays = formats.load_state(begun / "base" / "model.safetensors")
    arrays["model.norm.weight"][3] += np.float32(2.0 ** -23)
    formats.save_state(begun / "base" / "model.safetensors", arrays, {"format": "pt"})
    before = seen(begun)
    fails(capsys, [*SHORT, "--resume"], "the training data", "the frozen weights: 1 of", "norm.weight",
          "--resume --permit base,data")
    assert seen(begun) == before
    assert main([*SHORT, "--resume", "--permit", "base,data"]) == 0


def test_going_on_from_a_damaged_checkpoint(begun, capsys):
    """The command that the message names helps."""
    file = begun / "run" / "checkpoints" / "step-000003" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    before = seen(begun)
    err = fails(capsys, [*SHORT, "--resume"], "damaged", "step-000002 is whole")
    assert seen(begun) == before
    command = err.partition("remove what is damaged, ")[2].partition(", and resume")[0].split()
    assert command[:2] == ["rm", "-r"]
    for path in command[2:]:
        shutil.rmtree(path)
    whole = (begun / "run" / "adapter_model.safetensors").read_bytes()
    assert main([*SHORT, "--resume"]) == 0 and (begun / "run" / "adapter_model.safetensors").read_bytes() == whole


# -- while it runs ----------------------------------------------------------------------------------------------------


def test_divergence_leaves_the_last_good_checkpoint(begun, capsys):
    """Exit code 4; the checkpoint before it is whole, no adapter is written over, and the run goes on at a lower rate."""
    adapter = (begun / "run" / "adapter_model.safetensors").read_bytes()
    words = [*TRAIN, "--iters", "6", "--save-every", "1", "--resume", "--permit", "steps,learning_rate"]
    fails(capsys, [*words, "--learning-rate", "1e39"], "diverged in step 4", "a weight is not finite", status=4)
    saved = scan.newest(begun / "run")
    assert saved is not None and saved.contents.values["step"] == 3
    assert all(np.isfinite(array).all() for array in saved.contents.arrays.values() if array.dtype.kind == "f")
    assert (begun / "run" / "adapter_model.safetensors").read_bytes() == adapter
    assert main([*words, "--learning-rate", "1e-4"]) == 0 and scan.steps(begun / "run")[-1] == 6


SLOWED = """
import sys, time
sys.modules["matplotlib"] = None
from minilora.train import run
update = run.Run.update
def slowed(self):
    made = update(self)
    print(self.step, flush=True)
    time.sleep(0.05)
    return made
run.Run.update = slowed
from minilora.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [15, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal(number, there, tmp_path):
    """130, and the line that resumes; resumed, it ends as if nothing had been."""
    words = [*TRAIN[:-1], "--iters", "9", "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", SLOWED, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and err.count("\n") == 1, err
    assert "and saved. It goes on with the same command and --resume" in err and "resume=True" not in err
    assert main([*words, "--resume"]) == 0 and main([*words[:5], "alone", *words[6:]]) == 0
    assert (there / "run" / "adapter_model.safetensors").read_bytes() == \
        (there / "alone" / "adapter_model.safetensors").read_bytes()
