"""Tensors to files and back: the bits, the views, and the files of the format's own library."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import backend
from minilora.errors import ConfigError, FileError, FormatError
from minilora.formats import load_state, open_state, save_state
from minilora.formats.tensors import writing

PLAIN = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "complex64", "float64", "int64",
         "uint64"]
EXTRA = ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]


STORED = (b'0\x01\x00\x00\x00\x00\x00\x00{"__metadata__":{"k":"v"},"\xc3\xa9\\n":{"dtype":"F64","shape":[],"da'
          b'ta_offsets":[0,8]},"i":{"dtype":"I32","shape":[1,1],"data_offsets":[8,'
          b'12]},"b":{"dtype":"F16","shape":[2],"data_offsets":[12,16]},"c":{"dtyp'
          b'e":"U8","shape":[0,2],"data_offsets":[16,16]},"a":{"dtype":"BOOL","sha'
          b'pe":[1],"data_offsets":[16,17]}}\x00\x00\x00\x00\x00\x00\x08@\xff\xff\xff\xff\x00<\x00@\x01')


def same_bits(a, b):
    """Equal dtype, shape and bytes: a NaN is equal to itself only so."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def arrays(draw, dtypes=tuple(PLAIN)):
    """Arrays of drawn bits: 0-d, empty, strided, reversed and transposed ones among them."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    steps = [draw(st.sampled_from([1, 2, -1])) for _ in shape]
    whole = [length * abs(step) for length, step in zip(shape, steps)]
    count = int(np.prod(whole, dtype=int))
    bits = np.frombuffer(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), "uint8")
    bits = bits % 2 if dtype == bool else bits
    array = bits.view(dtype).reshape(whole)[tuple(slice(None, None, step) for step in steps)]
    return array.T if draw(st.booleans()) else array


names = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
                  st.sampled_from(["", "../x", "/etc/passwd", "a\0b", "\"", "\\", "C:\\x", "é.weight", "\U0001f600", "\x7f\n"]))
names = names.filter(lambda name: name != "__metadata__")
texts = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
                        st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=3)


@given(st.dictionaries(names, arrays(), max_size=5), st.none() | texts)
def test_round_trip(tmp_path, tensors, metadata):
    path = tmp_path / "drawn.safetensors"
    save_state(path, tensors, metadata)
    state = open_state(path)
    assert set(state) == set(tensors) and state.metadata == (metadata or {})
    for name, array in tensors.items():
        assert same_bits(state[name], array.astype(array.dtype, order="C"))
        assert state.shapes[name] == array.shape and not state[name].flags.writeable
    first = path.read_bytes()
    save_state(path, dict(reversed(list(state.items()))), state.metadata if metadata is not None else None)  # over itself
    assert path.read_bytes() == first
    loaded = load_state(path)
    assert all(same_bits(loaded[name], state[name]) and loaded[name].flags.writeable for name in tensors)


@given(st.data())
def test_round_trip_of_small_floats(tmp_path, data):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtypes = [getattr(ml_dtypes, name) for name in EXTRA if hasattr(ml_dtypes, name)]
    tensors = data.draw(st.dictionaries(names, arrays(dtypes), max_size=4))
    path = tmp_path / "small.safetensors"
    save_state(path, tensors)
    state = open_state(path)
    for name, array in tensors.items():
        assert state[name].dtype == array.dtype and same_bits(state[name], np.array(array, order="C"))


def test_the_bytes_are_those_of_the_format_library(tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    random = np.random.default_rng(0)
    tensors = {f"{name}.{i}": (100 * random.standard_normal((i, 3))).astype(name) for name in PLAIN for i in (0, 1, 2)
               if name != "complex64"}  # which their writer for NumPy does not know
    tensors |= {"é\n\"": np.array(1.0, "float32"), "../x": np.zeros(3, "int8"), "": np.ones(1), "\x7f\U0001f600": np.ones(2)}
    for metadata in (None, {}, {"format": "pt"}):
        save_state(tmp_path / "ours.safetensors", tensors, metadata)
        theirs.save_file(tensors, tmp_path / "theirs.safetensors", metadata)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
        for state in (theirs.load_file(tmp_path / "ours.safetensors"), open_state(tmp_path / "theirs.safetensors")):
            assert set(state) == set(tensors) and all(same_bits(state[name], tensors[name]) for name in tensors)


def test_the_bytes_that_the_library_wrote(tmp_path):
    """The same, where the library is not installed: its file for five tensors and one entry of metadata."""
    save_state(tmp_path / "a.safetensors", {"b": np.array([1, 2], "float16"), "a": np.array([True]), "\u00e9\n": np.array(3.0),
                                            "c": np.zeros((0, 2), "uint8"), "i": np.array([[-1]], "int32")}, {"k": "v"})
    assert (tmp_path / "a.safetensors").read_bytes() == STORED


def test_metadata_is_sorted(tmp_path):
    save_state(tmp_path / "a.safetensors", {}, {"b": "2", "a": "1"})
    save_state(tmp_path / "b.safetensors", {}, {"a": "1", "b": "2"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert list(open_state(tmp_path / "a.safetensors").metadata) == ["a", "b"]


@pytest.mark.parametrize("bits, dtype", [(0x7FA00001, "float32"), (0xFFC12345, "float32"), (0x7D01, "float16"),
                                         (0x7FF0000000000001, "float64")])
def test_a_nan_keeps_its_bits(tmp_path, bits, dtype):
    width = np.dtype(dtype).itemsize
    array = np.array([bits], f"uint{8 * width}").view(dtype)
    for given_array in (array, array.astype(array.dtype.newbyteorder(">")), np.repeat(array, 4)[::2][:1]):
        save_state(tmp_path / "nan.safetensors", {"a": given_array})
        assert int(load_state(tmp_path / "nan.safetensors")["a"].view(f"uint{8 * width}")[0]) == bits


def test_tensors_of_any_device(tmp_path, device, monkeypatch):
    monkeypatch.setattr(writing, "_PIECE", 16)  # so that everything goes in pieces
    host = np.arange(60, dtype="float32").reshape(3, 4, 5)
    given_arrays = {"array": backend.to_device(host), "parameter": minilora.Parameter(backend.to_device(host)),
                    "tensor": minilora.Tensor(backend.to_device(host)), "0-d": backend.to_device(np.array(2.5)),
                    "strided": backend.to_device(host)[:, ::2], "empty": backend.to_device(np.zeros((3, 0, 9)))}
    save_state(tmp_path / "a.safetensors", given_arrays)
    state = load_state(tmp_path / "a.safetensors")
    assert state["0-d"] == 2.5 and state["empty"].shape == (3, 0, 9) and same_bits(state["strided"], host[:, ::2].copy())
    assert all(same_bits(state[name], host) for name in ("array", "parameter", "tensor"))


@given(arrays(), st.integers(1, 40))
def test_any_piece_gives_the_same_bytes(tmp_path, array, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_PIECE", piece)
        save_state(tmp_path / "a.safetensors", {"a": array})
    assert same_bits(open_state(tmp_path / "a.safetensors")["a"], np.array(array, order="C"))


def test_what_the_format_cannot_hold(tmp_path):
    path = tmp_path / "a.safetensors"
    save_state(path, {"old": np.ones(1)})
    before = path.read_bytes()
    bad = {"complex": np.ones(1, "complex128"), "object": np.array([None]), "text": np.array(["a"]),
           "date": np.zeros(1, "M8[s]"),
           "fields": np.zeros(1, [("a", "f4")]), "list": [1.0], "number": 1.0, "masked": np.ma.masked_array([1.0]),
           3: np.ones(1), "__metadata__": np.ones(1), "half \ud800": np.ones(1), "good": np.ones(1)}
    with pytest.raises(FormatError) as caught:
        save_state(path, bad, {"a": 1, "\udc00": "b"})
    for name in [*bad, "a"]:
        assert (repr(name) in str(caught.value)) == (name != "good"), name
    assert str(path) in str(caught.value) and "astype" in str(caught.value) and path.read_bytes() == before
    for limit in (0, -1, 1.5, "5GB", True):
        with pytest.raises(ConfigError, match="max_shard_bytes"):
            save_state(path, {}, max_shard_bytes=limit)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_view_is_the_file_and_follows_no_other(tmp_path):
    path = tmp_path / "a.safetensors"
    save_state(path, {"a": np.arange(4.0), "b": np.zeros(2, "int8")})
    state = open_state(path)
    array = state["a"]
    assert array.base is not None and not array.flags.owndata and array.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1.0
    save_state(path, {"a": -array})
    assert list(array) == [0, 1, 2, 3] and list(state) == ["a", "b"] and list(open_state(path)["a"]) == [0, -1, -2, -3]
    del state
    gc.collect()
    assert list(array) == [0, 1, 2, 3]  # the map lives as long as an array in it
    path.unlink()
    assert array.sum() == 6


def test_what_is_not_aligned_is_right(tmp_path):
    """Old writers did not pad the header, and a wide tensor may follow a narrow one."""
    header = {"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}, "b": {"dtype": "F64", "shape": [2, 2],
              "data_offsets": [3, 35]}, "c": {"dtype": "F16", "shape": [], "data_offsets": [35, 37]}}
    numbers = np.arange(4.0).reshape(2, 2)
    text = json.dumps(header).encode()
    for spaces in range(8):
        padded = text + b" " * spaces
        (tmp_path / "a").write_bytes(len(padded).to_bytes(8, "little") + padded + b"\1\2\3" + numbers.tobytes()
                                     + np.float16(2.5).tobytes())
        state = open_state(tmp_path / "a")
        assert list(state["a"]) == [1, 2, 3] and state["c"] == 2.5 and same_bits(state["b"], numbers)
        assert np.array_equal(state["b"] @ state["b"], numbers @ numbers) and load_state(tmp_path / "a")["b"].flags.aligned


def test_copies_and_pickles_open_the_file_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_state("a.safetensors", {"a": np.arange(3.0), "b": np.ones(2)}, max_shard_bytes=24)
    state = open_state("a.safetensors.index.json")
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert same_bits(other["a"], np.arange(3.0)) and other.path == tmp_path / "a.safetensors.index.json"
    array = copy.deepcopy(state["a"])
    array[0] = 1.0
    assert "2 tensors" in repr(state) and "a" in state and "c" not in state and len(state) == 2
    with pytest.raises(KeyError):
        state["c"]


def test_without_ml_dtypes(tmp_path, monkeypatch):
    """Opening needs no package, nor do the other tensors; the error names the extra and the tensor."""
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\x3f\0\x40\7")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    state = open_state(path)
    assert state.dtypes == {"a": "BF16", "b": "U8"} and state["b"] == 7
    with pytest.raises(FormatError, match=r"'a': BF16 needs the package ml_dtypes.*pip install 'minilora\[models\]'"):
        state["a"]
    with pytest.raises(FormatError, match="BF16 needs"):
        load_state(path)


def test_a_machine_of_the_other_byte_order_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_state(path, {"a": np.ones(1)})
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (lambda: open_state(path), lambda: save_state(path, {})):
        with pytest.raises(FormatError, match="big-endian"):
            call()


def test_importing_minilora_reads_no_room_of_files():
    code = ("import sys, minilora; assert not [m for m in sys.modules if m.startswith('minilora.formats')]; "
            "minilora.formats; assert 'minilora.formats.tensors.reading' not in sys.modules; "
            "minilora.formats.open_state; assert 'ml_dtypes' not in sys.modules and 'safetensors' not in sys.modules; "
            "assert 'save_state' in dir(minilora.formats); assert not hasattr(minilora.formats, 'nothing')")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# -- several files ----------------------------------------------------------------------------------------------------


def shards(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".json"))


def test_shards(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {f"h.{i}.w": np.full((2, 3), i, "float32") for i in (0, 1, 10, 2, 3)} | {"large": np.zeros(40), "s": np.ones(())}
    save_state(path, tensors, {"format": "pt"}, max_shard_bytes=50)
    assert shards(tmp_path) == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in tensors.values())}
    assert index["weight_map"]["h.10.w"] == "model-00002-of-00005.safetensors" and list(index["weight_map"]) == sorted(tensors)
    state = open_state(tmp_path / "model.safetensors.index.json")
    assert set(state) == set(tensors) and state.metadata == {"format": "pt"}
    assert all(same_bits(state[name], array) for name, array in tensors.items())
    save_state(path, state, state.metadata, max_shard_bytes=50)  # over themselves
    assert shards(tmp_path) == [f"model-{i:06}-of-000005.safetensors" for i in range(1, 6)]
    again = load_state(tmp_path / "model.safetensors.index.json")
    assert all(same_bits(again[name], array) and same_bits(state[name], array) for name, array in tensors.items())
    save_state(path, again)
    assert os.listdir(tmp_path) == ["model.safetensors"] and set(open_state(path)) == set(tensors)
    save_state(path, again, max_shard_bytes=10**9)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    save_state(path, again, max_shard_bytes=200)
    assert len(shards(tmp_path)) == 3 and not path.exists()
    assert set(open_state(tmp_path / "model.safetensors.index.json")) == set(tensors)


def test_files_of_other_checkpoints_stay(tmp_path):
    others = ["model-2.safetensors", "model-00001-of-00002.bin", "mymodel-00001-of-00002.safetensors", "config.json",
              "adapter_model.safetensors", "model-old-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "model-00001-of-00009.safetensors").write_text("left by a run that was killed")
    for limit in (8, None, 8):
        save_state(tmp_path / "model.safetensors", {"a": np.ones(1), "b": np.ones(1)}, max_shard_bytes=limit)
    assert {name for name in os.listdir(tmp_path)} == {*others, "model.safetensors.index.json",
                                                       "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_an_index_that_is_wrong(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    save_state(tmp_path / "model.safetensors", {"a": np.ones(1), "b": np.ones(1), "c": np.ones(1)}, max_shard_bytes=16)
    good = json.loads(path.read_text())["weight_map"]
    one, two = sorted(set(good.values()))

    def refused(text, match, kind=FormatError):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(kind, match=match) as caught:
            open_state(path)
        assert str(path) in str(caught.value)

    for file in ("../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "C:\\x", "a\0"):
        refused({"weight_map": {**good, "b": file}}, "is not the name of a file beside the index")
    refused({"weight_map": {**good, "b": 3}}, "expected the name of a file")
    refused({"weight_map": []}, "expected '{'")
    refused({"metadata": {}}, 'no "weight_map"')
    refused("[]", "JSON text, not a file of tensors")
    refused("", "empty")
    refused("<html>", "this is a web page")
    refused("version https://git-lfs.github.com/spec/v1", "pointer of Git LFS")
    refused('{"weight_map":{"a":"%s","a":"%s"}}' % (one, two), "'a' is there twice")
    refused('{"weight_map":{},"weight_map":{}}', "second weight_map")
    refused('{"weight_map":{}} x', "something behind")
    refused({"weight_map": {**good, "d": one}}, f"{one} lacks 'd'")
    refused({"weight_map": {"a": one, "c": two}}, f"{one} has 'b', which the index does not put there")
    refused({"weight_map": {**good, "b": two}}, f"{one} has 'b'.*{two} lacks 'b'")
    refused({"weight_map": {**good, "d": "gone.safetensors"}}, r"1 of 3 files.*not beside it: gone\.safetensors", FileError)
    path.write_text(json.dumps({"metadata": {"total_size": 24, "x": [1, {"y": None}]}, "other": 3, "weight_map": good}))
    assert set(open_state(path)) == {"a", "b", "c"}
    path.rename(tmp_path / "index")
    assert set(open_state(tmp_path / "index", index=True)) == {"a", "b", "c"}
    with pytest.raises(FormatError, match="the index is written with its shards"):
        save_state(path, {})


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_opening_a_large_file_takes_no_memory(tmp_path):
    """A file of 8 GB with holes: opened, every array made, a row of each used; private memory stays where it was."""
    header = {f"h.{i}": {"dtype": "F32", "shape": [2**13, 2**14], "data_offsets": [i * 2**29, (i + 1) * 2**29]}
              for i in range(16)}
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 16 * 2**29)

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Anonymous:"))) * 1024

    open_state(path)
    before = private()
    state = open_state(path)
    arrays_of_file = dict(state)
    assert sum(array.nbytes for array in arrays_of_file.values()) == 2**33
    assert all(float(array[5].sum()) == 0.0 for array in arrays_of_file.values())
    assert private() - before < 2**20


def test_writing_holds_one_piece(tmp_path):
    tensors = {name: np.ones((300, 100_000), "int8")[:, ::2] for name in "ab"}  # 15 MB each, none of it in order
    save_state(tmp_path / "warm.safetensors", {"a": np.ones(1)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_PIECE", 2**20)
        tracemalloc.start()
        save_state(tmp_path / "a.safetensors", tensors)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**21 and load_state(tmp_path / "a.safetensors")["a"].sum() == 15_000_000
