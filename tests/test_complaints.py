"""What the walk says about a backward that is wrong: each usual mistake has its own words, and changes nothing."""
import re

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

from minilora import Parameter, Tensor, complaints, engine, errors, ops


class Planted(engine.Op):
    """y = the sum of the inputs, broadcast; `wrong` is its backward."""

    def forward(self, *xs):
        self.save(*xs)
        return sum(xs[1:], xs[0] * 1.0)

    def backward(self, dy):
        return self.wrong(self, dy)


def complaint(wrong, *shapes):
    """The message of the error that a backward leads to; no gradient may have arrived."""
    leaves = [Parameter(place(np.ones(shape))) for shape in shapes]
    y = engine.apply(Planted, *leaves, wrong=wrong)
    with pytest.raises(errors.GraphError) as caught:
        (y * y).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    return str(caught.value)


ONE = "return (dx,), a tuple with one gradient for each input"
RETURNED = {
    "an array": (lambda op, dy: dy, f"Planted.backward: an array was returned: {ONE}"),
    "a Tensor": (lambda op, dy: Tensor(dy), f"an array was returned: {ONE}"),
    "a generator": (lambda op, dy: (dx for dx in [dy]), f"a generator was returned: {ONE}"),
    "a number": (lambda op, dy: 2.0, f"a float was returned: {ONE}"),
    "a dict": (lambda op, dy: {0: dy}, f"a dict was returned: {ONE}"),
    "nothing": (lambda op, dy: None, "Planted.backward returned None: is a return missing?"),
    "too many": (lambda op, dy: (dy, dy), "returned 2 gradients for 1 input: return one, or None, for each"),
    "too few": (lambda op, dy: [], "returned 0 gradients for 1 input"),
    "None in its place": (lambda op, dy: (None,), "got None. None is for an input that wants no gradient, see self.needs"),
    "a Tensor in its place": (lambda op, dy: (Tensor(dy),), "got a Tensor: backward works on arrays and returns arrays"),
    "a number in its place": (lambda op, dy: (1.0,), "got a float: return an array"),
    "a list in its place": (lambda op, dy: ([1.0],), "got a list: return an array"),
}


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("shape", [(1,), (1, 3), (2, 3)])
def test_what_is_no_tuple_of_arrays_is_refused(name, shape, device):
    """An array whose first axis is as long as there are inputs would be taken for a tuple of rows."""
    wrong, words = RETURNED[name]
    assert words in complaint(wrong, shape)


def test_an_array_is_never_taken_for_its_rows(device):
    for shape, n in (((1, 1), 1), ((2, 2), 2), ((3,), 3), ((2, 0), 2)):
        text = complaint(lambda op, dy: dy, *[shape] * n)
        assert f"an array was returned: return {'(dx,)' if n == 1 else f'a tuple of {n}'}," in text


def test_a_list_of_the_right_length_is_as_good_as_a_tuple(device):
    x = Parameter(place(np.ones((2, 2))))
    engine.apply(Planted, x, wrong=lambda op, dy: [3.0 * dy]).sum().backward()
    assert (fetch(x.grad) == 3.0).all()


SHAPES = [
    ((3, 4), (4, 3), "this is the transposed shape: is a .T missing, or one too many?"),
    ((2, 3, 4), (4, 3, 2), "this is the transposed shape"),
    ((2, 3, 4), (3, 4, 2), "in another order: is a .transpose(2, 0, 1) missing?"),
    ((4,), (3, 4), "was this input broadcast? Sum the gradient over axis 0, as minilora.ops.elementwise.unbroadcast"),
    ((), (3, 4), "Sum the gradient over axes 0, 1, as"),
    ((1, 4), (3, 4), "Sum the gradient over axis 0 with keepdims=True, as"),
    ((3, 1), (2, 3, 4), "Sum the gradient over axis 0 and over axis 2 with keepdims=True, as"),
    ((1, 3), (0, 3), "Sum the gradient over axis 0 with keepdims=True, as"),
    ((3, 4), (2, 6), "it has as many elements, reshape it: dx.reshape((3, 4))"),
    ((1, 4), (4,), "reshape it: dx.reshape((1, 4))"),
    ((), (1,), "reshape it: dx.reshape(())"),
    ((3, 4), (4,), "Spread it: self.xp.broadcast_to(dx, (3, 4))"),
    ((3, 4), (), "Spread it: self.xp.broadcast_to(dx, (3, 4))"),
    ((3, 4), (7, 7), "wants a gradient of that shape, got shape (7, 7)"),
]


@pytest.mark.parametrize(("wanted", "got", "words"), SHAPES)
def test_a_wrong_shape_is_explained(wanted, got, words, device):
    text = complaint(lambda op, dy: (op.xp.ones(got),), wanted)
    assert text.startswith(f"Planted.backward: input 0 has shape {wanted} and wants a gradient of that shape, got shape {got}")
    assert words in text and "input order" not in text


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(shapes, shapes)
def test_the_advice_about_a_shape_works_and_none_raises(got, wanted):
    """What `misfit` advises is done, and leads to the shape that is wanted."""
    hint, dx = complaints.misfit(got, wanted), np.ones(got)
    if got == wanted:
        return
    if ".T " in hint:
        assert dx.T.shape == wanted
    elif "transpose" in hint:
        assert dx.transpose(eval(re.search(r"transpose(\(.*?\))", hint)[1])).shape == wanted
    elif "dx.reshape" in hint:
        assert dx.reshape(wanted).shape == wanted
    elif "unbroadcast" in hint:
        assert ops.elementwise.unbroadcast(dx, wanted).shape == wanted
        added, stretched = complaints.summed(got, wanted)
        assert dx.sum(axis=stretched, keepdims=True).sum(axis=added).shape == wanted
    elif "broadcast_to" in hint:
        assert np.broadcast_to(dx, wanted).shape == wanted
    else:
        assert hint == "" and dx.size != np.prod(wanted)


def test_gradients_in_another_order_are_named(device):
    text = complaint(lambda op, dy: (dy, dy[0]), (4,), (3, 4))
    assert text.endswith("The gradients are in the order of inputs 1, 0: are two swapped?")
    assert "input 0 has shape (4,)" in text and "Input 1 has shape (3, 4)" in text
    text = complaint(lambda op, dy: (dy[:, :1], dy, dy[0]), (3, 4), (4,), (3, 1))
    assert "in the order of inputs 2, 0, 1" in text
    text = complaint(lambda op, dy: (dy[:2], dy), (3, 4), (3, 4))
    assert text.endswith("got shape (2, 4). Are the gradients in input order?")


def test_all_that_is_wrong_is_in_one_message(device):
    text = complaint(lambda op, dy: (dy.T, None), (3, 4), (4,))
    assert "transposed shape" in text and "Input 1 has shape (4,) and wants a gradient of that shape, got None" in text


@pytest.mark.parametrize("device", ["standin", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_an_array_of_another_device_is_refused(device):
    text = complaint(lambda op, dy: (np.ones((2, 3)),), (2, 3))
    assert "got a numpy.ndarray where the graph holds" in text


def test_a_wrong_dtype_names_the_operation(device):
    text = complaint(lambda op, dy: (dy.astype("float32"),), (2, 3))
    assert text.startswith("Planted.backward gave a gradient of dtype float32")


# -- what goes wrong inside -------------------------------------------------------------------------------------------


class Square(engine.Op):
    """y = x^2, which saves what it is told to."""

    keeps = 0

    def forward(self, x):
        if self.keeps:
            self.save(*[x] * self.keeps)
        return x * x


class Unpacks(Square):
    def backward(self, dy):
        (x,) = self.saved
        return (2.0 * x * dy,)


class UnpacksTwo(Square):
    def backward(self, dy):
        (
            x,
            w,
        ) = self.saved
        return (2.0 * x * dy,)


class Indexes(Square):
    def backward(self, dy):
        return (self.saved[0] * dy + self.saved[1],)


SAVED = [
    (Unpacks, 0, "Unpacks.backward: self.saved is empty: did forward call self.save(...)? (backward unpacks 1)"),
    (Unpacks, 2, "Unpacks.backward: forward saved 2 arrays, backward unpacks 1"),
    (UnpacksTwo, 0, "self.saved is empty: did forward call self.save(...)? (backward unpacks 2)"),
    (UnpacksTwo, 1, "forward saved 1 array, backward unpacks 2: self.save(...) lists what backward reads, in that order"),
    (UnpacksTwo, 3, "forward saved 3 arrays, backward unpacks 2"),
    (Indexes, 0, "Indexes.backward: self.saved is empty: did forward call self.save(...)?"),
    (Indexes, 1, "forward saved 1 array, backward asks for more"),
]


@pytest.mark.parametrize(("op", "keeps", "words"), SAVED)
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_what_was_not_saved_is_named(op, keeps, words, dtype, device):
    x = Parameter(place(np.ones(3), dtype))
    y = engine.apply(op, x, keeps=keeps)
    with pytest.raises(errors.GraphError, match=re.escape(words)) as caught:
        y.sum().backward()
    assert isinstance(caught.value.__cause__, (ValueError, IndexError)) and x.grad is None


class Breaks(Square):
    """Fails in its own way."""

    def backward(self, dy):
        raise self.error


class UnpacksOther(Square):
    def backward(self, dy):
        a, b = (dy,)  # no word of what forward keeps
        return (a * b,)


ERRORS = [ValueError("own"), IndexError("tuple index out of range"), errors.ShapeError("two shapes"), AttributeError("q")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_another_error_keeps_its_type_and_says_where(error, device):
    y = engine.apply(Breaks, Parameter(place(np.ones((2, 3)))), error=error, keeps=1)
    with pytest.raises(type(error)) as caught:
        y.sum().backward()
    assert caught.value is error
    assert error.__notes__ == ["in Breaks.backward: dy float64 (2, 3), inputs (2, 3), saved float64 (2, 3)"]
    del error.__notes__


def test_an_unpacking_that_has_nothing_to_do_with_saved_stays_itself():
    y = engine.apply(UnpacksOther, Parameter(np.ones((2, 3))))
    with pytest.raises(ValueError, match="not enough values to unpack") as caught:
        y.sum().backward()
    assert caught.value.__notes__ == ["in UnpacksOther.backward: dy float64 (2, 3), inputs (2, 3), saved nothing"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_as_it_is(error):
    y = engine.apply(Breaks, Parameter(np.ones(3)), error=error())
    with pytest.raises(error) as caught:
        y.sum().backward()
    assert not hasattr(caught.value, "__notes__")


def test_an_override_goes_by_the_name_of_its_operation():
    class Other(Planted):
        reference = Planted
    y = engine.apply(Other, Parameter(np.ones(3)), wrong=lambda op, dy: dy)
    with pytest.raises(errors.GraphError, match="^Planted.backward: an array"):
        y.sum().backward()


def test_scalars_of_numpy_are_gradients_where_no_axis_is_left():
    w = Parameter(np.array(3.0))
    engine.apply(Planted, w, wrong=lambda op, dy: (np.float64(2.0),)).backward()
    assert w.grad == 2.0 and isinstance(w.grad, np.ndarray)
