"""4-bit weights in files: bitsandbytes' layout written and read to the bit, and everything that is not it refused."""
import json
import tracemalloc

import numpy as np
import pytest
from formats.hostile import mutated
from four_bit_bases import KINDS, config, four_bits, gpt2, llama, spoil, words, write
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import formats, models, nn
from minilora.errors import ConfigError, DTypeError, FormatError, MiniloraError
from minilora.formats.quantised.file import as_said
from minilora.formats.quantised.layout import file_tensors, owner_of
from minilora.formats.quantised.settings import Settings, read_settings
from minilora.formats.quantised.state import State, read_state, state_bytes
from minilora.quant import FourBit, Int8Rows

Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


# -- the layout --------------------------------------------------------------------------------------------------------


def test_the_words_are_those_of_bitsandbytes_letter_by_letter():
    assert state_bytes(State("nf4", 64, "float32", (64, 160), None)).tobytes() == \
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 160]}'
    assert state_bytes(State("nf4", 64, "float32", (64, 160), 0.051109470427036285)).tobytes() == \
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 160], "nested_blocksize": 256, ' \
        b'"nested_dtype": "float32", "nested_offset": 0.051109470427036285}'


@given(st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 4096]), st.sampled_from(["float32", "float16", "bfloat16"]),
       st.integers(1, 1 << 30), st.integers(1, 1 << 30), st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_words_come_back(kind, blocksize, dtype, rows, columns, offset):
    state = State(kind, blocksize, dtype, (rows, columns), offset)
    assert read_state(state_bytes(state).tobytes()) == state


@pytest.mark.parametrize("kind, double", KINDS)
def test_the_tensors_of_a_weight(kind, double):
    weight = FourBit.of(np.random.default_rng(0).standard_normal((5, 67)).astype("float32"), kind, double=double)
    tensors = file_tensors("a.fc.weight", weight)
    assert {name.removeprefix("a.fc.weight"): (array.dtype.name, array.shape) for name, array in tensors.items()} == {
        "": ("uint8", (168, 1)), ".absmax": ("uint8" if double else "float32", (6,)), ".quant_map": ("float32", (16,)),
        **({".nested_absmax": ("float32", (1,)), ".nested_quant_map": ("float32", (256,))} if double else {}),
        f".quant_state.bitsandbytes__{kind}": ("uint8", tensors[f"a.fc.weight.quant_state.bitsandbytes__{kind}"].shape)}
    assert [owner_of(name) for name in tensors][1:] == ["a.fc.weight"] * (len(tensors) - 1)
    assert owner_of("a.fc.weight") is owner_of("a.absmax") is owner_of("quant_map") is None


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind, double", KINDS)
def test_a_model_comes_back(kind, double, make, tmp_path):
    model = four_bits(make(), kind, double).eval()
    models.save(model, tmp_path / "a")
    again = models.load(tmp_path / "a")
    held = {path: p.data for path, p in again.named_parameters()}
    for path, p in model.named_parameters():
        assert isinstance(held[path], FourBit) == isinstance(p.data, FourBit) == (".weight" in path and p.data.ndim == 2 and
                                                                                  "embed" not in path and "wte" not in path and
                                                                                  "wpe" not in path and "lm_head" not in path)
        if isinstance(p.data, FourBit):
            assert (held[path].kind, held[path].double, held[path].shape) == (kind, double, p.shape)
            for ending, array in p.data.arrays().items():
                np.testing.assert_array_equal(held[path].arrays()[ending], array)
            assert not held[path].codes.flags.owndata and not held[path].codes.flags.writeable  # it lies in the file
    np.testing.assert_array_equal(again([[1, 2, 3]]).data, model([[1, 2, 3]]).data)
    models.save(again, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    assert said["quantization_config"] == Settings(kind, double).fields() and said["dtype"] == "float32"
    assert said["quantization_config"]["llm_int8_skip_modules"] is None


def test_in_several_files(tmp_path):
    one, several = write(tmp_path / "one"), write(tmp_path / "several", shard=20_000)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    parts = {name: file for name, file in index["weight_map"].items() if "layers.0.self_attn.q_proj" in name}
    assert len(set(index["weight_map"].values())) > 3 and len(parts) == 6
    np.testing.assert_array_equal(models.load(one)([[1, 2]]).data, models.load(several)([[1, 2]]).data)


def skipped_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]


def test_what_transformers_must_be_told(tmp_path):
    classifier = models.DistilBertClassifier(models.DistilBertConfig(
        vocab_size=31, dim=64, hidden_dim=64, n_layers=1, n_heads=4, max_position_embeddings=16), models.Labels(2), rng=0)
    models.save(four_bits(classifier, skip=("classifier",)), tmp_path / "a")
    assert skipped_in(tmp_path / "a") == ["^classifier"]
    models.save(four_bits(llama(), skip=("lm_head", "model.layers.1.mlp.down_proj")), tmp_path / "b")
    assert skipped_in(tmp_path / "b") == ["lm_head", "model.layers.1.mlp.down_proj"]
    models.save(four_bits(llama(tie_word_embeddings=True)), tmp_path / "c")
    assert skipped_in(tmp_path / "c") is None


def test_what_the_config_said_stays(tmp_path):
    write(tmp_path / "a")
    config(tmp_path / "a", bnb_4bit_compute_dtype="bfloat16", llm_int8_skip_modules=["lm_head", "no_such_layer"])
    models.save(models.load(tmp_path / "a"), tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (said["bnb_4bit_compute_dtype"], said["llm_int8_skip_modules"]) == ("bfloat16", ["lm_head", "no_such_layer"])
    plain = models.load(tmp_path / "a")
    for _, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = np.asarray(module.weight.data)
    models.save(plain, tmp_path / "c")
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
    np.testing.assert_array_equal(models.load(tmp_path / "c")([[1, 2]]).data, models.load(tmp_path / "a")([[1, 2]]).data)


def test_other_dtypes_to_compute_in(tmp_path):
    write(tmp_path)
    wide = models.load(tmp_path, dtype="float64")
    assert wide([[1, 2]]).dtype == np.float64 and wide.model.layers[0].self_attn.q_proj.weight.data.dtype == np.float64


def test_what_no_folder_holds(tmp_path):
    mixed = four_bits(llama())
    mixed.model.layers[0].self_attn.q_proj.weight.data = FourBit.of(np.ones((64, 64), "float32"), "fp4")
    with pytest.raises(DTypeError, match="some weights are in fp4 and some in nf4"):
        models.save(mixed, tmp_path / "a")
    rows = llama()
    rows.model.layers[0].self_attn.q_proj.weight.data = Int8Rows.of(np.ones((64, 64), "float32"))
    with pytest.raises(DTypeError, match="q_proj.weight .int8.*dequantize"):
        models.save(rows, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(folder, *texts):
    with pytest.raises(FormatError) as caught:
        models.load(folder)
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def nan(array):
    array = array.copy()
    array.reshape(-1)[0] = np.nan
    return array


@pytest.mark.parametrize("tensors, texts", [
    ({f"{Q}.absmax": None}, [".absmax is missing"]),
    ({f"{Q}.quant_map": None}, [".quant_map is missing"]),
    ({f"{Q}.nested_absmax": None}, [".nested_absmax is missing"]),
    ({f"{Q}.nested_quant_map": None}, [".nested_quant_map is missing"]),
    ({STATE: None}, ["expected one tensor", "found none"]),
    ({Q: None}, ["the tensor of the codes is missing"]),
    ({Q: lambda a: a[:-1]}, ["expected U8 (2048, 1), got U8 (2047, 1)"]),
    ({Q: lambda a: a.reshape(-1)}, ["got U8 (2048,)"]),
    ({Q: lambda a: a.astype("int8")}, ["got I8 (2048, 1)"]),
    ({f"{Q}.absmax": lambda a: a[1:]}, [".absmax: expected U8 (64,), got U8 (63,)"]),
    ({f"{Q}.absmax": lambda a: a.astype("float32")}, [".absmax: expected U8 (64,), got F32 (64,)"]),
    ({f"{Q}.nested_absmax": lambda a: np.concatenate([a, a])}, ["expected F32 (1,), got F32 (2,)"]),
    ({f"{Q}.nested_absmax": nan}, ["holds NaN or inf"]),
    ({f"{Q}.nested_absmax": lambda a: -a}, ["a negative scale"]),
    ({f"{Q}.nested_absmax": lambda a: a * 0 + np.float32(3.4e38), STATE: words(nested_offset=3e38)}, ["beyond float32"]),
    ({f"{Q}.quant_map": lambda a: a * np.float32(1.01)}, ["not the map of nf4"]),
    ({f"{Q}.quant_map": nan}, ["not the map of nf4"]),
    ({f"{Q}.nested_quant_map": lambda a: a[::-1].copy()}, ["not the map of 8-bit scales"]),
    ({STATE: words(shape=[32, 128])}, ["q_proj.weight: expected (64, 64), got (32, 128)"]),
    ({STATE: words(shape=[64, 128])}, ["the codes: expected U8 (4096, 1), got U8 (2048, 1)"]),
    ({STATE: words(shape=[1 << 40, 1 << 40])}, ["shape is"]),
    ({STATE: words(shape=[0, 64])}, ["shape is [0, 64], expected [rows, columns]"]),
    ({STATE: words(shape=[True, 64])}, ["shape is"]),
    ({STATE: words(shape=[64])}, ["shape is"]),
    ({STATE: words(shape=None)}, ["shape is None"]),
    ({STATE: words(blocksize=63)}, ["blocksize is 63, expected 32 or 64"]),
    ({STATE: words(blocksize=64.0)}, ["blocksize is 64.0"]),
    ({STATE: words(blocksize=128)}, [".absmax: expected U8 (32,)"]),
    ({STATE: words(dtype="float8")}, ["dtype is 'float8', expected float32 or float16"]),
    ({STATE: words(dtype=...)}, ["dtype is missing"]),
    ({STATE: words(more=1)}, ["unknown field 'more'"]),
    ({STATE: words(nested_blocksize=128)}, ["nested_blocksize is 128, expected 256"]),
    ({STATE: words(nested_dtype="float16")}, ["nested_dtype is 'float16'"]),
    ({STATE: words(nested_offset="0.1")}, ["nested_offset is '0.1'"]),
    ({STATE: words(nested_offset=1e39)}, ["nested_offset is 1e+39"]),
    ({STATE: words(nested_offset=True)}, ["nested_offset is True"]),
    ({STATE: words(nested_offset=...)}, ["nested_offset is missing"]),
    ({STATE: words(nested_offset=..., nested_dtype=..., nested_blocksize=...)},
     [".absmax: expected F32 (64,)", ".nested_absmax is there, and the scales are not nested"]),
    ({STATE: words(quant_type="int4")}, ["quant_type is 'int4', expected nf4 or fp4"]),
    ({STATE: words(quant_type="fp4")}, ["the name says 'nf4', and quant_type 'fp4'"]),
    ({STATE: words(quant_type=["nf4"])}, ["quant_type is ['nf4']"]),
    ({STATE: np.frombuffer(b"[" * 4000, "uint8")}, ["nested too deeply"]),
    ({STATE: np.frombuffer(b"[" * 5000, "uint8")}, ["5,000 bytes"]),
    ({STATE: np.zeros(1 << 22, "uint8")}, ["bytes where about 180 are written"]),
    ({STATE: np.frombuffer(b"[]", "uint8")}, ["expected a JSON object, got list"]),
    ({STATE: np.frombuffer(b'{"dtype": NaN}', "uint8")}, ["NaN is no number of JSON"]),
    ({STATE: np.frombuffer(b'{"a": 1, "a": 1}', "uint8")}, ["the name 'a' is there twice"]),
    ({STATE: np.frombuffer(b'{"a": ' + b"9" * 4000 + b"}", "uint8")}, ["unknown field"]),
    ({STATE: np.frombuffer(b"\xff\xfe{}", "uint8")}, ["no JSON"]),
    ({STATE: np.zeros((3, 2), "uint8")}, ["expected U8 (bytes,), got U8 (3, 2)"]),
    ({STATE: np.zeros(0, "uint8")}, ["no JSON"]),
    ({STATE: lambda a: a.astype("int8")}, ["expected U8 (bytes,), got I8"]),
    ({f"{Q}.quant_state.bitsandbytes__fp4": np.frombuffer(b"{}", "uint8")}, ["expected one tensor"]),
    ({f"{Q}.quant_state.bitsandbytes__": np.frombuffer(b"{}", "uint8")}, ["expected one tensor"]),
    ({"model.norm.weight.absmax": np.zeros(3, "uint8")}, ["model.norm.weight.absmax: it belongs to a 4-bit weight"]),
    ({"lm_head.weight.quant_map": np.zeros(16, "float32")}, ["lm_head.weight.quant_map: it belongs"]),
])
def test_a_damaged_state(tensors, texts, tmp_path):
    write(tmp_path)
    spoil(tmp_path, tensors)
    refused(tmp_path, *texts)


def test_scales_that_are_not_nested(tmp_path):
    for name, spoiled, text in (("a", nan, "holds NaN or inf"), ("b", lambda a: -a, "a negative scale")):
        write(tmp_path / name, double=False)
        spoil(tmp_path / name, {"model.layers.0.mlp.up_proj.weight.absmax": spoiled})
        refused(tmp_path / name, "layers.0.mlp.up_proj.weight: .absmax", text)


def test_all_problems_come_in_one_message(tmp_path):
    write(tmp_path)
    spoil(tmp_path, {"model.layers.0.mlp.up_proj.weight.absmax": None,
                     "model.layers.1.mlp.up_proj.weight.quant_map": lambda a: a * 0})
    refused(tmp_path, "layers.0.mlp.up_proj.weight: .absmax is missing", "layers.1.mlp.up_proj.weight: .quant_map is not")
    state = formats.load_state(tmp_path / "model.safetensors")
    formats.save_state(tmp_path / "model.safetensors", {name: a for name, a in state.items() if not name.endswith(".absmax")})
    refused(tmp_path, "... and 2 more")


@pytest.mark.parametrize("fields, text", [
    ({"bnb_4bit_quant_type": "fp4"}, "it is nf4, and config.json says bnb_4bit_quant_type 'fp4'"),
    ({"bnb_4bit_quant_type": "int4"}, "expected nf4 or fp4"), ({"bnb_4bit_quant_type": 4}, "expected nf4 or fp4"),
    ({"load_in_8bit": True}, "8 bits (load_in_8bit)"), ({"load_in_4bit": False}, "load_in_4bit is False, expected true"),
    ({"load_in_4bit": 1}, "load_in_4bit is 1"), ({"quant_method": "gptq"}, "quantised by 'gptq'"),
    ({"quant_method": "awq"}, "minilora quantize BASE -o OUT --kind nf4"), ({"quant_method": ["x"]}, "quantised by ['x']"),
    ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
    ({"bnb_4bit_use_double_quant": "yes"}, "expected true or false"),
    ({"llm_int8_skip_modules": {"a": 1}}, "expected names of modules"), ({"llm_int8_skip_modules": [1]}, "expected names"),
])
def test_a_config_that_is_not_computed_here(fields, text, tmp_path):
    write(tmp_path)
    config(tmp_path, **fields)
    refused(tmp_path, text)


def test_config_and_file_that_do_not_belong_together(tmp_path):
    write(tmp_path / "four")
    models.save(llama(), tmp_path / "plain")
    said = (tmp_path / "four" / "config.json").read_text()
    (tmp_path / "four" / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(said)
    refused(tmp_path / "four", "config.json beside it says nothing of them")
    refused(tmp_path / "plain", "config.json says nf4 (quantization_config), and no weight is")
    for nothing in ({}, None):
        assert as_said(formats.open_state(tmp_path / "plain" / "model.safetensors"), nothing).shapes
    for wrong in ([1], "nf4", 3):
        with pytest.raises(FormatError, match="must be an object"):
            read_settings(wrong)


def test_older_spellings_of_the_config():
    assert read_settings({"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": None}).kind == "nf4"
    assert read_settings({"load_in_4bit": True}).kind == "fp4"  # as bitsandbytes has it
    assert read_settings({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int3"}).compute == "float32"


def test_only_linear_layers(tmp_path):
    write(tmp_path)
    tensors = file_tensors("model.embed_tokens.weight", FourBit.of(np.ones((31, 64), "float32")))
    state = formats.load_state(tmp_path / "model.safetensors")
    formats.save_state(tmp_path / "model.safetensors", {**state, **tensors})
    refused(tmp_path, "model.embed_tokens.weight: it is in NF4, and no linear layer")


def test_drawn_faults_are_one_clear_error_or_the_same_model(tmp_path):
    write(tmp_path, make=lambda: llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2))
    data, said = ((tmp_path / name).read_bytes() for name in ("model.safetensors", "config.json"))
    loaded = 0
    for i in range(300):
        random = np.random.default_rng([7, i])
        spoiled = i % 3 != 2
        (tmp_path / "model.safetensors").write_bytes(mutated(data, random) if spoiled else data)
        (tmp_path / "config.json").write_bytes(said if spoiled else mutated(said, random))
        tracemalloc.start()
        try:
            model = models.load(tmp_path)
            model.model.layers[0].self_attn.q_proj.weight.data.dense()
            loaded += 1
        except MiniloraError as error:
            assert isinstance(error, (FormatError, ConfigError)) or type(error).__name__ == "FileError", repr(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 30e6, (i, peak)
    assert loaded  # a code, or a number, that is another one is none that could be found


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
names = st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "x"])
GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [3, 5], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.5}


@settings(max_examples=150)
@given(st.dictionaries(names, st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=2), inner, max_size=2), max_leaves=4), max_size=4), st.sets(names, max_size=2))
def test_drawn_words(changed, dropped):
    said = {name: value for name, value in {**GOOD, **changed}.items() if name not in dropped}
    try:
        state = read_state(json.dumps(said).encode())
    except FormatError:
        return
    assert read_state(state_bytes(state).tobytes()) == state and "x" not in said


@settings(max_examples=150)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_drawn_bytes(data):
    with pytest.raises(FormatError):
        read_state(data)
