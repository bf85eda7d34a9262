"""Numbers and host arrays out of what a user writes."""
import numpy as np
import pytest

from minilora import errors
from minilora.values import check_kind, host_array, number, types_in


@pytest.mark.parametrize(("value", "expected"), [
    (np.float64(0.5), 0.5), (np.float16(0.5), 0.5), (np.longdouble(0.5), 0.5), (np.int8(-3), -3), (np.uint64(3), 3),
    (np.bool_(True), 1), (True, 1), (2, 2), (2.5, 2.5),
], ids=repr)
def test_scalars_become_python_numbers(value, expected):
    assert type(number(value)) is type(expected) and number(value) == expected


@pytest.mark.parametrize("value", [np.array(2.0), np.ones(1), None, "2", [2.0], 2j, np.complex64(1j), np.str_("2")], ids=repr)
def test_what_is_no_number_is_left_alone(value):
    assert number(value) is value


def test_types_are_found_at_every_depth():
    assert types_in([1, (2.0, [True, [np.float32(1.0)]])]) == {int, float, bool, np.float32}
    assert types_in([]) == set() and types_in(np.ones(2)) == {np.ndarray} and types_in("text") == {str}


def test_python_floats_are_rounded_once():
    """As NumPy rounds them to float32; integers, and what has a dtype, are not touched."""
    assert host_array([0.1, 1e-40]).tolist() == np.array([0.1, 1e-40]).astype("float32").tolist()
    assert host_array([2 ** 40]).dtype == "int64" and host_array([2 ** 40], "float64")[0] == 2.0 ** 40
    array = np.ones(2)
    assert host_array(array) is array and host_array(array, copy=True) is not array


def test_a_memory_map_is_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3.0))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    check_kind(type(mapped))
    assert type(host_array(mapped)) is np.ndarray and np.shares_memory(host_array(mapped), mapped)
    assert not np.shares_memory(host_array(mapped, copy=True), mapped)


@pytest.mark.parametrize("kind", [np.matrix, np.ma.MaskedArray, type(np.ma.masked)])
def test_lookalikes_are_refused(kind):
    with pytest.raises(errors.DTypeError, match="asarray|filled"):
        check_kind(kind)
