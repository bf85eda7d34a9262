"""Tensors to files and back: the bits, the views, and the files of the format's own library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.formats import load_state, open_state, save_state

PLAIN = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "complex64", "float64", "int64",
         "uint64"]
EXTRA = ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]


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
