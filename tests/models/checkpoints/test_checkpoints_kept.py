"""Checkpoints whose matrices stay in 16 bits where the file has them: models of every architecture, saved, adapted, run."""

import json
import pickle
from pathlib import Path

import checkpoint_cases
import numpy
import pytest
import stored_models

from conftest import fetch
from minilora import formats, lora, models, nn, quant
from minilora.errors import DTypeError
from minilora.formats.tensors.reading import open_state
from minilora.formats.tensors.writing import save_state
from minilora.stored import Stored
from minilora.train.checkpoints.identity import frozen

STORED = stored_models.FOR_FILES
QUICK = ("GPT2LMHeadModel", "BertForMaskedLM", "DebertaV2Model", "LlamaForCausalLM")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
       for name in (*checkpoint_cases.ARCHITECTURES, *STORED)]


@pytest.fixture(params=["float16", "bfloat16"])
def kind(request):
    return pytest.importorskip("ml_dtypes").bfloat16 if request.param == "bfloat16" else request.param


def written(architecture, folder, kind, **more):
    if architecture in STORED:
        stored_models.folder_of(architecture, folder, dtype=kind, **more)
        return stored_models.batch()
    checkpoint_cases.write_vectors(folder, architecture, dtype=kind, **more)
    return checkpoint_cases.batch(checkpoint_cases.ARCHITECTURES[architecture][0], "left")


def both(folder, **settings):
    return models.load(folder, dtype="keep", **settings), models.load(folder, dtype="float32", **settings)


def held(model):
    return {path: p.data for path, p in model.named_parameters() if isinstance(p.data, Stored)}


def lies_in_the_file(array):
    while isinstance(array.base, numpy.ndarray):
        array = array.base
    return not array.flags.owndata and not array.flags.writeable


@pytest.mark.parametrize("architecture", ALL)
def test_every_architecture_computes_the_same(architecture, tmp_path, kind):
    ids, mask = written(architecture, tmp_path, kind)
    kept, whole = both(tmp_path)
    matrices = {path for path, p in whole.named_parameters() if p.ndim > 1}
    assert set(held(kept)) == matrices and matrices
    assert {p.dtype.name for p in kept.parameters()} == {"float32"}
    assert all(lies_in_the_file(data.codes) for data in held(kept).values())
    vectors = [p.data for path, p in kept.named_parameters() if path not in matrices]
    assert all(type(v) is numpy.ndarray and v.dtype == "float32" for v in vectors)
    for model in (kept, whole):
        model.requires_grad(False)
        targets = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and "." in path]
        lora.inject(model, lora.Config(r=2, target_modules=targets[:8], init_lora_weights=False), rng=1)
    y, other = fetch(kept(ids, attention_mask=mask)), fetch(whole(ids, attention_mask=mask))
    numpy.testing.assert_allclose(y, other, rtol=0, atol=2e-5 * max(1.0, numpy.abs(other).max()))
    for model in (kept, whole):
        y = model(ids, attention_mask=mask)
        (y * y).sum().backward()
    for (path, p), (_, q) in zip(kept.named_parameters(), whole.named_parameters()):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            expected = fetch(q.grad)
            numpy.testing.assert_allclose(fetch(p.grad), expected, rtol=0, atol=1e-4 * max(1.0, numpy.abs(expected).max()))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertForMaskedLM", STORED[0]])
def test_saving_gives_the_file_back(architecture, tmp_path, kind):
    written(architecture, tmp_path / "one", kind)
    kept = models.load(tmp_path / "one", dtype="keep")
    models.save(kept, tmp_path / "two")
    one, two = (open_state(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name, array in one.items():
        wide = array.ndim < 2
        assert two[name].dtype == ("float32" if wide else array.dtype), name
        numpy.testing.assert_array_equal(two[name].astype("float32"), array.astype("float32"))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == numpy.dtype(kind).name
    again = models.load(tmp_path / "two", dtype="keep")
    for path, data in held(kept).items():
        assert (held(again)[path].dense() == data.dense()).all()


def test_files_that_put_tensors_at_odd_addresses(tmp_path, kind):
    ids, mask = written("GPT2LMHeadModel", tmp_path, kind)
    path = tmp_path / "model.safetensors"
    before = fetch(models.load(tmp_path, dtype="keep")(ids, attention_mask=mask))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8:8 + length] + b" " + data[8 + length:])
    kept = models.load(tmp_path, dtype="keep")
    assert not any(W.codes.flags.aligned for W in held(kept).values()) and all(map(lies_in_the_file, (
        W.codes for W in held(kept).values())))
    numpy.testing.assert_array_equal(fetch(kept(ids, attention_mask=mask)), before)
    assert len(pickle.dumps(kept)) > 0


def test_a_model_in_parts_of_several_widths(tmp_path):
    ids, mask = written("GPT2LMHeadModel", tmp_path, "float16")
    tensors = {name: array.astype("float32") if ".1." in name else array
               for name, array in formats.load_state(tmp_path / "model.safetensors").items()}
    save_state(tmp_path / "model.safetensors", tensors)
    kept, whole = both(tmp_path)
    assert all(".1." not in path for path in held(kept)) and held(kept)
    one, other = (fetch(model(ids, attention_mask=mask)) for model in (kept, whole))
    numpy.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_drawn_is_float32_and_trains(tmp_path, kind):
    ids, mask = written("BertModel", tmp_path, kind)
    kept = models.load(tmp_path, dtype="keep", head="sequence_classification", labels=3, rng=0)
    lora.inject(kept, lora.Config(r=2, target_modules=["query"], modules_to_save=["classifier"]), rng=1)
    kept.train()
    kept(ids, numpy.array([1, 0]), attention_mask=mask).backward()
    assert all(p.grad is not None for p in kept.parameters() if p.trainable)
    with pytest.raises(DTypeError, match="held as"):
        kept.requires_grad()


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", STORED[0]])
def test_generation_with_a_cache(architecture, tmp_path, kind):
    if not any(word in architecture for word in ("LMHead", "CausalLM")):
        architecture = next(name for name in STORED if "CausalLM" in name)
    ids, _ = written(architecture, tmp_path, kind)
    kept, whole = both(tmp_path)
    one, other = (models.generate(model, ids[:1, :4], max_new_tokens=4) for model in (kept, whole))
    numpy.testing.assert_array_equal(numpy.asarray(one[0]), numpy.asarray(other[0]))


def test_adapters_belong_to_both(tmp_path, kind):
    written("GPT2LMHeadModel", tmp_path, kind)
    kept, whole = both(tmp_path)
    config = lora.Config(r=2, target_modules=["c_attn", "wte"], init_lora_weights=False)
    for model, other, name in ((kept, whole, "a"), (whole, kept, "b")):
        lora.inject(model, config, rng=1)
        formats.save_adapter(model, tmp_path / name)
        report = formats.load_adapter(other, tmp_path / name, "loaded")
        assert not any("not the one" in note for note in report.notes), report.notes
        lora.remove(other, "loaded")
        lora.remove(model, "default")


def test_a_run_knows_its_base(tmp_path, kind):
    written("GPT2LMHeadModel", tmp_path, kind)
    kept, whole = both(tmp_path)
    for model in (kept, whole):
        model.requires_grad(False)
    assert frozen(kept) == frozen(models.load(tmp_path, dtype="keep").requires_grad(False))
    assert all((frozen(kept)[path] == frozen(whole)[path]) == (path not in held(kept)) for path in frozen(whole))
    changed = models.load(tmp_path, dtype="keep").requires_grad(False)
    path = next(iter(held(changed)))
    p = dict(changed.named_parameters())[path]
    codes = p.data.codes.copy()
    codes.view("uint16")[0, 0] ^= 1
    p.data = quant.Sixteen(codes)
    assert [name for name, one in frozen(changed).items() if one != frozen(kept)[name]] == [path]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_loading_and_a_step_leave_the_matrices_in_the_file(tmp_path):
    config = models.GPT2Config(vocab_size=4096, n_positions=32, n_embd=256, n_layer=4, n_head=4)
    model = models.GPT2(config, rng=0)
    quant.quantize(model.requires_grad(False), "float16")
    models.save(model, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    del model

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) * 1024

    models.load(tmp_path, dtype="keep")
    before = private()
    kept = models.load(tmp_path, dtype="keep")
    assert private() - before < size / 8 and sum(W.nbytes for W in held(kept).values()) > 0.9 * size
    lora.inject(kept, lora.Config(r=2, target_modules=["c_attn"]), rng=1)
    ids = numpy.arange(16).reshape(2, 8)
    kept.loss(ids, ids).backward()
    assert all(lies_in_the_file(W.codes) for W in held(kept).values())
    assert kept(ids).dtype == "float32"
