"""The handle: operators, conversions, and what may be a parameter."""
import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import Parameter, Tensor, backend, errors, ops

A = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
B = np.array([[2.0, 2.0, -1.0], [0.5, 8.0, 4.0]])

OPERATORS = {
    "t + t": lambda t, u: t + u, "t - t": lambda t, u: t - u, "t * t": lambda t, u: t * u, "t / t": lambda t, u: t / u,
    "t @ t": lambda t, u: t @ u.T, "-t": lambda t, u: -t, "t ** 2": lambda t, u: t ** 2,
    "t ** -1.0": lambda t, u: t ** -1.0, "t + 2": lambda t, u: t + 2, "2 + t": lambda t, u: 2 + t,
    "t - 0.5": lambda t, u: t - 0.5, "0.5 - t": lambda t, u: 0.5 - t, "t * 3": lambda t, u: t * 3,
    "3.0 * t": lambda t, u: 3.0 * t, "t / 4": lambda t, u: t / 4, "1 / t": lambda t, u: 1 / t,
    "t[1]": lambda t, u: t[1], "t[:, ::-1]": lambda t, u: t[:, ::-1], "t.T": lambda t, u: t.T,
    "sum": lambda t, u: t.sum(), "sum 0": lambda t, u: t.sum(0),
    "sum keepdims": lambda t, u: t.sum(axis=1, keepdims=True),
    "mean": lambda t, u: t.mean(), "mean axes": lambda t, u: t.mean((0, 1)), "reshape": lambda t, u: t.reshape(3, 2),
    "reshape tuple": lambda t, u: t.reshape((-1,)), "transpose": lambda t, u: t.transpose(1, 0),
    "transpose all": lambda t, u: t.transpose(),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_operators_mean_what_they_mean_in_numpy(name, kind, device):
    result = OPERATORS[name](kind(place(A)), kind(place(B)))
    expected = OPERATORS[name](A, B)
    assert type(result) is Tensor and result.device.name == device
    np.testing.assert_allclose(fetch(result), expected, rtol=1e-15, strict=True)


@pytest.mark.parametrize("name", ["t + t", "t - t", "t * t", "t / t", "t @ t"])
def test_raw_arrays_are_constants_on_both_sides(name, device):
    expected = OPERATORS[name](A, B)
    for left, right in [(Tensor(place(A)), place(B)), (place(A), Tensor(place(B)))]:
        result = OPERATORS[name](left, right)
        assert type(result) is Tensor
        np.testing.assert_array_equal(fetch(result), expected)


def test_python_numbers_promote_nothing(device):
    for dtype in ("float16", "float32"):
        t = Tensor(place(A, dtype))
        for y in (t + 1, 1.5 - t, t * 1e-3, 2 / t, t ** 3, t ** 0.0, t.mean(), -t):
            assert y.dtype == dtype


def test_gradients_flow_through_operators(device):
    p = Parameter(place(A))
    (2.0 * p - p / 4 + (p * p)[0] + 1.0 / p).sum().backward()
    expected = 2.0 - 0.25 - 1.0 / A ** 2
    expected[0] += 2 * 2 * A[0]
    np.testing.assert_allclose(fetch(p.grad), expected, rtol=1e-14)


def test_augmented_assignment_makes_a_new_tensor(device):
    t = u = Tensor(place(A))
    t += 1.0
    assert t is not u
    np.testing.assert_array_equal(fetch(u), A)


def test_a_tensor_as_index(device):
    index = Tensor(place([1, 0, 1]))
    np.testing.assert_array_equal(fetch(Tensor(place(A))[index]), A[[1, 0, 1]])
    np.testing.assert_array_equal(fetch(Tensor(place(A))[:, index]), A[:, [1, 0, 1]])


def test_iteration_gives_the_rows(device):
    rows = list(Tensor(place(A)))
    assert len(rows) == 2
    np.testing.assert_array_equal(fetch(rows[1]), A[1])


@pytest.mark.parametrize("index", [2, -3, (0, 3), [0, 5]], ids=str)
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError):
        Tensor(A)[index]


# -- conversions -------------------------------------------------------------------------------------------------------


def test_properties(device):
    t = Tensor(place(A, "float32"))
    assert (t.shape, t.ndim, t.size, t.dtype, len(t), t.device.name) == ((2, 3), 2, 6, np.float32, 2, device)


def test_item_and_float(device):
    t = Tensor(place([[2.5]]))
    assert t.item() == 2.5 and type(t.item()) is float and float(t) == 2.5
    assert type(Tensor(place(7)).item()) is int


def test_item_of_more_than_one_element_says_what_to_do(device):
    for convert in (Tensor.item, float):
        with pytest.raises(errors.ShapeError, match=r"one element, got shape \(2, 3\).*mean"):
            convert(Tensor(place(A)))


def test_truth_is_that_of_the_one_number(device):
    """Not that of len(), which would call three zeros true."""
    assert not Tensor(place([0.0])) and Tensor(place(3.0))
    with pytest.raises(errors.ShapeError):
        bool(Tensor(place(np.zeros(3))))


def test_numpy_is_a_copy(device):
    t = Tensor(place(A))
    host = t.numpy()
    host[...] = 0.0
    np.testing.assert_array_equal(fetch(t), A)


def test_repr_shows_numbers_dtype_and_origin(device):
    p = Parameter(place([1.0, 2.0], "float32"))
    assert repr(p) == "Parameter([1. 2.], dtype=float32)"
    assert repr(p * 2.0) == "Tensor([2. 4.], dtype=float32, by Mul)"
    assert repr(Tensor(p.data)) == "Tensor([1. 2.], dtype=float32)"
    assert repr(Parameter(p.data, trainable=False)) == "Parameter([1. 2.], dtype=float32, frozen)"


def test_data_is_used_as_it_is_and_detach_shares_it(device):
    array = place(A)
    p = Parameter(array)
    assert p.data is array and p.detach().data is array and p.detach().node is None


def test_tensor_makes_one_on_the_current_device(device):
    t = minilora.tensor([[1, 2], [3, 4]], dtype="float32")
    assert (type(t), t.device.name, t.dtype) == (Tensor, device, np.float32)
    np.testing.assert_array_equal(fetch(t), [[1, 2], [3, 4]])
    assert minilora.tensor(2.0).shape == () and minilora.tensor([1, 2]).dtype.kind == "i"


def test_tensor_of_a_tensor_has_its_numbers(device):
    t = minilora.tensor(Tensor(place(A)))
    assert t.dtype == np.float64
    np.testing.assert_array_equal(fetch(t), A)


@pytest.mark.parametrize("value", ["text", [None], [[1.0], [1.0, 2.0]], object(), np.array(["1"]), np.array([1, None])],
                         ids=["text", "None", "ragged", "object", "array of text", "array of objects"])
def test_tensor_refuses_what_is_no_number(value):
    with pytest.raises((errors.DTypeError, errors.ShapeError)):
        minilora.tensor(value)


# -- what may be a parameter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex128", "object"])
def test_a_parameter_must_be_floating_point(dtype):
    with pytest.raises(errors.DTypeError, match=f"dtype {dtype}.*astype"):
        Parameter(np.zeros(3, dtype))


@pytest.mark.parametrize("value", [[1.0], 1.0, np.float64(1.0), None, "1", Tensor(np.ones(2))],
                         ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", [Tensor, Parameter])
def test_data_must_be_an_array(kind, value):
    with pytest.raises(errors.DTypeError, match=f"expected an array, got {type(value).__name__}.*minilora.tensor"):
        kind(value)


def test_integers_flow_through_but_have_no_gradient():
    counts = Tensor(np.array([1, 2, 3]))
    y = counts + 1
    assert y.node is None and y.dtype.kind == "i"
    with pytest.raises(errors.GraphError):
        y.sum().backward()


def test_a_parameter_stands_for_itself_only_while_trainable():
    p = Parameter(np.ones(2))
    assert p.node is p and p.grad is None
    p.trainable = False
    assert p.node is None and (p * 2.0).node is None


def test_memory_mapped_arrays_are_arrays(tmp_path):
    np.save(tmp_path / "weights.npy", A)
    mapped = np.load(tmp_path / "weights.npy", mmap_mode="r")
    assert backend.device_of(mapped).name == "cpu"
    p = Parameter(np.array([1.0, 1.0, 2.0]))
    y = Tensor(mapped) * p
    y.sum().backward()
    np.testing.assert_array_equal(p.grad, A.sum(axis=0))


def test_a_float_gradient_of_a_whole_number_index_keeps_its_dtype(device):
    p = Parameter(place(A, "float32"))
    ops.getitem(p, (1, 2)).backward()
    expected = np.zeros_like(A)
    expected[1, 2] = 1.0
    np.testing.assert_array_equal(fetch(p.grad), expected.astype("float32"), strict=True)
