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

A stream records as on a card (streams.py): what it records is done when its graph is launched, again at every launch, and
CuPy's own products, copies and waits are refused meanwhile.

One call counts as one launch, and so does every copy that CuPy makes for a matrix product: a lower bound, since
some CuPy calls need more kernels. Speed, rounding of CUDA kernels, races and the order of streams cannot be seen here.
"""
from contextlib import contextmanager

from . import operators  # noqa: F401 (gives the array class its operators)
from .arrays import ndarray
from .counts import CaptureError, Counts, capturing, count, counting, synchronize
from .cublas import CUBLASError, Library
from .cublaslt import Light
from .functions import asnumpy, xp

__all__ = ["CUBLASError", "CaptureError", "Counts", "Library", "Light", "asnumpy", "capturing", "card", "counting", "ndarray",
           "register", "synchronize", "xp"]


def register():
    """Make the stand-in known to minilora as the device "standin"."""
    from minilora import backend

    device = backend.Device("standin", xp, ndarray)
    device.to_host, device.from_host, device.synchronize = asnumpy, xp.asarray, synchronize
    backend.register_device(device)


def counted_kernel(text, name, T):
    """In the place of `minilora.kernels.launch.kernel`: a launch that is counted, and writes nothing."""
    return lambda grid, block, arguments: count(f"{name}_{T}", "launches")


@contextmanager
def card(kernel=counted_kernel, name="card", light=Light):
    """The stand-in as minilora sees a GPU, with its overrides and products, as the current device `name`.

    With the kernels that it has by default it shows what is launched, copied and waited for, not what is computed. `light`
    gives the pretended cublasLt, or None.
    """
    from minilora import backend
    from minilora.device import GPU
    from minilora.kernels import launch
    from minilora.kernels.cublas import products

    loaded, loaded_light, products.load, products.load_light = products.load, products.load_light, Library, light
    try:
        device = GPU(xp)
    finally:
        products.load, products.load_light = loaded, loaded_light
    device.name, device.synchronize = name, synchronize
    backend.register_device(device)
    before, launch.kernel = launch.kernel, kernel
    try:
        with backend.use(name):
            yield device
        assert all(one._host == 1.0 for one in device._ones.values()), "somebody has written into Device.one"
    finally:
        launch.kernel = before
        backend.unregister_device(name)
