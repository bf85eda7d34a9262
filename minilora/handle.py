"""What Python and NumPy may ask of a tensor: its shape, its numbers, comparisons, text. No calculus, and no graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy

from . import backend
from .calls import answered
from .errors import ArgumentError, DeviceError, DTypeError, ShapeError
from .values import number

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from .typing import Operand

Array = Any  # numpy.ndarray or cupy.ndarray: whichever the device makes


class Elements(int):
    """How many elements a tensor has: an int, and no method, as in NumPy. PyTorch's ``x.size()`` is a shape."""

    __slots__ = ()

    def __call__(self, *axis: Any, **named: Any) -> NoReturn:
        raise ArgumentError(f"x.size is how many elements a tensor has, {int(self)}, and is not called: write x.shape, or "
                            f"x.shape[{axis[0] if axis else named.get('dim', 0)}] for the length of one axis")

    def __reduce__(self) -> Any:
        return int, (int(self),)


class Handle:
    """An array, and Python's own protocols around it; the base of `minilora.Tensor`.

    Notes
    -----
    Comparisons go element by element and give a raw array of booleans on the same device: a comparison has no gradient, and
    an array has all that is done with the answer, ``(t > 0).all()``, ``&``, ``~``, use as an index or a mask. So ``t == u`` is
    no test of identity: that is ``t is u``. As keys of a dict or members of a set, tensors go by identity; but ``in`` and
    ``index`` of a list compare.
    """

    __slots__ = ("__weakref__", "data")

    data: Array

    # NumPy asks this before it takes over `array + tensor`: with None it lets Tensor.__radd__ answer.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self.data.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return Elements(self.data.size)

    @property
    def dtype(self) -> numpy.dtype[Any]:
        return self.data.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> backend.Device:
        return backend.device_of(self.data)

    # -- numbers ----------------------------------------------------------------------------------------------------

    @answered
    def item(self) -> float:
        """The one number in this tensor as a Python number. On a GPU this waits for the device (a sync point)."""
        return self._one("item()")

    def _one(self, what: str) -> float:
        if self.size != 1:
            raise ShapeError(f"{what} needs a tensor with one element, got shape {self.shape}: "
                             "reduce it first, for instance with .mean()")
        return backend.to_host(self.data).item()  # type: ignore[no-any-return]

    @answered
    def numpy(self) -> NDArray[Any]:
        """A copy of the data on the host, as `numpy.ndarray`. On a GPU this waits for the device (a sync point)."""
        return numpy.array(backend.to_host(self.data))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """What ``numpy.asarray(tensor)`` gives: a copy, as `numpy`, so that nobody writes into a parameter unseen.

        Only ``numpy.asarray(tensor, copy=False)`` shares the memory, or raises, as NumPy defines it.
        """
        if self.device is not backend.cpu:
            raise DeviceError(f"NumPy cannot read a tensor on the {self.device.name}, and nothing is copied silently: write "
                              "tensor.numpy(), which copies it to the host (a sync point)")
        return numpy.array(self.data, dtype=dtype, copy=copy is not False)

    def __float__(self) -> float:
        return float(self._one("float()"))

    def __int__(self) -> int:
        return int(self._one("int()"))

    def __index__(self) -> int:
        if self.ndim or self.dtype.kind not in "iu":
            raise DTypeError(f"only a 0-d tensor of integers is an index, got {self.dtype} {self.shape}")
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self._one("bool()"))  # like NumPy, for one element only: `if loss:` means its value, never its length

    def __round__(self, digits: int | None = None) -> float:
        return round(self._one("round()"), digits)

    def __len__(self) -> int:
        if not self.ndim:
            raise DTypeError("a 0-d tensor has no length and no rows: it is one number, tensor.item()")
        return len(self.data)

    # -- comparisons ------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> Any:
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compare(operator.ne, other)

    def __lt__(self, other: Operand) -> Any:
        return self._compare(operator.lt, other)

    def __le__(self, other: Operand) -> Any:
        return self._compare(operator.le, other)

    def __gt__(self, other: Operand) -> Any:
        return self._compare(operator.gt, other)

    def __ge__(self, other: Operand) -> Any:
        return self._compare(operator.ge, other)

    __hash__ = object.__hash__  # by identity: two live objects never share it, so a dict never calls ==

    def __contains__(self, value: Operand) -> bool:
        return bool((self == value).any())

    def _compare(self, comparison: Callable[[Any, Any], Any], other: Any) -> Array:
        if other is None:
            return NotImplemented  # `t == None` is False: no tensor is None
        device = self.device
        y = other.data if isinstance(other, Handle) else number(other)
        if y.__class__ is not float and y.__class__ is not int and backend.device_of(y) is not device:
            raise DeviceError(f"{comparison.__name__}: a tensor on the {device.name}, compared with an array on the "
                              f"{backend.device_of(y).name}. Nothing is copied silently: compare with tensor.numpy()")
        try:
            return device.xp.asarray(comparison(self.data, y))  # NumPy compares 0-d arrays to a scalar
        except ValueError as error:
            raise ShapeError(f"{comparison.__name__}: shapes {self.shape} and {y.shape} do not broadcast ({error})") from error

    # -- text -------------------------------------------------------------------------------------------------------

    def __format__(self, spec: str) -> str:
        return format(self._one(f"the format {spec!r}"), spec) if spec else str(self)

    def _text(self, *more: str) -> str:
        """The numbers, to the digits of their dtype and abbreviated as NumPy does, the dtype, and what else there is to say."""
        name = type(self).__name__
        numbers = numpy.array2string(backend.to_host(self.data), prefix=f"{name}(")
        return f"{name}({', '.join([numbers, f'dtype={self.dtype}', *more])})"

    def __repr__(self) -> str:
        return self._text()
