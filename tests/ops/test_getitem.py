"""Indices: everything that NumPy allows, against counts of how often each element is named."""
import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import assume, event, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora import Parameter, Tensor, backend, errors

SHAPES = st.lists(st.sampled_from([3, 2, 1, 4, 2, 3, 0]), max_size=3).map(tuple)
REPEATS = [list, tuple, lambda ints: np.array(ints, int), lambda ints: [ints], lambda ints: tuple((i,) for i in ints),
           lambda ints: np.array(ints, "int32")[::-1]]


def one_axis(n, length):
    """What may stand for an axis of n elements; what is no slice or int has this length, so that all of them broadcast."""
    masks = st.sampled_from([np.asarray, list, lambda a: tuple(a.tolist())]).flatmap(lambda f: hnp.arrays(bool, n).map(f))
    if not n:
        return st.one_of(st.slices(n), masks)
    inside = st.integers(-n, n - 1)
    several = st.lists(st.integers(0, 1).map(lambda i: -i) if n < 3 else inside, min_size=length, max_size=length)
    single = st.sampled_from([int, np.int64, np.array]).flatmap(lambda f: inside.map(f))
    ranges = st.integers(0, n - 1).map(lambda k: range(k, min(n, k + length)))
    return st.one_of(st.slices(n), single, *[several.map(f) for f in REPEATS], ranges, masks)


@st.composite
def indices(draw, shape):
    """A part for some of the axes, with new axes, an ellipsis, masks of several axes and bools between them."""
    parts, length, axis, used = [], draw(st.sampled_from([3, 2, 4, 1, 0])), 0, draw(st.integers(min(1, len(shape)), len(shape)))
    while axis < used:
        if axis + 2 <= used and draw(st.integers(0, 5)) == 0:
            parts.append(draw(hnp.arrays(bool, shape[axis:axis + 2])))
            axis += 2
        else:
            parts.append(draw(one_axis(shape[axis], length)))
            axis += 1
    for extra in draw(st.lists(st.sampled_from([None, None, True, False, np.True_, np.array(True)]), max_size=2)):
        parts.insert(draw(st.integers(0, len(parts))), extra)
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), Ellipsis)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


def on_device(part):
    """Arrays must live where the tensor lives; sequences and bools are moved by getitem."""
    if isinstance(part, np.ndarray):
        return place(part)
    return tuple(map(on_device, part)) if isinstance(part, tuple) and not all(isinstance(p, int) for p in part) else part


def top(index):
    return tuple(map(on_device, index)) if isinstance(index, tuple) else on_device(index)


@given(data=st.data())
def test_every_index_counts_its_repeats(device, data):
    shape = data.draw(SHAPES)
    index = data.draw(indices(shape))
    places = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    try:
        named = places[index]
    except (IndexError, ValueError):
        assume(False)  # lengths that do not broadcast, or two masks of unequal counts
    event("repeats" if np.unique(named).size < named.size else "none twice")
    x = Parameter(place(np.arange(places.size, dtype=float).reshape(shape)))
    y = x[top(index)]
    np.testing.assert_array_equal(fetch(y), named)
    dy = np.arange(1.0, 1.0 + named.size).reshape(named.shape)
    y.backward(place(dy))
    expected = np.bincount(np.ravel(named), weights=dy.ravel(), minlength=places.size).reshape(shape)
    np.testing.assert_array_equal(fetch(x.grad), expected)
    with np.errstate(all="ignore"):
        np.add.at(again := np.zeros(shape), index, dy)
    np.testing.assert_array_equal(fetch(x.grad), again)


@pytest.mark.parametrize("index", [((0, 0, 1), slice(None)), (range(2), (1, 1)), [[0, 0], [1, 1]], (slice(None), [1, 1, 0]),
                                   ([0, 0], True), [True, False, True], [], ((), slice(None)), (Ellipsis, [[0], [0]])])
def test_sequences_are_indices_too(device, index):
    x = Parameter(place(np.arange(6.0).reshape(3, 2)))
    named = np.arange(6).reshape(3, 2)[index]
    y = x[index]
    np.testing.assert_array_equal(fetch(y), named)
    y.sum().backward()
    np.testing.assert_array_equal(fetch(x.grad).ravel(), np.bincount(named.ravel(), minlength=6))


def test_a_list_is_read_when_it_is_used(device):
    x, index = Parameter(place(np.arange(3.0))), [0, 0]
    y = x[index]
    index[0] = 2
    y.sum().backward()
    assert fetch(x.grad).tolist() == [2.0, 0.0, 0.0]


def test_tensors_are_indices(device):
    x, i = Parameter(place(np.arange(6.0).reshape(3, 2))), Tensor(place([2, 2]))
    assert fetch(x[i]).tolist() == [[4.0, 5.0]] * 2
    assert fetch(x[i, Tensor(place(1))]).tolist() == [5.0, 5.0]
    assert fetch(x[:, Tensor(place([True, False]))]).tolist() == [[0.0], [2.0], [4.0]]


def test_tensors_in_a_list():
    x, i = Parameter(np.arange(3.0)), Tensor(np.array(2))
    assert x[[i, 0, i]].data.tolist() == [2.0, 0.0, 2.0]


@pytest.mark.parametrize("index", [3, -4, [0, 3], (0, 2), (0, 0, 0), 0.5, [0.5], "a", (None, 0, 0, 0), [True, False]])
def test_what_names_nothing_is_an_index_error(index):
    with pytest.raises(IndexError):
        Tensor(np.zeros((3, 2)))[index]


def test_ragged_lists_are_refused(device):
    with pytest.raises(errors.DTypeError, match="makes no array"):
        Tensor(backend.asarray(np.zeros((3, 2))))[[[0, 1], [0]]]
