"""Reports that show themselves, terse settings: as a REPL shows them, on a terminal and off it, and what stays as it was."""
import copy
import dataclasses
import importlib
import io
import pickle
import pkgutil
import sys

import numpy as np
import pytest

import minilora
from minilora import engine, lora, nn, quant, train, tuners
from minilora.shown import shown, tersely
from minilora.terminal import fitting

APART = {"Whole", "Drawing", "Verdict"}  # a path, a picture, and what reports derive from: no reports


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def reports():
    """Of a model of 12 layers."""
    config = nn.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=12, n_head=2)
    settings = lora.Config(r=2, target_modules="all-linear")
    model, plain = nn.GPT2(config, rng=0), nn.GPT2(config, rng=0).requires_grad(False)
    made = {"plan": lora.plan(plain, settings, batch=64), "injected": lora.inject(model, settings, rng=0),
            "summary": minilora.summary(model), "status": lora.status(model), "match": lora.match(plain, settings),
            "ledger": engine.ledger(model(**model.example(1, 8)))}
    for _, module in model.named_modules():
        if isinstance(module, lora.Adapter):
            module.lora_B.data[...] = 0.25
    made["merged"], made["quantised"] = lora.merge(model), quant.quantize(plain)
    return made


def test_a_repl_shows_what_print_shows(reports):
    for name, report in reports.items():
        text = repr(report)
        assert text == str(report) and "\n" in text and "namedtuple" not in text, name
        assert not text.startswith(type(report).__name__ + "("), name


@pytest.mark.parametrize("columns", [60, 80, 100, 140])
def test_a_table_fits_a_terminal(reports, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, report in reports.items():
        lines = repr(report).split("\n")
        assert max(map(len, lines)) <= columns, (name, max(lines, key=len))
        with fitting(columns):
            assert str(report).split("\n") == lines


def test_off_a_terminal_nothing_is_fitted(reports, monkeypatch):
    wide = {name: str(report) for name, report in reports.items()}
    monkeypatch.setenv("COLUMNS", "40")
    assert {name: str(report) for name, report in reports.items()} == wide
    assert max(len(line) for line in wide["merged"].split("\n")) > 80


def test_no_number_is_lost_in_a_narrow_table(reports):
    with fitting(80):
        narrow, summary = str(reports["merged"]), str(reports["summary"])
    for row in reports["merged"].rows:
        assert row.path in narrow and f"{row.gain:.4f}" in narrow
    assert "in every row: " in narrow and "rounding nearest" in narrow
    for row in reports["summary"].rows:
        assert all(f"{name} {shape}" in summary for name, shape in row.shapes.items())  # never broken between them
    assert summary.split("\n")[-1] == reports["summary"].trainable_line


def test_fields_and_equality_stay(reports):
    for report in reports.values():
        assert copy.copy(report) == report and report == report._replace() and len(report) == len(report._fields)
    for name in ("summary", "status", "merged", "quantised"):
        assert pickle.loads(pickle.dumps(reports[name])) == reports[name]

    @shown
    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int

        def __str__(self):
            return f"at {self.x}"

    assert repr(Point(3)) == "at 3" and Point(3) == Point(3) and hash(Point(3)) == hash(Point(3))


def test_every_report_of_the_package_shows_itself():
    found = []
    for module in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if any(part in module.name for part in ("kernels", ".cli", "puzzles", "__main__", "distributed")):
            continue
        for cls in vars(importlib.import_module(module.name)).values():
            if isinstance(cls, type) and cls.__module__ == module.name and cls.__name__ not in APART \
                    and not issubclass(cls, (Exception, str)) \
                    and str(getattr(cls.__str__, "__module__", "")).startswith("minilora"):
                found.append(cls)
                assert cls.__repr__ is cls.__str__, f"{cls.__qualname__}: @shown is missing"
    assert len(found) > 20


# -- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made, text", [
    (lora.Config(), "Config()"),
    (lora.Config(r=8, lora_alpha=8.0), "Config(lora_alpha=8.0)"),
    (lora.Config(r=4, target_modules=["q", "v"], rank_pattern={"v": 2}),
     "Config(r=4, target_modules=('q', 'v'), rank_pattern={'v': 2})"),
    (lora.Config(init_lora_weights=False, inference_mode=True), "Config(init_lora_weights=False, inference_mode=True)"),
    (train.Settings(epochs=2), "Settings(epochs=2.0)"), (train.Settings(), "Settings()"),
    (tuners.PrefixConfig(num_virtual_tokens=3), "PrefixConfig(num_virtual_tokens=3)"),
    (tuners.PromptConfig(num_virtual_tokens=3), "PromptConfig(num_virtual_tokens=3)"),
], ids=str)
def test_settings_show_what_differs_from_the_defaults(made, text):
    assert repr(made) == text
    assert eval(text, {type(made).__name__: type(made)}) == made and made == copy.deepcopy(made)


def test_a_default_of_another_kind_is_shown():
    @tersely
    @dataclasses.dataclass
    class Kinds:
        a: object = 1
        b: object = None
        c: list = dataclasses.field(default_factory=list)
        d: object = np.nan

    assert repr(Kinds()) == "Kinds()" and repr(Kinds(True, 0, [1])) == "Kinds(a=True, b=0, c=[1])"
