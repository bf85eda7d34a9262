"""Folders in 4 bits made file to file: the same as in memory, what lies beside untouched, and back again."""
import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from formats.quantised.four_bit_bases import KINDS, gpt2, llama

from minilora import formats, models, quant
from minilora.errors import ConfigError, FileError, FormatError, StateError


def base(folder, make=llama, shard=None, **more):
    models.save(make(**more), folder, *([] if shard is None else [shard]))
    (folder / "tokenizer.json").write_bytes(b"{\r\n}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(b"{ }")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind, double", KINDS)
def test_as_in_memory(kind, double, make, tmp_path):
    folder = base(tmp_path / "base", make)
    before = digest(folder)
    report = models.quantize_files(folder, tmp_path / "files", kind, double=double)
    model = models.load(folder)
    held = quant.quantize(model.requires_grad(False), kind, double=double)
    models.save(model, tmp_path / "memory")
    assert (tmp_path / "files" / "model.safetensors").read_bytes() == (tmp_path / "memory" / "model.safetensors").read_bytes()
    said, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("files", "memory"))
    assert said["quantization_config"] == other["quantization_config"]
    assert digest(folder) == before
    assert (tmp_path / "files" / "tokenizer.json").read_bytes() == b"{\r\n}"
    assert (tmp_path / "files" / "1_Pooling" / "config.json").read_bytes() == b"{ }"
    assert not (tmp_path / "files" / "pytorch_model.bin").exists() and "pytorch_model.bin" in str(report)
    assert len(report.rows) == len(held.rows)
    assert report.as_dict()["bits"] == pytest.approx(held.bits)
    for row, own in zip(sorted(report.rows), sorted(held.rows)):
        assert (row.wrong / row.whole) ** 0.5 == pytest.approx(own.error, rel=1e-4)
    assert {name: value for name, value in said.items() if name != "quantization_config"} == \
        json.loads((folder / "config.json").read_text())


def test_several_files_and_layers_that_are_left(tmp_path):
    folder = base(tmp_path / "base", shard=60_000)
    report = models.quantize_files(folder, tmp_path / "out", exclude=["model.layers.1.mlp"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    state = formats.open_state(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in state.values()) and len(state.parts) > 2
    assert {part.path.name for part in state.parts} == {path.name for path in folder.glob("model-*.safetensors")}
    assert len(report.rows) == 11 and not any("layers.1.mlp" in row.name for row in report.rows)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))]
    model = models.load(folder)
    quant.quantize(model.requires_grad(False), exclude=["model.layers.1.mlp"])
    np.testing.assert_allclose(models.load(tmp_path / "out")([[1, 2]]).data, model([[1, 2]]).data, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_back_again(dtype, make, tmp_path):
    models.quantize_files(base(tmp_path / "base", make, shard=60_000), tmp_path / "four")
    report = models.dequantize_files(tmp_path / "four", tmp_path / "back", dtype)
    assert report.dequantized == dtype and not report.rows and "decoded from 4 bits" in str(report)
    four, back = models.load(tmp_path / "four"), models.load(tmp_path / "back")
    held = dict(four.named_parameters())
    for path, p in back.named_parameters():
        np.testing.assert_array_equal(np.asarray(p.data), np.asarray(held[path].data).astype(dtype).astype(p.dtype), path)
    said, first = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "base"))
    assert said == {**first, "dtype": dtype}
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    first, again = (formats.open_state(tmp_path / name / "model.safetensors.index.json") for name in ("base", "back"))
    assert first.shapes == again.shapes


def test_once_more_gives_the_same_codes(tmp_path):
    models.quantize_files(base(tmp_path / "base"), tmp_path / "four", double=False)
    models.dequantize_files(tmp_path / "four", tmp_path / "back", "float32")
    models.quantize_files(tmp_path / "back", tmp_path / "again", double=False)
    a, b = (formats.load_state(tmp_path / name / "model.safetensors") for name in ("four", "again"))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_what_is_refused(tmp_path):
    folder = base(tmp_path / "base")
    models.quantize_files(folder, tmp_path / "four")
    for call, kind, text in [
            (lambda: models.quantize_files(tmp_path / "four", tmp_path / "x"), FormatError, "it is quantised already"),
            (lambda: models.quantize_files(folder, folder), FileError, "from which the result is made"),
            (lambda: models.quantize_files(folder, tmp_path / "four"), FileError, "--overwrite"),
            (lambda: models.quantize_files(folder, tmp_path / "x", "int8"), ConfigError, "'nf4' and 'fp4'"),
            (lambda: models.quantize_files(folder, tmp_path / "x", blocksize=63), ConfigError, "blocksize"),
            (lambda: models.quantize_files(folder, tmp_path / "x", exclude=["no"]), ConfigError,
             "no layer is named 'no'"),
            (lambda: models.dequantize_files(folder, tmp_path / "x"), ConfigError, "is not in 4 bits"),
            (lambda: models.dequantize_files(tmp_path / "four", tmp_path / "x", "int8"), ConfigError, "dtype must be"),
            (lambda: models.quantize_files(tmp_path / "none", tmp_path / "x"), FileError, "no such folder")]:
        with pytest.raises(kind, match=text):
            call()
    state = formats.load_state(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    formats.save_state(folder / "model.safetensors", state)
    with pytest.raises(StateError, match="model.layers.1.mlp.up_proj.weight: "):
        models.quantize_files(folder, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "four"]


def test_a_rehearsal_writes_nothing(tmp_path):
    folder = base(tmp_path / "base")
    rehearsed = models.quantize_files(folder, tmp_path / "x", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert models.quantize_files(folder, tmp_path / "x").rows == rehearsed.rows
    assert models.quantize_files(folder, tmp_path / "x", "fp4", overwrite=True).kind == "fp4"
    assert models.load(tmp_path / "x").model.layers[0].mlp.up_proj.weight.data.kind == "fp4"


@pytest.mark.slow
def test_memory_is_that_of_a_weight(tmp_path):
    folder = base(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    size = (folder / "model.safetensors").stat().st_size
    models.quantize_files(folder, tmp_path / "warm")
    tracemalloc.start()
    models.quantize_files(folder, tmp_path / "four")
    first, _ = tracemalloc.get_traced_memory()[1], tracemalloc.reset_peak()
    models.dequantize_files(tmp_path / "four", tmp_path / "back", "float32")
    second = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first < size / 8 and second < size / 8, (size, first, second)
