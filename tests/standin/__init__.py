"""A strict stand-in for CuPy, held up by NumPy: the GPU path of minilora, tested without a GPU.

``xp`` is used where ``cupy`` would be; ``ndarray`` is its array, which *wraps* a NumPy array so that nothing
crosses between host and device unseen:

- host arrays are refused as operands, and NumPy's functions refuse device arrays; ``xp.asarray(host)`` copies
  to the device, ``x.get()`` and ``xp.asnumpy(x)`` copy back;
- a reduction gives a 0-d device array, and each look at its value (``float(x)``, ``if x:``, ``print(x)``,
  ``x.item()``) is a counted synchronisation;
- ``counting()`` yields the numbers of launches, synchronisations and copies; inside ``capturing()``
  synchronisations and copies raise, as they do while a CUDA graph is recorded;
- memory from ``xp.empty`` is poisoned with NaN, or with the largest integer.

Where CuPy would go wrong without a word, the stand-in raises: an index out of range (CuPy wraps it), several
values stored at one place (undefined), ``out=`` of another dtype or shape (a temporary and a cast), a float64
scalar of NumPy (it promotes float32 arrays).

One call counts as one launch, and so does every copy that CuPy makes for a matrix product: a lower bound, since
some CuPy calls need more kernels. Speed, rounding of CUDA kernels, races, stream order, and that CuPy refuses
cuBLAS products during a capture cannot be seen here.
"""
from . import operators  # noqa: F401 (gives the array class its operators)
from .arrays import ndarray
from .counts import CaptureError, Counts, capturing, counting, synchronize
from .cublas import CUBLASError
from .functions import asnumpy, xp

__all__ = ["CUBLASError", "CaptureError", "Counts", "asnumpy", "capturing", "counting", "ndarray", "register", "synchronize",
           "xp"]


def register():
    """Make the stand-in known to minilora as the device "standin"."""
    from minilora import backend

    device = backend.Device("standin", xp, ndarray)
    device.to_host, device.from_host, device.synchronize = asnumpy, xp.asarray, synchronize
    backend.register_device(device)
