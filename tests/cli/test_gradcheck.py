"""`minilora gradcheck`."""
import json

import pytest

from minilora import ops
from minilora.cli import gradcheck
from minilora.cli.main import main
from minilora.lora import gradient

KEYS = ["schema", "passed", "device", "s", "sizes", "checks"]
ROW_KEYS = ["kind", "gradient", "compared", "error", "tolerance", "slope", "lower", "guess", "passed"]


def reported(capsys, *words, status=0):
    assert main(["gradcheck", *words, "--json", "--quiet"]) == status
    return json.loads(capsys.readouterr().out)


def test_all_kinds(capsys):
    report = reported(capsys)
    assert list(report) == KEYS and report["schema"] == "minilora.gradcheck/1" and report["passed"] and report["s"] == 1.5
    assert {tuple(row) for row in report["checks"]} == {tuple(ROW_KEYS)}
    assert list(dict.fromkeys(row["kind"] for row in report["checks"])) == list(gradcheck.KINDS)
    assert all(row["error"] < 1e-9 and row["lower"] is None for row in report["checks"])


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 1e-9, 1e-5), ("float16", 1e-6, 0.06)])
def test_a_lower_precision(dtype, least, most, capsys):
    report = reported(capsys, "--only", "linear", "--in", "40", "--out", "30", "--rank", "8", "--rows", "16", "--dtype", dtype)
    assert [row["gradient"] for row in report["checks"]] == ["dx", "dW", "db", "dA", "dB"]
    assert all(least < row["lower"] < most for row in report["checks"])


def test_sizes_of_one(capsys):
    assert reported(capsys, "--in", "1", "--out", "1", "--rank", "1", "--rows", "1", "--rslora", "--alpha", "-2")["s"] == -2.0


def test_the_table(capsys):
    assert main(["gradcheck", "--dora", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    assert "dora       dW" in out and "in float32" in out and "all gradients are right" in out and err == "checking dora ...\n"
    assert max(map(len, out.split("\n"))) <= 80


def test_a_planted_mistake_is_exit_code_3(capsys, monkeypatch):
    real = gradient.LoRALinear.backward

    def wrong(self, dy):
        found = list(real(self, dy))
        return tuple(found[:3] + [2.0 * found[3]] + found[4:])

    monkeypatch.setattr(gradient.LoRALinear, "backward", wrong)
    report = reported(capsys, "--only", "linear", status=3)
    assert not report["passed"] and [row["gradient"] for row in report["checks"] if row["error"] > 1e-3] == ["dA"]
    assert [row["gradient"] for row in report["checks"] if not row["passed"]] == ["dA"]  # the others are right, and called so
    assert main(["gradcheck", "--only", "linear"]) == 3
    out = capsys.readouterr().out
    assert "WRONG" in out and "linear dA: " in out and "A GRADIENT IS WRONG" in out


def test_a_broken_promise_is_told(capsys, monkeypatch):
    monkeypatch.setattr(gradcheck, "case_of", lambda kind, args, s, rng: gradcheck.Case(
        lambda x: ops.silu(x) + float(rng.standard_normal()), {"x": rng.standard_normal(3)}))
    assert not reported(capsys, "--only", "linear", status=3)["passed"]


@pytest.mark.parametrize(("words", "status"), [(["--rank", "0"], 2), (["--only", "x"], 2), (["--alpha", "0"], 1),
                                               (["--in", "a"], 2)])
def test_what_is_wrong(words, status, capsys):
    assert main(["gradcheck", *words]) == status
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("wrong", "words"), [
    (lambda found: (*found[:4], found[4].T), "input 4 has shape (6, 2) and wants a gradient of that shape, got shape (2, 6)"),
    (lambda found: found[0] @ found[0], "ValueError"),
])
def test_a_backward_that_does_not_run_is_told_in_words(wrong, words, capsys, monkeypatch):
    real = gradient.LoRALinear.backward
    monkeypatch.setattr(gradient.LoRALinear, "backward", lambda self, dy: wrong(real(self, dy)))
    (row,) = reported(capsys, "--only", "linear", "--dtype", "float32", status=3)["checks"]
    assert (row["gradient"], row["slope"], row["error"], row["passed"]) == ("backward runs", None, None, False)
    assert words in row["guess"]
    assert main(["gradcheck", "--only", "linear"]) == 3
    out = capsys.readouterr().out
    assert "backward runs" in out and max(map(len, out.split("\n"))) <= 80
