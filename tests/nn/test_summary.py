"""The table of a model: sums, shared parameters, and PEFT's line."""
import re

import numpy as np
import pytest

import minilora
from minilora import lora, nn


@pytest.fixture
def model(device):
    rng = np.random.default_rng(0)
    return nn.Sequential(
        nn.Linear(4, 8, rng=rng).requires_grad(False),
        nn.ReLU(),
        nn.Sequential(lora.Linear(8, 8, r=2, lora_alpha=4, dtype="float64", rng=rng)),
        nn.Linear(8, 3, bias=False, rng=rng),
    )


def test_rows(model):
    rows = minilora.summary(model).rows
    assert [(row.path, row.layer, row.trained, row.frozen, row.nbytes) for row in rows] == [
        ("0", "Linear", 0, 40, 160), ("2.0", "Linear", 0, 72, 576), ("2.0.adapters.default", "Adapter", 32, 0, 256),
        ("3", "Linear", 24, 0, 96)]
    assert rows[1].shapes == {"weight": (8, 8), "bias": (8,)} and rows[2].shapes == {"lora_A": (2, 8), "lora_B": (8, 2)}


def test_columns_add_up(model):
    table = minilora.summary(model)
    parameters = list(model.parameters())
    assert table.trained == sum(p.size for p in parameters if p.trainable) == 56
    assert table.frozen == sum(p.size for p in parameters if not p.trainable) == 112
    assert table.nbytes == sum(p.size * p.dtype.itemsize for p in parameters) == 1088
    for column in ("trained", "frozen", "nbytes"):
        assert sum(getattr(row, column) for row in table.rows) == getattr(table, column)


def test_text_has_the_numbers_in_columns(model):
    lines = str(minilora.summary(model)).splitlines()
    assert lines[0].split() == ["layer", "type", "parameters", "(shape)", "trained", "frozen", "bytes"]
    assert lines[3].startswith("2.0 ") and lines[4].startswith("2.0.adapters.default ") and "lora_A (2, 8)" in lines[4]
    body, total = lines[2:6], lines[7]
    numbers = [[int(n.replace(",", "")) for n in re.findall(r"[\d,]+$|[\d,]+(?=  )", line)][-3:] for line in body]
    sums = [sum(column) for column in zip(*numbers)]
    assert total.split() == ["total", *(f"{n:,d}" for n in sums)]
    assert len({len(line) for line in [lines[0], *body, total]}) == 1
    assert set(lines[1]) == set(lines[6]) == {"-"}
    assert lines[8] == "trainable params: 56 || all params: 168 || trainable%: 33.3333"


def test_shared_parameter_counts_once():
    a, b = nn.Linear(4, 4, rng=np.random.default_rng(0)), nn.Linear(4, 4, rng=np.random.default_rng(1))
    b.weight = a.weight
    table = minilora.summary(nn.Sequential(a, b))
    assert [(row.path, row.trained) for row in table.rows] == [("0", 20), ("1", 4)]
    assert table.nbytes == 96


def test_shared_module_counts_once():
    layer = nn.Linear(4, 4, rng=np.random.default_rng(0))
    assert minilora.summary(nn.Sequential(layer, layer)).trained == 20


@pytest.mark.parametrize("trained, frozen, line", [
    (0, 0, "trainable params: 0 || all params: 0 || trainable%: 0.0000"),
    (3, 0, "trainable params: 3 || all params: 3 || trainable%: 100.0000"),
    (294_912, 124_734_720, "trainable params: 294,912 || all params: 125,029,632 || trainable%: 0.2359"),
])
def test_line_is_the_one_people_search_for(trained, frozen, line):
    assert nn.Summary((), trained, frozen, 0).trainable_line == line


def test_model_without_parameters():
    table = minilora.summary(nn.ReLU())
    assert table.rows == () and str(table).splitlines()[-2].split() == ["total", "0", "0", "0"]


def test_merging_changes_no_count(device):
    layer = lora.Linear(6, 5, r=2, lora_alpha=2, rng=np.random.default_rng(0))
    before = minilora.summary(layer)
    layer.merge()
    assert minilora.summary(layer) == before


def test_top_level_layer_is_named_model():
    assert "\n(model)  Linear " in str(minilora.summary(nn.Linear(2, 2)))
