"""The device array, and the one road by which NumPy computes on it."""
from __future__ import annotations

import ctypes
import weakref
from collections import namedtuple

import numpy as np

from .counts import count, is_recorded, perform

REFUSAL = "Implicit conversion to a NumPy array is not allowed. Use `.get()` to copy to the host explicitly."
HOST_VALUES = (np.ndarray, np.float64, np.complex128, np.longdouble, np.clongdouble)


class Place(namedtuple("Place", "ptr")):
    """`cupy.cuda.MemoryPointer`."""

    def copy_from_host_async(self, source, size, stream):
        if self.ptr.offset + size > self.ptr.root.nbytes:
            raise ValueError("a copy reaches beyond an array")
        count("copy_from_host_async", "h2d")
        ctypes.memmove(int(self.ptr), source, size)


Flags = namedtuple("Flags", "c_contiguous f_contiguous owndata")


def operand(value, sources):
    """Return what NumPy computes with in place of `value`; a device array is added to `sources`."""
    if isinstance(value, ndarray):
        sources.append(value)
        return value._host
    if isinstance(value, HOST_VALUES):
        raise TypeError(f"Unsupported type {type(value)}: a host value met the device. Copy an array with "
                        "xp.asarray, write a scalar as a Python number.")
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return value
    raise TypeError(f"Unsupported type {type(value)}: expected a device array or a Python number")


def option(value):
    """Return an argument that is no array (axis, shape, dtype) as it is; refuse arrays of either kind."""
    if isinstance(value, (ndarray, *HOST_VALUES)):
        raise TypeError(f"Unsupported type {type(value)} as an option; arrays are passed first, by position")
    if type(value) in (list, tuple):
        return type(value)(map(option, value))
    return value


def launch(call, function, arrays, args, options, out=None):
    """Let NumPy's `function` compute; its first `arrays` arguments are arrays, the others are options."""
    if call in ("dot", "matmul") and is_recorded():
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    sources: list[ndarray] = []
    hosts = [operand(value, sources) for value in args[:arrays]]
    hosts += [option(value) for value in args[arrays:]]
    result = _computed(call, function, hosts, options, sources, out)
    for _ in range(_hidden(call, args, out)):
        count("copy", "launches")
    return result


def _hidden(call, args, out):
    """Launches that CuPy 14 adds to a call.

    A product of matrices copies operands that are ordered neither by rows nor by columns, a product of stacks of matrices all
    that are not ordered by rows, and both write a strided `out` by way of a copy. tril and triu make a mask first.
    """
    if call in ("dot", "matmul"):
        stacks = call == "matmul" and any(value.ndim > 2 for value in args[:2])
        ready = [value.flags.c_contiguous or (value.flags.f_contiguous and not stacks) for value in args[:2]]
        return [*ready, out is None or out.flags.c_contiguous].count(False)
    return int(call in ("tril", "triu"))


def launch_list(call, function, args, options, out=None):
    """As `launch`, for functions whose first argument is a list or tuple of arrays."""
    sources: list[ndarray] = []
    if not args or type(args[0]) not in (list, tuple):
        raise TypeError(f"{call}: expected a list or tuple of device arrays first")
    if not all(isinstance(value, ndarray) for value in args[0]):
        raise TypeError(f"{call}: expected device arrays only")
    hosts = [operand(value, sources) for value in args[0]]
    return _computed(call, function, [hosts, *map(option, args[1:])], options, sources, out)


def _computed(call, function, hosts, options, sources, out):
    options = {key: option(value) for key, value in options.items()}
    # CuPy has no floating-point warnings.
    with np.errstate(all="ignore"):
        result = function(*hosts, **options)
    if isinstance(result, (list, tuple)):
        kind = list if isinstance(result, list) else tuple
        result = kind(adopt(part, sources) for part in result)
        made = any(part.base is None for part in result)
    else:
        result = adopt(result, sources)
        made = result.base is None and not any(result is source for source in sources)
    if out is not None:
        if not isinstance(out, ndarray):
            raise TypeError(f"{call}: out must be a device array, not {type(out)}")
        if (out.dtype, out.shape) != (result.dtype, result.shape):
            raise TypeError(f"{call}: out is {out.dtype} {out.shape}, "
                            f"the result is {result.dtype} {result.shape}")
        perform(lambda: again(function, hosts, options, out._host))
        result = out
    elif made and is_recorded():
        parts = result if isinstance(result, (list, tuple)) else [result]
        for part in parts:
            part._host[...] = np.nan if part.dtype.kind in "fc" else 0  # nothing has been computed yet
        perform(lambda: again(function, hosts, options, *(part._host for part in parts)))
    if made:
        count(call, "launches")
    return result


def again(function, hosts, options, *places):
    """Compute, and write the results to their places."""
    with np.errstate(all="ignore"):
        results = function(*hosts, **options)
    for place, result in zip(places, results if isinstance(results, (list, tuple)) else [results]):
        place[...] = result


def adopt(host, sources=()):
    """Wrap NumPy's result: one of the sources itself, a view of one, or an owner of new memory."""
    host = np.asarray(host)
    if host.dtype.kind in "OSUMm" or host.dtype.char in "gG":
        raise TypeError(f"Unsupported dtype {host.dtype}")
    array = object.__new__(ndarray)
    array._host, array._base = host, None
    for source in sources:
        if host is source._host:
            return source
        if _root(host) is _root(source._host):
            array._base = source if source._base is None else source._base
    return array


def _root(host):
    while isinstance(host.base, np.ndarray):
        host = host.base
    return host


class Address(int):
    """A pointer, for the pretended cuBLAS: it knows the array that owns the memory, and how far inside it points."""

    _owners = weakref.WeakValueDictionary()  # ctypes hands over numbers: who asked for such an address last

    def __new__(cls, host):
        address = super().__new__(cls, host.ctypes.data)
        address.root = cls._owners[int(address)] = _root(host)
        address.offset = address - address.root.ctypes.data
        return address

    @classmethod
    def known(cls, number):
        """The pointer with this value, as the array there gave it out."""
        address = int.__new__(cls, number)
        address.root = cls._owners[number]
        address.offset = address - address.root.ctypes.data
        return address


class ndarray:
    """An array on the pretended device. Views share memory, and `base` is the owner's own object."""

    __slots__ = ("_host", "_base", "__weakref__")
    __hash__ = None

    def __init__(self, *args, **kwargs):
        raise TypeError("make device arrays with xp.empty, xp.zeros or xp.asarray")

    # Refusals: NumPy must not see inside.

    def __array__(self, dtype=None, copy=None):
        raise TypeError(REFUSAL)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        raise TypeError(f"numpy.{ufunc.__name__} met a device array: use xp.{ufunc.__name__}. " + REFUSAL)

    def __array_function__(self, function, types, args, options):
        name = function.__name__
        raise TypeError(f"numpy.{name} met a device array: use xp.{name}. " + REFUSAL)

    # Device to host: every line below waits for the device.

    def _read(self, call):
        count(call, "syncs", "d2h")
        return self._host.copy()

    def get(self):
        return self._read("get")

    def item(self, *index):
        return self._read("item").item(*index)

    def tolist(self):
        return self._read("tolist").tolist()

    def _scalar(self, kind):
        if self.ndim:
            raise TypeError(f"{kind.__name__}() of an array of shape {self.shape}, expected a 0-d array")
        return kind(self._read(f"{kind.__name__}()"))

    def __float__(self):
        return self._scalar(float)

    def __int__(self):
        return self._scalar(int)

    def __complex__(self):
        return self._scalar(complex)

    def __bool__(self):
        return bool(self._read("bool()"))

    def __repr__(self):
        return repr(self._read("repr()"))

    def __str__(self):
        return str(self._read("str()"))

    def __format__(self, spec):
        return format(self._read("format()"), spec)

    def __reduce__(self):
        return _from_host, (self._read("pickle"),)

    # Host to device.

    def set(self, host):
        """Copy a host array of the same dtype and shape into this one."""
        if not isinstance(host, np.ndarray) or (host.dtype, host.shape) != (self.dtype, self.shape):
            raise TypeError(f"set: expected a numpy.ndarray of {self.dtype} {self.shape}")
        count("set", "h2d")
        self._host[...] = host

    # What is known without looking at the data.

    @property
    def base(self):
        return self._base

    @property
    def flags(self):
        flags = self._host.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, self._base is None)

    @property
    def data(self):
        return Place(Address(self._host))

    @property
    def T(self):
        return self.transpose()

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # Views and copies.

    def reshape(self, *shape, order="C"):
        shape = shape[0] if len(shape) == 1 else shape
        return launch("reshape", np.reshape, 1, (self, shape), {"order": order})

    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 else axes or None
        return launch("transpose", np.transpose, 1, (self, axes), {})

    def view(self, dtype=None):
        return adopt(self._host.view(self.dtype if dtype is None else dtype), [self])

    def astype(self, dtype, copy=True):
        return launch("astype", lambda host: host.astype(dtype, copy=copy), 1, (self,), {})

    def copy(self, order="C"):
        return launch("copy", lambda host: host.copy(order), 1, (self,), {})

    def flatten(self):
        return launch("flatten", lambda host: host.flatten(), 1, (self,), {})

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def conj(self):
        return launch("conj", lambda host: host.conj(), 1, (self,), {})

    conjugate = conj

    @property
    def real(self):
        return launch("real", np.real, 1, (self,), {})

    @property
    def imag(self):
        return launch("imag", np.imag, 1, (self,), {})

    # Indexing.

    def _key(self, key):
        parts = key if isinstance(key, tuple) else (key,)
        hosts = []
        for part in parts:
            if isinstance(part, ndarray):
                if part.dtype.kind not in "biu":
                    raise IndexError(f"an index of {part.dtype}; integers or booleans are needed")
                if part.dtype.kind == "b":
                    # CuPy asks for the number of True, also to store.
                    count("boolean index", "syncs")
                hosts.append(part._host)
            elif isinstance(part, slice) or part is None or part is Ellipsis:
                hosts.append(part)
            elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
                hosts.append(part)
            else:
                raise TypeError(f"an index of {type(part)}: use integers, slices or device arrays")
        # With an Ellipsis NumPy gives a 0-d view where it would give a scalar.
        if not any(part is Ellipsis for part in hosts):
            hosts.append(Ellipsis)
        return tuple(hosts)

    def __getitem__(self, key):
        hosts = self._key(key)
        return launch("getitem", lambda host: host[hosts], 1, (self,), {})

    def __setitem__(self, key, value):
        host = operand(value, [])
        hosts = self._key(key)
        if isinstance(value, ndarray):
            if not np.can_cast(value.dtype, self.dtype, "same_kind"):
                raise TypeError(f"cannot store {value.dtype} in an array of {self.dtype}; use astype")
            fancy = [part for part in hosts if isinstance(part, np.ndarray)]
            if fancy and value.size > 1:
                self._refuse_duplicates(hosts)
            if not fancy and _same_place(self._host[hosts], value._host):
                # `a[i:j] += b` stores a view in its own place: no kernel.
                return
        count("setitem", "launches")
        perform(lambda: again(lambda: host, [], {}, self._host[hosts]) if not any(isinstance(x, np.ndarray) for x in hosts)
                else self._host.__setitem__(hosts, host))

    def _refuse_duplicates(self, hosts):
        places = np.arange(self.size).reshape(self.shape)[hosts]
        if np.unique(places).size != places.size:
            raise ValueError("several values stored at one place by an index with duplicates: which of them "
                             "stays is undefined on a GPU. To add them, use xp.add.at.")

    def fill(self, value):
        if isinstance(value, ndarray) and value.ndim:
            raise ValueError("fill: expected a number or a 0-d device array")
        count("fill", "launches")
        perform(lambda: again(lambda: operand(value, []), [], {}, self._host))


def _same_place(one, other):
    place, other_place = one.__array_interface__, other.__array_interface__
    return all(place[key] == other_place[key] for key in ("data", "shape", "strides", "typestr"))


def _from_host(host):
    count("asarray", "h2d")
    return adopt(host.copy())
