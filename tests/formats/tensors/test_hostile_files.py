"""Files that harm or mislead: a FormatError, or what an independent reading of the same bytes gives; and little memory."""
import json
import tracemalloc

import numpy as np
import pytest
from formats import hostile

from minilora.errors import FileError, FormatError
from minilora.formats import open_state, save_state
from minilora.formats.tensors.dtypes import DTYPES, array_dtype

FIXED = 200_000  # bytes: messages, regular expressions and the reader's own objects
A_TENSOR = 500   # bytes of Python's objects for a name, its shape and its place


def naive(data):
    """What a valid file says, read without a check: name to (dtype, shape, bytes)."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"]), data[8 + n:][slice(*entry["data_offsets"])])
            for name, entry in header.items()}


def check(path, label, data):
    """Open, and make every array: a FormatError, or the bytes that the file has; returns whether it was opened."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        state = open_state(path)
        opened = dict(state)
    except FormatError as error:
        opened, message = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 2 * len(data) + FIXED + data.count(b"data_offsets") * A_TENSOR, f"{label}: {peak} bytes for {len(data)}"
    if opened is None:
        assert str(path) in message and len(message) < 2000, label
        assert "\n" not in message, label
        return False
    expected = naive(data)
    assert set(opened) == set(expected), label
    for name, array in opened.items():
        dtype, shape, numbers = expected[name]
        assert (state.dtypes[name], array.shape, array.tobytes()) == (dtype, shape, numbers), label
        assert array.dtype == array_dtype(dtype) and not array.flags.writeable, label
    assert sum(array.nbytes for array in opened.values()) == len(data) - 8 - int.from_bytes(data[:8], "little")
    return True


def run(tmp_path, count, seed=0):
    path = tmp_path / "hostile.safetensors"
    open_refused = [check(path, label, data) for label, data in hostile.hostile(count, seed)]
    return sum(open_refused)


def test_hostile_files(tmp_path):
    opened = run(tmp_path, 300)
    assert 0 < opened < 100  # some mutations change a number or a letter of a name only


@pytest.mark.slow
def test_ten_thousand_hostile_files(tmp_path):
    assert 0 < run(tmp_path, 10_000, seed=1) < 5000


@pytest.mark.parametrize("size", [100_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_text_that_would_be_much_as_objects(tmp_path, size):
    for label, data in hostile.bombs(size).items():
        check(tmp_path / "bomb.safetensors", label, data)


def test_hostile_indexes(tmp_path):
    """An index that is spoiled is refused, or says where the tensors are; never a file outside the folder."""
    save_state(tmp_path / "m.safetensors", {name: np.full(2, ord(name)) for name in "abc"}, max_shard_bytes=32)
    path = tmp_path / "m.safetensors.index.json"
    good, opened = path.read_bytes(), 0
    for i in range(300):
        data = hostile.mutated(good, np.random.default_rng([7, i]))
        path.write_bytes(data)
        try:
            state = open_state(path)
        except (FormatError, FileError) as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), i
        else:
            assert {name: list(array) for name, array in state.items()} == {name: [ord(name)] * 2 for name in "abc"}, i
            opened += 1
    assert 0 < opened < 150


def test_valid_files_open(tmp_path):
    for label, data in hostile.valid().items():
        assert check(tmp_path / "valid.safetensors", label, data), label


def test_a_small_file_cut_anywhere_or_with_any_bit_of_its_header_flipped(tmp_path):
    data = hostile.valid()["one"]
    for end in range(len(data)):
        assert not check(tmp_path / "cut.safetensors", f"cut at {end}", data[:end])
    for at in range(len(data) - 8):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
            check(tmp_path / "flipped.safetensors", f"bit {bit} of byte {at}", flipped)


MESSAGES = {
    "header beyond the file": "the header asks for 1008 bytes, and the file has 77",
    "header of 2^63": f"header of {2**63} bytes, more than the limit of 100000000, and the file has 77",
    "one byte less": "the tensors ask for 8 bytes behind the header, and the file has 7",
    "one byte more": "the tensors end at byte 8 behind the header, and the file at 9: 1 too many",
    "overlap": "'b' begins at byte 4, inside 'a', which ends at 8",
    "hole": "bytes 8 to 12 between 'a' and 'b' belong to no tensor",
    "a name twice": "the name 'a' is there twice",
    "negative axis": "'a': its shape must be a list of whole numbers from 0 to 2^63 - 1, got [-2]",
    "unknown dtype": "'a': unknown dtype 'F33': expected one of BOOL, F4",
    "extra field": "expected the fields dtype, shape, data_offsets, each once, got 'dtype, shape, data_offsets, strides'",
    "a dtype that no array has": "'a': F4 packs numbers of 4 bits, which no array has: convert the file",
    "neither true nor false": "'a': a truth value that is neither 0 nor 1",
    "deep": "brackets more than 8 deep",
    "empty": "the file is empty",
    "LFS pointer": "pointer of Git LFS (133 bytes)",
    "web page": "this is a web page",
    "config": "this is JSON text",
    "pickle": "this is a pickle",
    "old torch": "this is a pickle",
    "torch zip": "this is a file of torch.save, which is a pickle in a zip",
    "npz": "this is a .npz file",
    "npy": "this is a .npy file",
    "gguf": "this is a GGUF file",
    "zip": "this is a zip archive",
}


@pytest.mark.parametrize("label", MESSAGES)
def test_messages(tmp_path, label):
    path = tmp_path / "some.safetensors"
    data = hostile.hand_made()[label]
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        dict(open_state(path))
    assert str(caught.value).startswith(str(path)) and MESSAGES[label] in str(caught.value)


def test_several_problems_are_in_one_message(tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_bytes(hostile.packed({f"t{i}": hostile.tensor(shape=(-i - 1,)) for i in range(8)}))
    with pytest.raises(FormatError) as caught:
        open_state(path)
    assert all(f"'t{i}'" in str(caught.value) for i in range(5)) and "and 3 more" in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"whatever it holds, by its name")
    with pytest.raises(FormatError, match="weights_only=True") as caught:
        open_state(path)
    code = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
    compile(code, "message", "exec")
    assert repr(str(path.with_suffix(".safetensors"))) in code


def test_folders_and_paths(tmp_path):
    with pytest.raises(FileError, match="there is no safetensors file in it"):
        open_state(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(hostile.valid()["one"])
    with pytest.raises(FileError, match=r"give one of the files in it: model\.safetensors"):
        open_state(tmp_path)
    with pytest.raises(FileError, match="there is no such file"):
        open_state(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="zero byte|null"):
        open_state("a\0b")
    assert list(open_state(str(tmp_path / "model.safetensors"))) == ["a"]


def test_what_the_format_library_thinks_of_them(tmp_path):
    """What we open it opens too, with the same bytes. It takes a few that we refuse: each of those is listed here."""
    numpy_files = pytest.importorskip("safetensors")
    lenient = {"a name twice", "a field twice", "extra field", "list", "65 axes", "a thousand axes", "empty, and too large",
               "a dtype that no array has", "neither true nor false", "a key twice", "metadata twice"}
    path = tmp_path / "some.safetensors"
    for label, data in [*hostile.hand_made().items(), *hostile.valid().items()]:
        path.write_bytes(data)
        try:
            theirs = {name: bytes(entry["data"]) for name, entry in numpy_files.deserialize(data)}
        except Exception:
            theirs = None
        try:
            ours = {name: array.tobytes() for name, array in open_state(path).items()}
        except FormatError:
            ours = None
        assert ours == theirs or ours is None and label in lenient, label


def test_the_table_of_dtypes_is_that_of_the_library():
    pytest.importorskip("ml_dtypes")
    for name, dtype in DTYPES.items():
        if dtype.array is not None:
            assert array_dtype(name).itemsize * 8 == dtype.bits and np.dtype(array_dtype(name)).name == dtype.array
