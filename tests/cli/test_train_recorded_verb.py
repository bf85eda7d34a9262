"""minilora train --recorded: the bits of the run without it, on the CPU and on a card that records; and what is said."""
import json
import sys
from pathlib import Path

import pytest
import standin
from conftest import need_gpu

from minilora.cli.main import main
from minilora.train import recorded

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import emulator  # noqa: E402 (lies there)

pytest.importorskip("tokenizers")

QUICK = ["--batch-size", "8", "--learning-rate", "0.02", "--rank", "2", "--dropout", "0.1", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)


def ended(folder, out, *words):
    """The bytes of what was trained, and the report."""
    assert main(["train", "base", "--data", "data", "-o", out, *QUICK, *words]) == 0
    (weights,) = [path for path in (folder / out).iterdir() if path.name in ("adapter_model.safetensors", "model.safetensors")]
    return weights.read_bytes(), json.loads((folder / out / "report.json").read_text())


def same(one, other):
    assert one[0] == other[0]
    for name in ("losses", "evaluations", "best", "tokens", "steps"):
        assert one[1][name] == other[1][name], name


@pytest.mark.slow
def test_the_same_bits_where_kernels_are_emulated(there):
    with standin.card(emulator.emulator().kernel, "gpu"):
        same_on_a_card(there, ["--iters", "3"])


@pytest.mark.gpu
@pytest.mark.parametrize("words", [
    [], ["--grad-accumulation-steps", "2", "--max-grad-norm", "0"], ["--precision", "mixed", "--schedule", "linear"],
    ["--few-lengths", "--steps-per-eval", "2"], ["--full"], ["--prefix", "2"], ["--grad-checkpoint", "--sanity"],
    ["--base-dtype", "bfloat16"]], ids=" ".join)
def test_the_same_bits_on_a_card(there, words):
    need_gpu()
    same_on_a_card(there, [*words, "--iters", "12"])


def same_on_a_card(there, words):
    words = [*words, "--device", "gpu"]
    called, repeated = ended(there, "called", *words), ended(there, "recorded", *words, "--recorded")
    same(called, repeated)
    found = repeated[1]["recorded"]
    assert found["graphs"] >= 2 and found["problem"] is None and "recorded" not in called[1]


@pytest.mark.gpu
def test_a_classifier_on_a_card(there):
    need_gpu()
    words = ["train", "encoder", "--data", "reviews", *QUICK, "--iters", "6", "--device", "gpu", "-o"]
    assert main([*words, "called"]) == main([*words, "recorded", "--recorded"]) == 0
    assert json.loads((there / "recorded" / "report.json").read_text())["recorded"]["problem"] is None
    one, other = ((there / out / "adapter_model.safetensors").read_bytes() for out in ("called", "recorded"))
    assert one == other


def test_on_the_cpu_it_is_the_same_training(there, capsys):
    called, repeated = (ended(there, out, "--iters", "4", *more) for out, more in (("first", []), ("second", ["--recorded"])))
    same(called, repeated)
    assert "recorded" not in repeated[1] and not repeated[1]["notes"]
    capsys.readouterr()
    (there / "run.toml").write_text("[train]\nrecorded = true\nfew-lengths = true\n")
    words = ["train", "base", "--data", "data", "-o", "run", "--config", "run.toml"]
    assert main([*words, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["recorded"] is None and "note: --recorded is for a GPU: on the CPU updates are called" in err
    assert main([*words, "--print-config"]) == 0
    assert {"recorded = true", "few-lengths = true"} <= set(capsys.readouterr().out.splitlines())


def test_a_dry_run_counts_the_shapes(there, capsys, monkeypatch):
    monkeypatch.setattr(recorded, "MOST", 1)
    monkeypatch.setattr("minilora.train.header.MOST", 1)
    outs = []
    with standin.card(name="gpu"):
        for more in (["--json"], []):
            assert main(["train", "base", "--data", "data", "-o", "run", "--batch-size", "3", "--dry-run", "--recorded",
                         "--device", "gpu", *more]) == 0
            outs.append(capsys.readouterr().out)
    found, out = json.loads(outs[0])["recorded"], outs[1]
    assert found["most"] == 1 and found["shapes"] > 1
    assert (f"{found['shapes']} shapes of batches in the first epoch, of which 1 are recorded, and the others called: read "
            "with --few-lengths texts come in few") in out


def test_several_processes_are_refused_before_anything_is_read(there, capsys, monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    two = nullcontext(SimpleNamespace(size=2))
    monkeypatch.setattr("minilora.train.distributed.launchers.find_comm", lambda device: two)
    assert main(["train", "base", "--data", "nowhere", "-o", "run", "--recorded"]) == 2
    assert "--recorded is for one process" in capsys.readouterr().err and not (there / "run").exists()
