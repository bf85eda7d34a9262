"""Arrays without numbers: shape, dtype, strides and shared memory as NumPy has them."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minilora import hollow
from minilora.errors import DeviceError
from minilora.hollow.array import Hollow
from minilora.hollow.meter import metered


def both(*shape, dtype="float32"):
    return np.zeros(shape, dtype), Hollow(shape, dtype)


def alike(real, made, order=True):
    assert (made.shape, made.dtype) == (real.shape, real.dtype)
    if order and real.size > 1:  # strides of axes of length 1 mean nothing
        assert [s for s, n in zip(made.strides, made.shape) if n > 1] == [s for s, n in zip(real.strides, real.shape) if n > 1]
        assert made.flags.c_contiguous == real.flags.c_contiguous and made.flags.f_contiguous == real.flags.f_contiguous


VIEWS = [
    lambda x: x[1:], lambda x: x[..., ::2], lambda x: x[::-1], lambda x: x[:, None], lambda x: x[0], lambda x: x[..., -1],
    lambda x: x.T, lambda x: x.swapaxes(0, -1), lambda x: x[None, ..., None], lambda x: np.moveaxis(x, 0, -1), lambda x: x[:0],
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.lists(st.sampled_from(VIEWS), max_size=3), st.data())
def test_views_and_reshapes(shape, views, data):
    real, made = both(*shape)
    for view in views:
        if real.ndim < 2 or 0 in real.shape:
            break
        real, made = view(real), view(made)
    alike(real, made)
    n, wanted = real.size, []
    while n > 1 and len(wanted) < 3:
        wanted.append(data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])))
        n //= wanted[-1]
    wanted = (*wanted, -1) if real.size else (0, 3)
    seen, also = real.reshape(wanted), made.reshape(*wanted)
    alike(seen, also)
    if real.size:
        assert np.shares_memory(seen, real) == np.may_share_memory(also, made)


CALLS = [
    lambda x, y: x + y, lambda x, y: x * 2, lambda x, y: 2.0 / x, lambda x, y: x > y, lambda x, y: -x, lambda x, y: np.exp(x.T),
    lambda x, y: x.sum(axis=0), lambda x, y: x.mean(axis=-1, keepdims=True), lambda x, y: x.argmax(axis=1),
    lambda x, y: x.max(),
    lambda x, y: np.where(x > 0, x, 0.0), lambda x, y: np.dot(x, y.T), lambda x, y: x @ y.T, lambda x, y: np.vecdot(x, y),
    lambda x, y: np.concatenate([x, y], axis=1), lambda x, y: np.stack([x, y], axis=1), lambda x, y: np.split(x, 2)[1],
    lambda x, y: np.take(x, np.array([[0, 1]]), axis=1), lambda x, y: x[np.array([0, 0, 1])], lambda x, y: x[[1, 2]],
    lambda x, y: np.empty_like(x.T), lambda x, y: x.astype("float64"), lambda x, y: x.T.copy(),
    lambda x, y: np.broadcast_to(x, (2, 4, 6)),
    lambda x, y: np.triu(x), lambda x, y: np.clip(x, 0.0, 1.0), lambda x, y: x.view("uint16"), lambda x, y: x ** 0.5,
    lambda x, y: np.expand_dims(x, 1), lambda x, y: np.pad(x, ((1, 1), (0, 2))), lambda x, y: np.ascontiguousarray(x.T, like=x),
    lambda x, y: np.ones((2, 3), "int32", like=x), lambda x, y: np.arange(5, like=x), lambda x, y: np.repeat(x, 2, axis=0),
    lambda x, y: np.take_along_axis(x, np.zeros((4, 1), int), axis=1), lambda x, y: (x > 0).sum(axis=0), lambda x, y: abs(x),
    lambda x, y: x[None] * y[:, None], lambda x, y: np.maximum(x, np.float32(1)), lambda x, y: x.squeeze(),
    lambda x, y: np.linalg.norm(x),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_results(call, dtype):
    (x, made), (y, other) = both(4, 6, dtype=dtype), both(4, 6, dtype=dtype)
    with np.errstate(all="ignore"):
        real = np.asarray(call(x, y))
    alike(real, call(made, other))


def test_what_is_written_in_place_makes_nothing():
    x, y = Hollow((3, 4), "float32"), Hollow((3, 1), "float32")
    with metered() as meter:
        x += y
        x[1:] *= 2.0
        np.exp(x, out=x)
        x[...] = 0.0
        x.fill(1.0)
        assert np.dot(x, x.T, out=(out := Hollow((3, 3), "float32"))) is out
    assert meter.peak == 36 and meter.flops == {("", "activations"): 2 * 3 * 3 * 4}


def test_memory_lives_as_long_as_a_view_of_it():
    with metered() as meter:
        x = Hollow((10, 10), "float64")
        view = x[2:5].T
        del x
        assert (meter.live, view.base.nbytes) == (800, 800)
        y = view * 2.0
        assert meter.live == 800 + y.nbytes
        del view, y
    assert (meter.live, meter.peak) == (0, 800 + 240)


def test_a_matrix_with_gaps_is_copied_for_blas():
    x = Hollow((6, 8), "float32")
    for operand, copies in ((x, 0), (x.T, 0), (x[:, :4], 0), (x[:, ::2], 6 * 4 * 4)):
        with metered() as meter:
            np.dot(operand, Hollow((operand.shape[1], 1), "float32"))
        assert meter.peak == 4 * operand.shape[1] + max(4 * operand.shape[0], copies)


@pytest.mark.parametrize("look", [bool, float, int, repr, np.asarray, lambda x: x.item(), lambda x: x.tolist()])
def test_no_number_is_made_up(look):
    x = Hollow((), "float32")
    if look is repr:
        assert repr(x) == "Hollow((), float32)"
    else:
        with pytest.raises(DeviceError, match="which a plan knows shape and dtype only"):
            look(x)


def test_what_is_not_known_says_so():
    x = Hollow((2, 2), "float32")
    for call in (np.fft.fft, np.linalg.svd, lambda x: np.frexp(x), np.unique):
        with pytest.raises(DeviceError, match="rules.py"):
            call(x)
    with pytest.raises(AttributeError, match="rules.py"):
        x.choose
    with pytest.raises(ValueError, match="cannot reshape"):
        x.reshape(3, 2)
    with pytest.raises(ValueError, match="not aligned"):
        np.dot(x, Hollow((3, 1), "float32"))
    with pytest.raises(IndexError, match="out of bounds"):
        x[2]
    assert hollow.__all__ == ["Flops", "Step", "rehearse"]
