"""GPU: matrix products by an own, thin binding to cuBLAS.

CuPy's products cost the host 15 to 25 us each, copy what is transposed in a stack of matrices, add to nothing but a whole
array, and may not be recorded into a CUDA graph. cuBLAS itself takes any transposition, any distance between rows, a factor for
the product and one for what is there before, and may be recorded.

What cuBLAS is told about a product depends on shapes, strides and dtypes alone. So it is found out once and kept, as a tuple of
ctypes objects of which a call changes five: three addresses and two factors. ctypes hands such objects over three times as fast
as Python's numbers, and a product costs the host a look into a dict and one call.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...backend import array_module, override
from .library import KINDS, check, load, load_light
from .light import ALIGNED, Fused, Light, Refused
from .operands import TYPES, Operands, in_copies, operands

__all__ = ["ArrayModule", "Products", "accumulate", "load", "with_own_products"]

Array = Any

PLANS = 1024  # of a thread; more than a model has. When there are so many, all are forgotten
WORKSPACE = 32 << 20  # bytes for every stream: what NVIDIA recommends for an H100, and more than other cards need
DEFAULT = -1  # CUBLAS_GEMM_DEFAULT
TF32 = 77  # CUBLAS_COMPUTE_32F_FAST_TF32


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
    lower : object or None
        What `load_light` gives.
    exact : Products, optional
        Those in true float32: then these are in TF32, and share memory with them.
    """

    everything = False  # True: products without a bias go through cublasLt, too

    def __init__(self, xp: Any, library: Any, lower: Any = None, exact: Products | None = None) -> None:
        self.xp, self.library = xp, library
        self.handle = ctypes.c_void_p()
        self.stream: int | None = None
        self.workspaces: dict[int, Array] = {} if exact is None else exact.workspaces  # a stream each: two may compute at once
        self.light = None if lower is None else Light(lower, self.handle)
        self.plans: dict[Any, Plan | None] = {}  # None: cuBLAS does not take it
        self.fused_plans: dict[Any, Fused | None] = {}
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
        if self.light is not None:
            self.light.follow(stream, room.data.ptr, room.nbytes)
        self.stream = stream

    def gemm(self, a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0, bias: Array | None = None) -> bool:
        """out = alpha a b + beta out + bias for matrices, or for stacks of them along equal leading axes (1 fits any number).

        Of one dtype; or a and b float16, or bfloat16, and out float32. The bias (m,) has the dtype of `out` and is added to
        every row. Returns whether that could be done: False, and nothing is done, where cuBLAS does not take the dtypes or the
        strides.
        """
        if bias is not None and (bias.shape != out.shape[-1:] or bias.dtype != out.dtype):
            return False
        # Not without a product: where alpha is 0, cublasLt gives another sum than beta out + bias (seen on an H100).
        if (bias is not None or self.everything) and alpha and self.light and self.fused(
                self.light, a, b, out, alpha, beta, bias):
            return True
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

    def by_copies(self, a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> bool:
        """`gemm` of copies in order, where an array is in none that cuBLAS takes: CuPy copies too, but may not be recorded."""
        ready = in_copies(self.xp, a, b, out, beta != 0.0)
        if ready is None or not self.gemm(*ready, alpha, beta):
            return False
        if ready[2] is not out:
            out[...] = ready[2]
        return True

    def plan(self, a: Array, b: Array, out: Array) -> Plan | None:
        """How cuBLAS is asked for out = a b; None if it does not take it."""
        o = operands(a, b, out)
        if o is None:
            return None
        left, right, target = (ctypes.c_void_p() for _ in range(3))
        alpha, beta = o.written.scalar(), o.written.scalar()
        name, steps = "cublasGemmEx", [list[int]()] * 4
        if o.matrices > 1:
            name, steps = "cublasGemmStridedBatchedEx", [[o.next_left], [o.next_right], [o.next_out], [o.matrices]]
        given = [o.op_left, o.op_right, o.m, o.n, o.k, ctypes.byref(alpha), left, o.kind, o.ld_left, *steps[0],
                 right, o.kind, o.ld_right, *steps[1], ctypes.byref(beta), target, o.written.data, o.ld_out, *steps[2],
                 *steps[3], self.computed(o), DEFAULT]
        arguments = self.handle, *(kind(x) if isinstance(x, int) else x for kind, x in zip(KINDS[name][1:], given))
        return Plan(getattr(self.library, name), name, arguments, left, right, target, alpha, beta, o.swapped)

    def computed(self, o: Operands) -> int:
        """cublasComputeType_t."""
        return o.written.compute if o.half or o.written is TYPES["d"] else self.compute["f"]

    def fused(self, light: Light, a: Array, b: Array, out: Array, alpha: float, beta: float, bias: Array | None) -> bool:
        """`gemm` by cublasLt: False, and nothing is done, if that does not take it."""
        left, right, target, along = b.data.ptr, a.data.ptr, out.data.ptr, 0 if bias is None else bias.data.ptr
        low = (left | right | target | along) & (ALIGNED[0] - 1)
        if low & (ALIGNED[1] - 1):
            return False
        key = (a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype, out.shape, out.strides, out.dtype, self.compute["f"],
               bias is None or bias.strides, low == 0)
        try:
            try:
                plan = self.fused_plans[key]
            except KeyError:
                if len(self.fused_plans) >= PLANS:
                    self.fused_plans.clear()
                plan = self.fused_plans[key] = self.prepared(light, a, b, out, bias, ALIGNED[low > 0])
            if plan is None:
                return False
            self.follow()
            if plan.swapped:
                left, right = right, left
            plan(left, right, target, alpha, beta, along)
        except Refused as error:
            if error.failed:
                raise RuntimeError(f"cuBLAS: {error}") from None
            if not self.xp.cuda.get_current_stream().is_capturing():
                self.fused_plans[key] = None
            return False
        return True

    def prepared(self, light: Light, a: Array, b: Array, out: Array, bias: Array | None, aligned: int) -> Fused | None:
        o = operands(a, b, out)
        if o is None or o.matrices > 1:
            return None
        if bias is not None and (o.swapped or bias.size > 1 and bias.strides[0] != bias.itemsize):
            return None  # it would be one for each row of out, or has gaps
        self.follow()  # the handle is made when it is needed first
        return Fused(light, o, self.computed(o), aligned, 0 if bias is None else bias.data.ptr)


class ArrayModule:
    """CuPy, with own products: `dot` and `matmul`, and `products` for those that know more than these two can say."""

    def __init__(self, cupy: Any, library: Any, lower: Any = None, exact: Products | None = None) -> None:
        self._cupy, self._libraries, self.tf32 = cupy, (library, lower), exact is not None
        self.products = Products(cupy, library, lower, exact)

    @functools.cached_property
    def in_tf32(self) -> ArrayModule:
        """The same, with products of float32 in TF32."""
        return ArrayModule(self._cupy, *self._libraries, self.products)

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
                if self.products.gemm(a, b, y) or y.shape == (n, m) and self.products.by_copies(a, b, y):
                    return y
        return self._cupy.dot(a, b, out=out)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """`cupy.matmul`, likewise; stacks of matrices are not copied where they are evenly spaced."""
        if a.ndim > 1 < b.ndim:
            (*lead, n, k), (*others, inner, m) = a.shape, b.shape
            if k == inner:
                front = lead if lead == others else self._cupy.broadcast_shapes(tuple(lead), tuple(others))
                y = self._cupy.empty((*front, n, m), dtype=a.dtype) if out is None else out
                if self.products.gemm(a, b, y) or y.shape == (*front, n, m) and self.products.by_copies(a, b, y):
                    return y
        return self._cupy.matmul(a, b, out=out)


@override(array_module, device="gpu")
def with_own_products(cupy: Any) -> Any:
    """CuPy with own products; CuPy itself where no cuBLAS is found or, with a warning, where one does not multiply rightly."""
    try:
        library = load()
    except (OSError, AttributeError):
        return cupy
    module = ArrayModule(cupy, library, load_light())
    if problem := wrong(module, products_of_whole_numbers):
        warnings.warn(f"minilora multiplies matrices by CuPy, because its own binding to cuBLAS does not work here: {problem}. "
                      "Steps cannot be recorded", RuntimeWarning, stacklevel=2)
        return cupy
    if module.products.light is not None and (problem := wrong(module, product_with_a_bias)):
        warnings.warn(f"minilora adds a bias by a launch of its own, because cublasLt does not work here: {problem}",
                      RuntimeWarning, stacklevel=2)
        return ArrayModule(cupy, library)
    return module


def wrong(module: ArrayModule, trial: Callable[[ArrayModule], Iterable[tuple[str, Array, Any]]]) -> str | None:
    """What a product of small whole numbers should have given, and gave; None if all are right."""
    try:
        for name, y, expected in trial(module):
            if (given := module.asnumpy(y).tolist()) != expected:
                return f"{name} gave {given} in the place of {expected}"
    except RuntimeError as error:
        return str(error)
    return None


def products_of_whole_numbers(module: ArrayModule) -> Iterable[tuple[str, Array, Any]]:
    x = module.arange(12, dtype="float32").reshape(2, 2, 3)
    yield "matmul", module.matmul(x, x.swapaxes(-1, -2)), [[[5, 14], [14, 50]], [[149, 212], [212, 302]]]
    yield "dot", module.dot(x[0].T, x[1]), [[27, 30, 33], [42, 47, 52], [57, 64, 71]]


def product_with_a_bias(module: ArrayModule) -> Iterable[tuple[str, Array, Any]]:
    x = module.arange(6, dtype="float32").reshape(2, 3)
    y = module.empty((3, 3), dtype="float32")
    module.products.gemm(x.T, x, y, bias=x[0])
    yield "a product with a bias", y, [[9, 13, 17], [12, 18, 24], [15, 23, 31]]


def accumulate(xp: Any, a: Array, b: Array, out: Array, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha a b + beta out, by cuBLAS or, where that does not take it, by CuPy; with beta = 0 out is not read."""
    own = getattr(xp, "products", None)
    if own is not None and (own.gemm(a, b, out, alpha, beta) or own.by_copies(a, b, out, alpha, beta)):
        return
    product = xp.matmul(a, b)
    if alpha != 1.0:
        product *= alpha
    if beta == 0.0:
        out[...] = product
    else:
        out *= beta
        out += product
