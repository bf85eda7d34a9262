"""llama.cpp's adapters: one alpha for all, names by architecture, rows of queries and keys in another order."""
import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_oracle import D, adapter, assert_rounded, assert_same, source, update

from minilora.errors import FileError, FormatError
from minilora.formats.adapters.gguf.file import Gguf
from minilora.formats.adapters.gguf.layout import open_gguf
from minilora.formats.adapters.gguf.names import ARCHITECTURES, permuted, restored

RNG = np.random.default_rng(0)
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
SHAPES = {"self_attn.q_proj": (16, 6), "self_attn.k_proj": (8, 6), "self_attn.v_proj": (8, 6), "self_attn.o_proj": (6, 16),
          "mlp.gate_proj": (10, 6), "mlp.up_proj": (10, 6), "mlp.down_proj": (6, 10)}
GPT2 = {"attn.c_attn": (18, 6), "attn.c_proj": (6, 6), "mlp.c_fc": (24, 6), "mlp.c_proj": (6, 24)}


def drawn(rng, architecture, layers=(0, 3), ranks=(2,), dtype="float32", s=None):
    """An adapter of all modules of an architecture, all with one alpha unless s is given."""
    shapes = GPT2 if architecture == "gpt2" else SHAPES
    start = ARCHITECTURES[architecture].layers
    places = {f"{start}.{i}.{name}": shape for i in layers for name, shape in shapes.items()} | {"lm_head": (12, 6)}
    embedding = "transformer.wte" if architecture == "gpt2" else "model.embed_tokens"
    updates = {}
    for path, (out, into) in [*places.items(), (embedding, (6, 12))]:
        r = int(rng.choice(ranks))
        updates[path] = update(rng, "embedding" if path == embedding else "linear", r=r, out=out, into=into, dtype=dtype,
                               s=s or 3 / r)
    return adapter(updates)


def on_disk(folder, written):
    written.pack(folder / "adapter.gguf")
    return open_gguf(folder / "adapter.gguf")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(architecture):
    gguf = pytest.importorskip("gguf")
    known = ARCHITECTURES[architecture]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 40)
    for path in [*known.outer, *(f"{known.layers}.{i}.{inner}" for i in (0, 39) for inner in known.inner)]:
        assert known.to_gguf(path) == names.get_name(f"{path}.weight", (".weight",)) .removesuffix(".weight"), path
        assert known.from_gguf(known.to_gguf(path)) == path
        assert known.to_gguf(path.split(".", 1)[-1] if "." in path else path) == known.to_gguf(path)
    assert known.to_gguf("model.layers.0.self_attn.q_norm") is None and known.from_gguf("blk.0.attn_norm") is None
    assert known.to_gguf("h.0") is None and known.from_gguf("output_norm") is None


def test_rows_are_reordered_as_llama_cpp_rotates_them():
    B = np.arange(16.0).reshape(8, 2)
    turned = permuted(B, 2)  # heads of 4 rows: halves (0, 1) and (2, 3) become pairs (0, 2) and (1, 3)
    assert np.array_equal(turned, B[[0, 2, 1, 3, 4, 6, 5, 7]])
    assert np.array_equal(restored(turned, 2), B)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_package_reads_what_is_written(tmp_path, architecture, dtype):
    gguf = pytest.importorskip("gguf")
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
    before = drawn(RNG, architecture, ranks=(1, 2, 4), dtype="float32" if dtype == "bfloat16" else dtype)
    base = {**LLAMA, "model_type": architecture}
    written = Gguf().write(before, base=base, dtype="bfloat16" if dtype == "bfloat16" else None)
    on_disk(tmp_path, written)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == ("adapter", "lora", architecture)
    alpha, found = fields["adapter.lora.alpha"], {}
    for tensor in reader.tensors:
        data = tensor.data.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else tensor.data
        found[tensor.name] = data.astype("float64").reshape(tuple(tensor.shape)[::-1])
    known = ARCHITECTURES[architecture]
    assert len(found) == 2 * len(before.updates)
    for path, u in before.updates.items():
        name = known.to_gguf(path)
        a, b = found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"]
        if name == "token_embd":
            a = a.T
        if architecture == "llama" and name.endswith(("attn_q", "attn_k")):
            b = restored(b, 4 if name.endswith("attn_q") else 2)
        assert np.array_equal(alpha / len(a) * (b @ a), D(u)), path


@given(st.integers(0, 2 ** 32), st.sampled_from([*ARCHITECTURES]), st.sampled_from(["float32", "float16"]))
def test_drawn_adapters_come_back_to_the_bit(tmp_path_factory, seed, architecture, dtype):
    pytest.importorskip("gguf")
    before = drawn(np.random.default_rng(seed), architecture, ranks=(1, 2, 4), dtype=dtype)
    written = Gguf().write(before, architecture=architecture, heads=4, kv_heads=2)
    given = on_disk(tmp_path_factory.mktemp("gguf"), written)
    assert Gguf().recognise(given)
    assert_same(before, Gguf().read(given, base=LLAMA))


def test_scalings_that_differ_are_folded():
    pytest.importorskip("gguf")
    before = drawn(RNG, "qwen2")
    path = "model.layers.3.mlp.up_proj"
    updates = {**before.updates, path: dataclasses.replace(before.updates[path], s=-6.0)}
    written = Gguf().write(adapter(updates), architecture="qwen2")
    assert np.array_equal(written.tensors["blk.3.ffn_up.weight.lora_b"], -4 * updates[path].B)
    updates[path] = dataclasses.replace(updates[path], s=1.1)
    with pytest.raises(FormatError, match=f"{path}: s = 1.1 in place of 1.5: .*alpha is 3 for all. fold=True"):
        Gguf().write(adapter(updates), architecture="qwen2")
    written = Gguf().write(adapter(updates), architecture="qwen2", fold=True)
    assert "folded: the scalings of 1" in written.notes[0]
    assert_rounded(updates[path], dataclasses.replace(updates[path], s=1.5, B=written.tensors["blk.3.ffn_up.weight.lora_b"]))


def test_an_alpha_that_is_no_float32_is_rounded_and_said(tmp_path):
    pytest.importorskip("gguf")
    before = drawn(RNG, "qwen2", s=0.1)
    written = Gguf().write(before, architecture="qwen2")
    assert "alpha 0.2 is no float32" in written.notes[0]
    assert Gguf().read(on_disk(tmp_path, written)).updates["lm_head"].s == pytest.approx(0.1, rel=6e-8)
    with pytest.raises(FormatError, match="outside float32"):
        Gguf().write(drawn(RNG, "qwen2", s=1e60), architecture="qwen2")


@pytest.mark.parametrize("options, message", [
    ({}, "architecture=None: give base"),
    (dict(architecture="gemma"), "one of gpt2, llama, qwen2, qwen3"),
    (dict(base={"model_type": "gemma2"}), "model_type 'gemma2'"),
    (dict(architecture="llama"), "blk.0.attn_q: llama.cpp has these rows in another order.*heads=32"),
    (dict(architecture="llama", heads=3), "3 heads"),
    (dict(architecture="llama", heads=True), "True heads"),
    (dict(base={**LLAMA, "tie_word_embeddings": True}), "lm_head: the base's head is its embedding"),
    (dict(architecture="gpt2"), "model.layers.0.self_attn.q_proj: llama.cpp has no linear layer.*transformer.h.0.attn.c_attn"),
])
def test_what_has_to_be_said(options, message):
    pytest.importorskip("gguf")
    with pytest.raises(FormatError, match=message):
        Gguf().write(drawn(RNG, "llama"), **options)


@pytest.mark.parametrize("made, message", [
    (dict(kind="convolution"), "update of a convolution"), (dict(dora=True), "DoRA"), (dict(bias=True), "lora_bias"),
    (dict(dtype="float64"), "dtype='float32'"), (dict(kind="embedding"), "no embedding layer of this path"),
])
def test_what_gguf_cannot_say(made, message):
    pytest.importorskip("gguf")
    with pytest.raises(FormatError, match=message):
        Gguf().write(adapter({"model.layers.0.mlp.up_proj": update(RNG, **made)}), architecture="qwen2")
    with pytest.raises(FormatError, match="two|too"):
        Gguf().write(adapter({"model.layers.0.mlp.up_proj": update(RNG), "layers.0.mlp.up_proj": update(RNG)}),
                     architecture="qwen2")
    with pytest.raises(FormatError, match="expected one of"):
        Gguf().write(adapter({"lm_head": update(RNG)}), architecture="qwen2", dtype="int8")


def fields_of(**more):
    fields = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": "2.0"}
    return {name: value for name, value in {**fields, **more}.items() if value is not None}


PAIR = {"blk.0.ffn_up.weight.lora_a": np.ones((2, 3), "float32"), "blk.0.ffn_up.weight.lora_b": np.ones((5, 2), "float32")}


@pytest.mark.parametrize("tensors, fields, message", [
    (PAIR, {"general.type": "model"}, "general.type: expected 'adapter', got 'model'"),
    (PAIR, {"adapter.type": None}, "adapter.type"),
    (PAIR, {"general.architecture": "gemma"}, "expected one of gpt2"),
    (PAIR, {"adapter.lora.alpha": "0.0"}, "expected a number above 0"),
    (PAIR, {"adapter.lora.alpha": "nan"}, "expected a number above 0"),
    (PAIR, {"adapter.lora.alpha": "-2.0"}, "expected a number above 0"),
    (PAIR, {"adapter.lora.alpha": "an array of 3 values"}, "expected a number above 0"),
    (PAIR, {"adapter.lora.alpha": None}, "expected a number above 0"),
    (PAIR, {"adapter.alora.invocation_tokens": "an array of 3 values"}, "aLoRA"),
    ({**PAIR, "blk.0.attn_norm.weight": np.ones(3)}, {}, "attn_norm.weight: this key is not understood"),
    ({**PAIR, ".weight.lora_a": np.ones(3)}, {}, "not understood"),
    ({"blk.0.ffn_up.weight.lora_a": PAIR["blk.0.ffn_up.weight.lora_a"]}, {}, "weight.lora_b is missing"),
    ({name.replace("ffn_up", "ffn_gate_exps"): array for name, array in PAIR.items()}, {}, "no tensor of this architecture"),
    ({"output.weight.lora_a": np.ones((2, 3), "float32"), "output.weight.lora_b": np.ones((5, 3), "float32")}, {}, "rank 2"),
    ({"token_embd.weight.lora_a": np.float32(1), "token_embd.weight.lora_b": np.float32(1)}, {}, "expected A"),
    ({name.replace("ffn_up", "attn_q"): array for name, array in PAIR.items()}, {"general.architecture": "llama"}, "heads=32"),
    ({}, {}, "no lora_a"),
])
def test_what_is_refused(tensors, fields, message):
    given = source(tensors, metadata=fields_of(**fields))
    assert Gguf().recognise(given) or "general.architecture" not in given.metadata
    with pytest.raises(FormatError, match=message):
        Gguf().read(given)


def test_what_is_recognised():
    assert not Gguf().recognise(source(PAIR)) and not Gguf().recognise(source(PAIR, {"peft_type": "LORA"}, fields_of()))


def text(words):
    return struct.pack("<Q", len(words)) + words.encode()


def file_of(entries=((("blk.0.ffn_up.weight.lora_a"), (3, 2), 0, 0), ("blk.0.ffn_up.weight.lora_b", (2, 5), 0, 32)), data=b"",
            version=3, fields=b"", count=None, kinds=0):
    body = b"GGUF" + struct.pack("<IQQ", version, len(entries) if count is None else count, kinds) + fields
    for name, shape, kind, offset in entries:
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return body + bytes(-len(body) % 32) + data


@pytest.mark.parametrize("made, message", [
    (dict(data=bytes(10)), "ends at byte"),
    (dict(version=1), "version 1"),
    (dict(version=3 << 24), "version"),
    (dict(count=2 ** 63, data=bytes(200)), "ends too early|axes"),
    (dict(kinds=2 ** 60), "ends too early|comes twice|type"),
    (dict(kinds=1, fields=text("a") + struct.pack("<IIQ", 9, 0, 2 ** 60)), "ends too early"),
    (dict(kinds=1, fields=text("a") + struct.pack("<IIQ", 9, 8, 2 ** 60)), "ends too early"),
    (dict(kinds=1, fields=text("a") + struct.pack("<IIQ", 9, 9, 2 ** 60)), "ends too early|type"),
    (dict(kinds=1, fields=text("a") + struct.pack("<I", 99)), "unknown type 99"),
    (dict(kinds=1, fields=struct.pack("<Q", 2) + b"\xff\xff"), "no UTF-8"),
    (dict(kinds=2, fields=2 * (text("a") + struct.pack("<IB", 0, 1)), data=bytes(99)), "'a' comes twice"),
    (dict(kinds=1, fields=text("general.alignment") + struct.pack("<II", 4, 0), data=bytes(99)), "alignment"),
    (dict(kinds=1, fields=text("general.alignment") + struct.pack("<Ii", 5, -8), data=bytes(99)), "alignment"),
    (dict(entries=[("x", (2, 2, 1, 1, 1), 0, 0)], data=bytes(99)), "5 axes"),
    (dict(entries=[("x", (2, 2), 2, 0)], data=bytes(99)), "quantised"),
    (dict(entries=[("x", (2 ** 63, 2 ** 63), 0, 0)], data=bytes(99)), "ends at byte"),
    (dict(entries=[("x", (2,), 0, 0), ("x", (2,), 0, 32)], data=bytes(99)), "comes twice"),
    (dict(entries=[("x", (20,), 0, 0), ("y", (2,), 0, 32)], data=bytes(99)), "lie in the same bytes"),
])
def test_damaged_files(tmp_path, made, message):
    (tmp_path / "x.gguf").write_bytes(file_of(**made))
    with pytest.raises(FormatError, match=message):
        open_gguf(tmp_path / "x.gguf")


def test_a_file_made_by_hand_and_every_cut_of_it(tmp_path):
    place = tmp_path / "x.gguf"
    whole = file_of(data=np.arange(18, dtype="<f4").tobytes())
    place.write_bytes(whole)
    found = open_gguf(place)
    assert len(found.tensors) == 2 and found.tensors["blk.0.ffn_up.weight.lora_a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not found.tensors["blk.0.ffn_up.weight.lora_a"].flags.writeable
    for cut in range(len(whole)):
        place.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            open_gguf(place)
    place.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(FormatError, match="no GGUF file"):
        open_gguf(place)
    with pytest.raises(FileError):
        open_gguf(tmp_path / "none.gguf")


@given(st.data())
def test_a_changed_byte_is_refused_or_read(tmp_path_factory, data):
    whole = bytearray(file_of(kinds=1, fields=text("general.type") + struct.pack("<I", 8) + text("adapter"), data=bytes(72)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    place = tmp_path_factory.mktemp("gguf") / "x.gguf"
    place.write_bytes(whole)
    try:
        found = open_gguf(place)
    except FormatError:
        return
    with pytest.raises(FormatError):
        Gguf().read(found)
    for name in found.tensors:
        assert found.tensors[name].shape == found.tensors.shapes[name]
