"""The table of CuPy's functions that the stand-in offers, and the module-like object `xp` made from it."""
from __future__ import annotations

import numpy as np

from .arrays import adopt, launch, launch_list, ndarray, operand, option
from .counts import count, perform
from .cublas import gemm
from .streams import cuda

# Names that exist in CuPy 14 under NumPy's meaning, by the kind of their arguments. To add a function,
# add its name here; a name that is not here does not exist on the pretended device.
UFUNCS = """add subtract multiply divide true_divide floor_divide remainder power negative positive absolute
    abs sign exp exp2 expm1 log log2 log10 log1p sqrt cbrt square reciprocal sin cos tan arctan arctan2 sinh
    cosh tanh logaddexp floor ceil trunc rint maximum minimum isfinite isnan isinf signbit copysign conj
    conjugate matmul equal not_equal less less_equal greater greater_equal logical_and logical_or
    logical_xor logical_not bitwise_and bitwise_or bitwise_xor invert left_shift right_shift""".split()
ONE_ARRAY = """sum mean max min amax amin any all prod argmax argmin cumsum cumprod var std count_nonzero
    sort argsort expand_dims broadcast_to swapaxes moveaxis transpose permute_dims reshape ravel squeeze
    tile repeat pad split tril triu flip roll diagonal trace ascontiguousarray nan_to_num real imag
    zeros_like ones_like full_like""".split()
TWO_ARRAYS = "dot outer tensordot take take_along_axis searchsorted isclose allclose array_equal".split()
THREE_ARRAYS = "where clip".split()
ARRAY_LIST = "concatenate concat stack vstack hstack".split()
CREATION = "zeros ones full eye identity arange linspace".split()
QUERIES = "shape ndim size result_type can_cast may_share_memory".split()
CONSTANTS = """float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool_ complex64
    complex128 newaxis pi e inf nan dtype finfo iinfo issubdtype integer floating inexact complexfloating
    broadcast_shapes""".split()
# The shape of the result depends on the data; cuSOLVER reports its success to the host.
SYNCHRONISING = "nonzero unique bincount".split()
LINALG, LINALG_SYNCHRONISING = ["norm"], "qr svd inv solve".split()

# Keywords of NumPy that CuPy lacks, or that work there in part.
NOT_IN_CUPY = {"where", "initial", "subok", "casting", "like", "signature", "device", "correction", "stable",
               "sorted", "hermitian"}
NOT_IN_ITS_CUPY = {"count_nonzero": {"keepdims"}, "take": {"mode"}, "clip": {"min", "max"}, "var": {"mean"},
                   "std": {"mean"}, "sort": {"order"}, "argsort": {"order"}}
# CuPy adds atomically for these dtypes only.
ADD_AT = "int32 uint32 uint64 float16 float32 float64".split()


def _device_function(name, arrays, module=np, syncs=False):
    """Wrap one NumPy function; `arrays` is its number of leading array arguments, or "list"."""
    function = getattr(module, name)
    lacking = NOT_IN_CUPY | NOT_IN_ITS_CUPY.get(name, set())

    def call(*args, out=None, **options):
        if refused := lacking & options.keys():
            raise TypeError(f"xp.{name}: CuPy has no keyword {', '.join(sorted(refused))}, or only in part")
        if syncs:
            count(name, "syncs")
        if arrays == "list":
            return launch_list(name, function, args, options, out)
        if isinstance(function, np.ufunc) and len(args) == arrays + 1:
            *args, out = args
        elif arrays and not isinstance(function, np.ufunc) and not (args and isinstance(args[0], ndarray)):
            raise TypeError(f"xp.{name}: expected a device array first")
        if name == "clip" and args[0].dtype.kind == "c":
            raise TypeError("Wrong type of arguments for cupy_clip: it has no version for complex numbers")
        if name == "where" and len(args) != 3:
            raise TypeError("xp.where needs three arguments: with one, the data decide the shape")
        return launch(name, function, arrays, tuple(args), options, out)

    call.__name__ = call.__qualname__ = name
    return call


def _query(name):
    function = getattr(np, name)

    def call(*args, **options):
        return function(*(arg._host if isinstance(arg, ndarray) else option(arg) for arg in args), **options)
    return call


def shares_memory(one, other):
    """CuPy compares addresses that a kernel takes; of an array without axes it gets that of a temporary, always the same."""
    if not (isinstance(one, ndarray) and isinstance(other, ndarray)):
        raise TypeError("xp.shares_memory: expected two device arrays")
    if one.ndim == other.ndim == 0:
        return True
    count("shares_memory", "launches", "syncs")
    return np.shares_memory(one._host, other._host)


def array(value, dtype=None, copy=True):
    """Copy to the device what is on the host, a number too; a device array is copied as `copy` says."""
    if isinstance(value, ndarray):
        return value.astype(value.dtype if dtype is None else dtype, copy=copy)
    host = np.array(value, dtype=dtype)
    count("asarray", "h2d")
    return adopt(host)


def asarray(value, dtype=None):
    return array(value, dtype, copy=False)


def asnumpy(value):
    """Copy to the host; what is there already stays as it is."""
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def empty(shape, dtype=float):
    """Return memory whose content must not be used: NaN, or the largest integer."""
    host = np.empty(option(shape), dtype)
    if host.dtype.kind in "iu":
        host.fill(np.iinfo(host.dtype).max)
    elif host.dtype.kind == "b":
        host.fill(True)
    else:
        host.fill(np.nan)
    return adopt(host)


def empty_like(prototype, dtype=None, shape=None):
    if not isinstance(prototype, ndarray):
        raise TypeError(f"xp.empty_like: expected a device array, not {type(prototype)}")
    return empty(prototype.shape if shape is None else shape, dtype or prototype.dtype)


def einsum(subscripts, *arrays, optimize=False):
    return launch("einsum", lambda *hosts: np.einsum(subscripts, *hosts), len(arrays), arrays, {})


def copyto(target, source):
    if not isinstance(target, ndarray):
        raise TypeError(f"xp.copyto: expected a device array first, not {type(target)}")
    count("copyto", "launches")
    host = operand(source, [])
    perform(lambda: np.copyto(target._host, host))


def add_at(target, index, values):
    """Add `values` at `index`, each as often as it occurs."""
    if not isinstance(target, ndarray):
        raise TypeError(f"xp.add.at: expected a device array first, not {type(target)}")
    if target.dtype.name not in ADD_AT:
        raise TypeError(f"xp.add.at: CuPy supports {', '.join(ADD_AT)}, not {target.dtype}")
    count("add.at", "launches")
    key, host = target._key(index), operand(values, [])
    perform(lambda: np.add.at(target._host, key, host))


class Module:
    """A namespace that has what the table has, and says so about any other name."""

    def __init__(self, name, contents):
        self.__name__ = name
        self.__dict__.update(contents)

    def __getattr__(self, name):
        if name == "random":
            raise AttributeError("no xp.random: minilora draws on the host")
        raise AttributeError(f"the stand-in has no {self.__name__}.{name}: CuPy has no such name, or the "
                             "table in tests/standin/functions.py lacks it")


def _make():
    linalg = {name: _device_function(name, 1, np.linalg) for name in LINALG}
    linalg |= {name: _device_function(name, 2 if name == "solve" else 1, np.linalg, syncs=True)
               for name in LINALG_SYNCHRONISING}
    contents = {name: getattr(np, name) for name in CONSTANTS}
    contents |= {name: _query(name) for name in QUERIES}
    contents |= {name: _device_function(name, getattr(np, name).nin) for name in UFUNCS}
    for names, arrays in [(CREATION, 0), (ONE_ARRAY, 1), (TWO_ARRAYS, 2), (THREE_ARRAYS, 3),
                          (ARRAY_LIST, "list")]:
        contents |= {name: _device_function(name, arrays) for name in names}
    contents |= {name: _device_function(name, 1, syncs=True) for name in SYNCHRONISING}
    contents |= dict(shares_memory=shares_memory, ndarray=ndarray, array=array, asarray=asarray, asnumpy=asnumpy, empty=empty,
                     empty_like=empty_like, einsum=einsum, copyto=copyto, linalg=Module("xp.linalg", linalg),
                     cublas=Module("xp.cublas", dict(gemm=gemm)), cuda=Module("xp.cuda", cuda))
    contents["add"].at = add_at
    return Module("xp", contents)


xp = _make()
