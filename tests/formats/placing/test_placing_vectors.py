"""Stored adapters of PEFT, and the outputs of the models that it wrapped: tests/data/make_peft_load_vectors.py made them."""
import json
from pathlib import Path

import numpy as np
import pytest
import twins
from checkpoint_cases import numbers

from minilora.formats.adapters.dialect import Source
from minilora.formats.adapters.reading import read_source
from minilora.formats.placing.loading import load_adapter
from minilora.formats.placing.saving import saved_adapter

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "peft_load_vectors.json").read_text())


def base(kind, dtype):
    """The twin of the model that PEFT wrapped; GPT-2's matrices are written down as there, (in, out)."""
    shapes = {name: p.shape for name, p in twins.OURS[kind]().named_parameters()}
    turned = {name: shape[::-1] if name.endswith("c_proj.weight") else shape for name, shape in shapes.items()}
    return twins.ours(kind, {name: numbers(name, shape) for name, shape in turned.items()}, dtype)


@pytest.mark.parametrize("name", VECTORS)
def test_the_outputs_of_peft(name):
    case = VECTORS[name]
    dtype = case["dtype"]
    tensors = {key: np.array(array, dtype) for key, array in case["tensors"].items()}
    saved = read_source(Source(Path("stored"), tensors, {"format": "pt"}, case["config"]))
    model, x = base(case["kind"], dtype), twins.drawn_input(case["kind"])
    x = x if x.dtype.kind == "i" else x.astype(dtype)
    before = model(x).data
    report = load_adapter(model, saved)
    expected = np.array(case["output"], dtype)
    np.testing.assert_allclose(model(x).data, expected, rtol=0, atol={"float64": 1e-10, "float32": 1e-6}[dtype]
                               * np.abs(expected).max(), err_msg=str(report))
    assert np.abs(before - expected).max() > 1e-3
    again = base(case["kind"], dtype)
    load_adapter(again, saved_adapter(model))
    np.testing.assert_allclose(again(x).data, model(x).data, rtol=0, atol=1e-6 if dtype == "float32" else 1e-14)
