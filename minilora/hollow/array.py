"""The hollow array: shape, dtype, strides and memory of an array, and no number.

It answers what is asked about an array, not about its numbers, as NumPy's own array would: which views share memory, in which
order a result lies, whether a reshape copies. Operators and NumPy's functions come to it by NumPy's protocols; what each gives
is in `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..errors import DeviceError
from .meter import Memory
from .views import broadcast, contiguous, cut, in_order_of, regrouped

__all__ = ["Hollow", "protocol"]

Shape = tuple[int, ...]

protocol: dict[str, Callable[..., Any]] = {}  # of_ufunc, of_function, known, fewer: put in by who makes arrays itself


class Flags(NamedTuple):
    c_contiguous: bool
    f_contiguous: bool
    owndata: bool
    writeable: bool = True


class Hollow(NDArrayOperatorsMixin):
    """An array without numbers.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : dtype
    strides : tuple of int, optional
        Bytes from one element to the next along each axis; rows one after the other by default.

    Examples
    --------
    >>> import numpy
    >>> x = Hollow((1000, 2000), "float32")
    >>> numpy.dot(x, x.T).shape, x.nbytes, x[:10].base is x
    ((1000, 1000), 8000000, True)
    """

    __slots__ = ("base", "dtype", "memory", "role", "shape", "strides")
    __hash__ = None  # type: ignore[assignment]
    ctypes = SimpleNamespace(data=0)  # an address, for who wants to start at a cache line

    def __init__(self, shape: Any, dtype: Any, strides: Shape | None = None) -> None:
        self.shape: Shape = (int(shape),) if isinstance(shape, (int, numpy.integer)) else tuple(map(int, shape))
        self.dtype: Any = numpy.dtype(dtype)
        self.strides: Shape = contiguous(self.shape, self.dtype.itemsize) if strides is None else strides
        self.base: Hollow | None = None
        self.role = ""  # "weights" or "adapters": of a parameter, its views and its copies in another dtype
        self.memory = Memory(math.prod(self.shape) * self.dtype.itemsize)

    @classmethod
    def like(cls, array: Any, shape: Shape | None = None, dtype: Any = None) -> Hollow:
        """A new one of the shape, dtype and order of an array, or of others."""
        dtype = numpy.dtype(array.dtype if dtype is None else dtype)
        shape = tuple(array.shape) if shape is None else shape
        if len(shape) != len(array.shape):
            return cls(shape, dtype)
        return cls(shape, dtype, in_order_of(array.strides, array.shape, shape, dtype.itemsize))

    def seen(self, shape: Shape, strides: Shape, dtype: Any = None) -> Hollow:
        """A view."""
        view = object.__new__(Hollow)
        view.shape, view.strides, view.dtype = shape, strides, dtype or self.dtype
        view.memory, view.base, view.role = self.memory, self if self.base is None else self.base, self.role
        return view

    # -- what is known without numbers ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def flags(self) -> Flags:
        lengths = [(n, stride) for n, stride in zip(self.shape, self.strides) if n != 1]
        empty = self.size == 0
        rows = contiguous(tuple(n for n, _ in lengths), self.itemsize)
        columns = contiguous(tuple(n for n, _ in reversed(lengths)), self.itemsize)[::-1]
        own = tuple(stride for _, stride in lengths)
        return Flags(empty or own == rows, empty or own == columns, self.base is None)

    @property
    def T(self) -> Hollow:
        return self.seen(self.shape[::-1], self.strides[::-1])

    @property
    def real(self) -> Hollow:
        return self

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __iter__(self) -> Iterator[Hollow]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Hollow({self.shape}, {self.dtype.name})"

    # -- what is not ------------------------------------------------------------------------------------------------

    def fewer(self, places: Sequence[Any]) -> Iterator[Any]:
        """The places of a walk over this array that differ: see `ops.few`."""
        return protocol["fewer"](places)  # type: ignore[no-any-return]

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise DeviceError(f"a look at the numbers of an array {self.dtype} {self.shape}, of which a plan knows shape and "
                          "dtype only: what a step does must not depend on them. On a GPU each look would wait for it, too")

    __bool__ = __float__ = __int__ = __index__ = __complex__ = item = tolist = __array__ = _refuse

    # -- views and copies -------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Hollow:
        shape, strides = cut(key, self.shape, self.strides)
        return Hollow(shape, self.dtype) if strides is None else self.seen(shape, strides)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def reshape(self, *shape: Any, order: str = "C") -> Hollow:
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        wanted = tuple(map(int, given))
        if -1 in wanted:
            rest = math.prod(n for n in wanted if n != -1)
            wanted = tuple(self.size // max(rest, 1) if n == -1 else n for n in wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"cannot reshape array of size {self.size} into shape {wanted}")
        strides = regrouped(self.shape, self.strides, wanted, self.itemsize)
        return Hollow(wanted, self.dtype) if strides is None else self.seen(wanted, strides)

    def transpose(self, *axes: Any) -> Hollow:
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        places = range(self.ndim)[::-1] if not order else [int(i) % self.ndim for i in order]
        return self.seen(tuple(self.shape[i] for i in places), tuple(self.strides[i] for i in places))

    def swapaxes(self, a: int, b: int) -> Hollow:
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return self.transpose(order)

    def broadcast_to(self, shape: Any) -> Hollow:
        shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        return self.seen(shape, broadcast(self.shape, self.strides, shape))

    def view(self, dtype: Any = None) -> Hollow:
        new = numpy.dtype(self.dtype if dtype is None else dtype)
        if new.itemsize == self.itemsize or not self.shape:
            return self.seen(self.shape, self.strides, new)
        *lead, last = self.shape
        return self.seen((*lead, last * self.itemsize // new.itemsize), (*self.strides[:-1], new.itemsize), new)

    def squeeze(self, axis: Any = None) -> Hollow:
        gone = set(range(self.ndim)) if axis is None else {i % self.ndim for i in numpy.atleast_1d(axis)}
        kept = [i for i in range(self.ndim) if self.shape[i] != 1 or i not in gone]
        return self.seen(tuple(self.shape[i] for i in kept), tuple(self.strides[i] for i in kept))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> Hollow:
        if not copy and self.dtype == numpy.dtype(dtype):
            return self
        made = Hollow.like(self, dtype=dtype)
        made.role = self.role
        return made

    def copy(self, order: str = "C") -> Hollow:
        return Hollow(self.shape, self.dtype)

    def ravel(self, order: str = "C") -> Hollow:
        return self.reshape(-1)

    def flatten(self, order: str = "C") -> Hollow:
        return Hollow(self.size, self.dtype)

    def fill(self, value: Any) -> None:
        pass

    def __copy__(self) -> Hollow:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> Hollow:
        return self.copy()

    # -- NumPy's protocols ------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return protocol["of_ufunc"](ufunc, method, inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return protocol["of_function"](function, args, options)

    def __getattr__(self, name: str) -> Any:
        """Methods that are functions of NumPy's too: ``x.sum(axis=0)``."""
        function = getattr(numpy, name, None)
        if name.startswith("_") or function is None or not protocol["known"](function):
            raise AttributeError(f"an array without numbers has no {name!r}: minilora/hollow/rules.py lacks it")
        return lambda *args, **options: protocol["of_function"](function, (self, *args), options)
