"""GPU: matrix products by an own, thin binding to cuBLAS.

CuPy's products cost the host 15 to 25 us each, copy what is transposed in a stack of matrices, add to nothing but a whole
array, and may not be recorded into a CUDA graph. cuBLAS itself takes any transposition, any distance between rows, a factor for
the product and one for what is there before, and may be recorded.

cuBLAS stores matrices by columns, so that the memory of a matrix by rows is for it the transpose: out = a b is asked for as
out^T = b^T a^T, and nothing is moved.

What cuBLAS is told about a product depends on shapes, strides and dtypes alone. So it is found out once and kept, as a tuple of
ctypes objects of which a call changes five: three addresses and two factors. ctypes hands such objects over three times as fast
as Python's numbers, and a product costs the host a look into a dict and one call.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

from ..backend import array_module, override

__all__ = ["ArrayModule", "Products", "accumulate", "load", "with_own_products"]

Array = Any

PLANS = 1024  # of a thread; more than a model has. When there are so many, all are forgotten
WORKSPACE = 32 << 20  # bytes for every stream: what NVIDIA recommends for an H100, and more than other cards need
MOST = 2 ** 31  # sizes and distances are C ints
DEFAULT = -1  # CUBLAS_GEMM_DEFAULT
TF32 = 77  # CUBLAS_COMPUTE_32F_FAST_TF32


class Type(NamedTuple):
    """What cuBLAS calls a dtype: cudaDataType, cublasComputeType_t, and the type of the factors."""

    data: int
    compute: int
    scalar: Any


TYPES = {"f": Type(0, 68, ctypes.c_float), "d": Type(1, 70, ctypes.c_double)}
# cudaDataType of factors of a product that is added up, and written, in float32. uint16 are the bits of bfloat16, as in quant.
HALVES = {"float16": 2, "bfloat16": 14, "uint16": 14}
_i, _p, _n = ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong
KINDS: dict[str, list[Any]] = {
    "cublasSetStream_v2": [_p, _p],
    "cublasSetWorkspace_v2": [_p, _p, ctypes.c_size_t],
    "cublasGemmEx": [_p, _i, _i, _i, _i, _i, _p, _p, _i, _i, _p, _i, _i, _p, _p, _i, _i, _i, _i],
    "cublasGemmStridedBatchedEx": [_p, _i, _i, _i, _i, _i, _p, _p, _i, _i, _n, _p, _i, _i, _n, _p, _p, _i, _i, _n, _i, _i, _i],
}


def found() -> Any:
    """The library that CuPy uses on this machine: as it finds it, or one of that name that the system knows."""
    names = ["libcublas.so.13", "libcublas.so.12"]
    with suppress(ImportError, OSError, RuntimeError):  # pathfinder's own error is a RuntimeError
        from cuda.pathfinder import load_nvidia_dynamic_lib

        names.insert(0, load_nvidia_dynamic_lib("cublas").abs_path)
    for name in filter(None, names):
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError(f"no cuBLAS: neither CuPy's pathfinder nor the system finds {' or '.join(names)}")


def load() -> Any:
    """cuBLAS, told the arguments of its functions; OSError if there is none, AttributeError if it lacks a function."""
    library = found()
    for name, kinds in KINDS.items():
        getattr(library, name).argtypes = kinds
    return library


def check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"cuBLAS: {call} returned the status {status} (cublasStatus_t)")


class Plan(NamedTuple):
    """A call of cuBLAS that is ready but for three addresses and two factors, which are among `arguments`."""

    function: Any
    name: str
    arguments: tuple[Any, ...]
    left: Any  # ctypes objects, for the call to change; cuBLAS has read the factors when it returns
    right: Any
    out: Any
    alpha: Any
    beta: Any
    swapped: bool  # out is ordered by columns: its transpose is b^T a^T


class Products(threading.local):
    """A handle of cuBLAS, for each thread one, the stream that it follows, and the plans of the products that were asked for.

    Parameters
    ----------
    xp : module
        CuPy.
    library : object
        What `load` gives.
    exact : Products, optional
        Those in true float32: then these are in TF32, and share memory with them.
    """

    def __init__(self, xp: Any, library: Any, exact: Products | None = None) -> None:
        self.xp, self.library = xp, library
        self.handle = ctypes.c_void_p()
        self.stream: int | None = None
        self.workspaces: dict[int, Array] = {} if exact is None else exact.workspaces  # a stream each: two may compute at once
        self.plans: dict[Any, Plan | None] = {}  # None: cuBLAS does not take it
        self.compute = {char: TF32 if exact is not None and char == "f" else kind.compute for char, kind in TYPES.items()}

    def follow(self) -> None:
        """Work on CuPy's current stream from now on."""
        stream = self.xp.cuda.get_current_stream().ptr
        if stream == self.stream:
            return
        if not self.handle:
            check(self.library.cublasCreate_v2(ctypes.byref(self.handle)), "cublasCreate")
        self.stream = None  # until all has succeeded
        check(self.library.cublasSetStream_v2(self.handle, stream), "cublasSetStream")
        if stream not in self.workspaces:
            self.workspaces[stream] = self.xp.empty(WORKSPACE, dtype="uint8")
        room = self.workspaces[stream]  # cublasSetStream has put back cuBLAS's own
        check(self.library.cublasSetWorkspace_v2(self.handle, room.data.ptr, room.nbytes), "cublasSetWorkspace")
        self.stream = stream

    def gemm(self, a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0, bias: Array | None = None) -> bool:
        """out = alpha a b + beta out + bias for matrices, or for stacks of them along equal leading axes (1 fits any number).

        Of one dtype; or a and b float16, or bfloat16, and out float32. The bias (m,) has the dtype of `out` and is added to
        every row. Returns whether that could be done: False, and nothing is done, where cuBLAS does not take the dtypes or the
        strides.
        """
        if bias is not None and (bias.shape != out.shape[-1:] or bias.dtype != out.dtype):
            return False
        key = (a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype, out.shape, out.strides, out.dtype, self.compute["f"])
        try:
            plan = self.plans[key]
        except KeyError:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            plan = self.plans[key] = self.plan(a, b, out)
        if plan is None:
            return False
        self.follow()
        function, name, arguments, left, right, target, factor, kept, swapped = plan
        if swapped:
            a, b = b, a
        left.value, right.value, target.value, factor.value, kept.value = b.data.ptr, a.data.ptr, out.data.ptr, alpha, beta
        check(function(*arguments), name)
        if bias is not None:
            out += bias
        return True

    def plan(self, a: Array, b: Array, out: Array) -> Plan | None:
        """How cuBLAS is asked for out = a b; None if it does not take it."""
        char = out.dtype.char
        if char not in TYPES or a.dtype != b.dtype or min(a.ndim, b.ndim, out.ndim) < 2 or 0 in (a.size, b.size, out.size):
            return None
        half = HALVES.get(a.dtype.name) if char == "f" else None
        if half is None and a.dtype != out.dtype:
            return None
        (n, k), m, lead = a.shape[-2:], b.shape[-1], out.shape[:-2]
        if b.shape[-2] != k or out.shape[-2:] != (n, m):
            return None
        of_b, of_a, of_out = (_placed(x, lead) for x in (b, a, out))
        if of_b is None or of_a is None or of_out is None:
            return None
        if of_out[0]:
            plan = self.plan(b.swapaxes(-1, -2), a.swapaxes(-1, -2), out.swapaxes(-1, -2))
            return plan and plan._replace(swapped=True)
        (op_b, ld_b, next_b), (op_a, ld_a, next_a), (_, ld_out, next_out) = of_b, of_a, of_out
        count = math.prod(lead)
        if count > 1 and not next_out or max(n, k, m, ld_a, ld_b, ld_out, count) >= MOST:
            return None
        written = TYPES[char]
        kind, compute = (written.data, self.compute[char]) if half is None else (half, written.compute)
        left, right, target = (ctypes.c_void_p() for _ in range(3))
        alpha, beta = written.scalar(), written.scalar()
        steps: Any = ([next_b], [next_a], [next_out], [count]) if count > 1 else ([], [], [], [])
        sizes = [op_b, op_a, m, n, k, ctypes.byref(alpha), left, kind, ld_b, *steps[0], right, kind, ld_a, *steps[1],
                 ctypes.byref(beta), target, written.data, ld_out, *steps[2], *steps[3], compute, DEFAULT]
        name = "cublasGemmStridedBatchedEx" if count > 1 else "cublasGemmEx"
        function = getattr(self.library, name)
        arguments = self.handle, *(kind(x) if isinstance(x, int) else x for kind, x in zip(KINDS[name][1:], sizes))
        return Plan(function, name, arguments, left, right, target, alpha, beta, False)


def _placed(x: Array, lead: tuple[int, ...]) -> tuple[int, int, int] | None:
    """How cuBLAS finds x (..., r, c) repeated along `lead`: whether transposed (1), and the steps to the next row and matrix.

    None if it cannot: where neither a row nor a column lies together, rows overlap, or the matrices are not evenly spaced.
    """
    (*front, r, c), size = x.shape, x.itemsize
    *steps, down, right = (stride // size for stride in x.strides)
    if c == 1 or right == 1:
        transposed, ld = 0, down if r > 1 else c
    elif r == 1 or down == 1:
        transposed, ld = 1, right
    else:
        return None
    missing = len(lead) - len(front)
    if ld < (r if transposed else c) or missing < 0 or any(n not in (1, m) for n, m in zip(front, lead[missing:])):
        return None
    repeated = [0 if n == 1 else step for n, step in zip(front, steps)]
    axes = [(n, step) for n, step in zip(lead, [0] * missing + repeated) if n > 1]
    if any(step != n * inner for (_, step), (n, inner) in zip(axes, axes[1:])):
        return None
    return transposed, ld, axes[-1][1] if axes else 0


class ArrayModule:
    """CuPy, with own products: `dot` and `matmul`, and `products` for those that know more than these two can say."""

    def __init__(self, cupy: Any, library: Any, exact: Products | None = None) -> None:
        self._cupy, self.tf32 = cupy, exact is not None
        self.products = Products(cupy, library, exact)

    @functools.cached_property
    def in_tf32(self) -> ArrayModule:
        """The same, with products of float32 in TF32."""
        return ArrayModule(self._cupy, self.products.library, self.products)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cupy, name)
        setattr(self, name, value)  # found at once from now on
        return value

    def dot(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """`cupy.dot`; of two matrices in float32 or float64 by the own binding."""
        if a.ndim == b.ndim == 2:
            (n, k), (others, m) = a.shape, b.shape
            if k == others:
                y = self._cupy.empty((n, m), dtype=a.dtype) if out is None else out
                if self.products.gemm(a, b, y):
                    return y
        return self._cupy.dot(a, b, out=out)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """`cupy.matmul`, likewise; stacks of matrices are not copied where they are evenly spaced."""
        if a.ndim > 1 < b.ndim:
            (*lead, n, k), (*others, inner, m) = a.shape, b.shape
            if k == inner:
                y = out
                if y is None:
                    front = lead if lead == others else self._cupy.broadcast_shapes(tuple(lead), tuple(others))
                    y = self._cupy.empty((*front, n, m), dtype=a.dtype)
                if self.products.gemm(a, b, y):
                    return y
        return self._cupy.matmul(a, b, out=out)


@override(array_module, device="gpu")
def with_own_products(cupy: Any) -> Any:
    """CuPy with own products; CuPy itself where no cuBLAS is found or, with a warning, where one does not multiply rightly."""
    try:
        module = ArrayModule(cupy, load())
    except (OSError, AttributeError):
        return cupy
    try:
        problem = wrong_product(module)
    except RuntimeError as error:
        problem = str(error)
    if problem is None:
        return module
    warnings.warn(f"minilora multiplies matrices by CuPy, because its own binding to cuBLAS does not work here: {problem}. "
                  "Steps cannot be recorded", RuntimeWarning, stacklevel=2)
    return cupy


def wrong_product(module: ArrayModule) -> str | None:
    """What two products of small whole numbers should have given, and gave; None if they are right."""
    x = module.arange(12, dtype="float32").reshape(2, 2, 3)
    stacks, one = [[[5, 14], [14, 50]], [[149, 212], [212, 302]]], [[27, 30, 33], [42, 47, 52], [57, 64, 71]]
    for name, y, expected in (("matmul", module.matmul(x, x.swapaxes(-1, -2)), stacks), ("dot", module.dot(x[0].T, x[1]), one)):
        if module.asnumpy(y).tolist() != expected:
            return f"{name} gave {module.asnumpy(y).tolist()} in the place of {expected}"
    return None


def accumulate(xp: Any, a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha a b + beta out, by cuBLAS or, where that does not take it, by CuPy; with beta = 0 out is not read."""
    own = getattr(xp, "products", None)
    if own is not None and own.gemm(a, b, out, alpha, beta):
        return
    product = xp.matmul(a, b)
    if alpha != 1.0:
        product *= alpha
    if beta == 0.0:
        out[...] = product
    else:
        out *= beta
        out += product
