"""What Python and NumPy may ask of a tensor: numbers, comparisons, text."""
import io
import math
import operator

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, Tensor, errors, nn

A = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
B = np.array([[1.0, 2.0, 3.0], [0.5, 8.0, -6.0]])


def test_properties(device):
    t = Tensor(place(A, "float32"))
    assert (t.shape, t.ndim, t.size, t.dtype, len(t), t.device.name) == ((2, 3), 2, 6, np.float32, 2, device)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_one_element_is_a_number(device):
    t = Tensor(place([[2.5]]))
    assert t.item() == 2.5 and type(t.item()) is float and float(t) == 2.5 and int(t) == 2 and round(t) == 2
    assert type(Tensor(place(7)).item()) is int
    assert round(Tensor(place(0.123456)), 3) == 0.123 and math.floor(Tensor(place(2.5))) == 2


@pytest.mark.parametrize("convert", [Tensor.item, float, int, round, bool, lambda t: f"{t:.3f}"])
@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_what_is_no_single_number_says_what_to_do(convert, shape, device):
    with pytest.raises(errors.ShapeError, match=rf"one element, got shape \({shape[0]},.*mean"):
        convert(Tensor(place(np.zeros(shape))))


def test_truth_is_that_of_the_one_number(device):
    """Not that of len(), which would call three zeros true."""
    assert not Tensor(place([0.0])) and Tensor(place(3.0))


def test_an_index_is_a_whole_number_without_axes(device):
    assert [10, 20, 30][Tensor(place(1))] == 20 and list(range(Tensor(place(2)))) == [0, 1]
    for value in (1.0, [1], True):
        with pytest.raises(errors.DTypeError, match="0-d tensor of integers"):
            operator.index(Tensor(place(value)))


def test_one_number_has_no_length_and_no_rows(device):
    for ask in (len, iter, list, lambda t: 2.0 in [*t]):
        with pytest.raises(errors.DTypeError, match="item"):
            ask(Tensor(place(2.0)))


def test_numpy_is_a_copy(device):
    t = Tensor(place(A))
    host = t.numpy()
    host[...] = 0.0
    np.testing.assert_array_equal(fetch(t), A)


@pytest.mark.parametrize("read", [np.asarray, np.array, np.asanyarray, np.ascontiguousarray])
def test_numpy_reads_a_copy(read):
    """What a training step changes later is not changed in what was read, and nobody writes into a parameter by mistake."""
    p = Parameter(A.copy())
    host = read(p)
    assert type(host) is np.ndarray and host.dtype == np.float64 and host.flags.writeable
    host[...] = 0.0
    np.testing.assert_array_equal(p.data, A)


def test_numpy_shares_only_when_asked_to():
    p = Parameter(A.copy())
    assert np.shares_memory(np.asarray(p, copy=False), p.data)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(p, "float32", copy=False)
    assert np.asarray(p, "float32").dtype == "float32"


def test_numpy_functions_see_numbers(tmp_path):
    """Not objects: an array of two losses has the dtype of the losses."""
    p = Parameter(A.astype("float32"))
    losses = [p.mean(), (p * 3.0).mean()]
    assert np.mean(losses) == np.float32(2.0 * A.mean()) and np.asarray(losses).dtype == "float32"
    np.testing.assert_array_equal(np.stack([p, p]), [p.data, p.data])
    model = nn.Linear(3, 2, rng=0)
    np.savez(tmp_path / "model.npz", **dict(model.named_parameters()))
    with np.load(tmp_path / "model.npz") as stored:
        for name, parameter in model.named_parameters():
            np.testing.assert_array_equal(stored[name], parameter.data, strict=True)
    array = np.zeros((2, 3))
    array[...] = Tensor(A)
    np.testing.assert_array_equal(array, A)


@pytest.mark.parametrize("device", ["standin", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_numpy_reads_no_tensor_of_another_device(device):
    t = Tensor(place(A))
    for read in (np.asarray, np.array, lambda t: np.mean([t, t]), lambda t: np.savez(io.BytesIO(), t)):
        with pytest.raises(errors.DeviceError, match=r"tensor\.numpy\(\)"):
            read(t)
    np.testing.assert_array_equal(np.asarray(t.numpy()), A)


# -- comparisons -------------------------------------------------------------------------------------------------------

COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__)
@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_comparisons_go_element_by_element(compare, kind, device):
    """The answer is a raw array of booleans on the same device; with numbers and raw arrays."""
    t = kind(place(A))
    pairs = [(t, Tensor(place(B)), A, B), (t, place(B), A, B), (t, 1, A, 1), (2.5, t, 2.5, A),
             (t, np.float64(-2.0), A, -2.0), (t, np.int64(3), A, 3), (t, place(B[0]), A, B[0]), (np.float64(3.0), t, 3.0, A)]
    pairs += [(B, t, B, A)] if device == "cpu" else []  # a device's own array answers for itself where it stands on the left
    for left, right, x, y in pairs:
        answer = compare(left, right)
        assert minilora.backend.device_of(answer).name == device
        np.testing.assert_array_equal(fetch(answer), compare(x, y), strict=True)
    assert compare(Tensor(place(2.0)), 2.0).shape == ()


def test_an_answer_is_an_index_a_mask_and_a_condition(device):
    t = Tensor(place(A))
    np.testing.assert_array_equal(fetch(t[t > 0.0]), A[A > 0.0])
    assert (t == t).all() and not (t != t).any() and ((t > 0.0) & (t < 4.0)).sum() == 2
    assert t.mean() > 0.0 and not t.mean() > 1.0


def test_a_number_is_compared_in_the_dtype_of_the_tensor():
    assert (Tensor(np.full(2, 0.1, "float32")) == 0.1).all() and (Tensor(np.full(2, 0.1, "float32")) == np.float64(0.1)).all()
    assert (Tensor(np.array([1, 2])) == np.array([1.0, 2.5], "float32")).tolist() == [True, False]  # a mixture is no promotion


@pytest.mark.parametrize("other", ["text", [1.0, 2.0, 3.0], object(), 1j], ids=lambda other: type(other).__name__)
def test_no_comparison_is_one_silent_false(other, device):
    t = Tensor(place(A))
    for compare in COMPARISONS:
        with pytest.raises(errors.DTypeError, match=type(other).__name__):
            compare(t, other)


def test_shapes_and_devices_must_fit(device):
    with pytest.raises(errors.ShapeError, match=r"\(2, 3\) and \(2,\)"):
        Tensor(place(A)) == Tensor(place([1.0, 2.0]))
    if device != "cpu":
        with pytest.raises(errors.DeviceError, match=r"tensor.numpy\(\)"):
            Tensor(place(A)) == Tensor(A)


def test_no_tensor_is_none(device):
    assert (Tensor(place(A)) == None) is False and (Tensor(place(A)) != None) is True  # noqa: E711
    with pytest.raises(TypeError):
        Tensor(place(A)) < None


def test_truth_of_a_comparison_of_many_is_refused():
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor(A) == Tensor(A))


def test_in_looks_for_a_number(device):
    assert 3.0 in Tensor(place(A)) and 7.0 not in Tensor(place(A))


@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_tensors_are_keys_by_identity(kind):
    equal = [kind(A.copy()) for _ in range(1000)]
    names = {t: i for i, t in enumerate(equal)}
    assert [names[t] for t in equal] == list(range(1000)) and len(set(equal)) == 1000
    assert kind(A) not in names


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_loss_is_formatted_as_its_number(device):
    loss = (Parameter(place(A, "float32")) * 1.0).mean()
    assert f"{loss:.3f}" == f"{A.mean():.3f}" and f"{loss:8.2e}" == f"{A.mean():8.2e}" and format(loss) == repr(loss)
    with pytest.raises(ValueError, match="Unknown format code"):
        f"{loss:d}"


def test_repr_shows_numbers_dtype_and_origin(device):
    p = Parameter(place([1.0, 2.0], "float32"))
    assert repr(p) == "Parameter([1. 2.], dtype=float32)"
    assert repr(p * 2.0) == "Tensor([2. 4.], dtype=float32, by Mul)"
    assert repr(Tensor(p.data)) == "Tensor([1. 2.], dtype=float32)"
    assert repr(Parameter(p.data, trainable=False)) == "Parameter([1. 2.], dtype=float32, frozen)"


def test_repr_has_the_digits_of_the_dtype_and_stays_short(device):
    assert repr(Tensor(place(0.1, "float32"))) == "Tensor(0.1, dtype=float32)"
    assert repr(Tensor(place(A))) == "Tensor([[ 1. -2.  3.]\n        [ 4.  5. -6.]], dtype=float64)"
    assert len(repr(Tensor(place(np.arange(1e6))))) < 120
