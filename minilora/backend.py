"""The switch: which device new arrays are made on, and the few primitives that differ between devices.

`use` decides where *new* arrays are made. An operation follows its arrays: it runs where they live, and mixing devices
raises. Data moves only through `to_device` and `to_host`. CuPy is imported here and in `kernels` only, at the first use
of the GPU, so ``import minilora`` neither needs it nor pays for it.

>>> import numpy
>>> from minilora import backend
>>> array = backend.to_device(numpy.ones(3), "cpu")
>>> backend.device_of(array).name, backend.to_host(array).tolist(), backend.current_device().name in ("cpu", "gpu")
('cpu', [1.0, 1.0, 1.0], True)
>>> problem = backend.gpu_problem()  # a sentence, or None where a GPU works
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy

from .calls import answered
from .device import GPU, Device, array_module
from .errors import ConfigError, DeviceError
from .probe import gpu_problem
from .stored import Stored, dense
from .tensor_cores import TF32, refuse, tf32
from .values import check_kind, host_array, no_array, types_in
from .versions import KERNELS, kernels, override

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from .typing import Numbers

__all__ = [
    "Device", "add_matmul", "array_module", "asarray", "current_device", "device_of", "gpu_problem", "kernels",
    "override", "register_device", "synchronize", "tf32", "to_device", "to_host", "unregister_device", "use",
]

Array = Any


class _Devices(dict[type, Device]):
    """array type -> device; a subclass of an array type, such as numpy.memmap, is entered when first seen."""

    def __missing__(self, kind: type) -> Device:
        check_kind(kind)
        for array_type, device in list(self.items()):  # a list: another thread may enter one meanwhile
            if issubclass(kind, array_type):
                self[kind] = device
                return device
        raise no_array(kind)


cpu = Device("cpu", numpy, numpy.ndarray)
_by_type = _Devices({numpy.ndarray: cpu})
_current: Device | None = None  # None: nobody has chosen yet, so MINILORA_DEVICE decides at the first use
_NAMES = ("cpu", "gpu", "auto")


def register_device(device: Device) -> None:
    """Make a device known: `device_of` recognises its arrays, and ``use(device.name)`` selects it."""
    device.renew()  # kernels may have been switched since it was made
    _by_type[device.array_type] = device


def unregister_device(name: str) -> None:
    """Forget a device made known by `register_device`."""
    for array_type in [t for t, device in _by_type.items() if device.name == name]:
        del _by_type[array_type]


def device_of(array: Array) -> Device:
    """The device that an array lives on.

    Raises
    ------
    DTypeError
        If `array` is not an array of any known device.
    """
    device = _by_type.get(type(array))
    if device is not None:
        return device
    return array.device if isinstance(array, Stored) else _by_type[type(array)]


class use:
    """Choose the device on which new arrays are made, whether kernels run, and how a GPU multiplies.

    Takes effect at once, in all threads; used in a ``with`` statement, all former choices come back at the end. Arrays that
    exist already stay where they are, and a graph goes back by the operations that it was made of.

    Parameters
    ----------
    name : {"cpu", "gpu", "auto"}
        ``"auto"`` takes a GPU that really works, else the CPU.
    kernels : bool, optional
        False: on every device only the reference operations run, those of ops/, lora/ and optim/, as they stand there; nothing
        of minilora/kernels is imported. True: kernels run in the place of some of them. Without it this stays as it was: as
        chosen before, else as the environment variable MINILORA_KERNELS says (on or off), else on.
    tf32 : bool, optional
        True: a GPU multiplies float32 matrices on its tensor cores, in TF32: of every factor 10 bits behind the point count in
        place of 23, which is a relative error of 2^-10 at most, and sums are those of float32; see `tensor_cores`. Merging
        and the algebra of updates stay in true float32, and so does a card from before 2020, which has no TF32. False: true
        float32. Without it this stays as it was: as chosen before, else as MINILORA_TF32 says (on or off), else as CUPY_TF32
        (CuPy's own word, 1), else off.

    Raises
    ------
    ConfigError
        If the name is unknown, `kernels` or `tf32` is neither True, False nor None, or TF32 is asked of the CPU, or of a GPU
        whose products are CuPy's own.
    DeviceError
        If a GPU is asked for and cannot be used: one sentence with the cause and the cure.

    Examples
    --------
    >>> import minilora
    >>> with minilora.use("cpu"):
    ...     minilora.current_device().name
    'cpu'
    >>> with minilora.use("cpu", kernels=False):  # read it, break it, run it: what you read is what runs
    ...     minilora.current_device()
    <Device cpu: numpy, without kernels>
    """

    @answered
    def __init__(self, name: str, *, kernels: bool | None = None, tf32: bool | None = None) -> None:
        for word, value, means in (("kernels", kernels, "kernels=False) runs the reference operations alone"),
                                   ("tf32", tf32, "tf32=True) multiplies float32 matrices of a GPU in TF32")):
            if value is not None and not isinstance(value, bool):
                raise ConfigError(f"{word} must be True, False or None, got {value!r}: minilora.use({name!r}, {means}")
        self._before = _current, KERNELS.chosen, TF32.chosen
        try:  # the switches first: a GPU that is found now has no kernels to try out
            _switch(KERNELS.chosen if kernels is None else kernels, TF32.chosen if tf32 is None else tf32)
            device = _find(name)
            refuse(device.name, tf32 is True and name == "cpu", hasattr(device.xp, "products"))
            _make_current(device)
        except BaseException:
            _switch(*self._before[1:])
            raise

    def __enter__(self) -> Device:
        return current_device()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        _make_current(self._before[0])
        _switch(*self._before[1:])


def _make_current(device: Device | None) -> None:
    global _current
    _current = device


def _switch(kernels: bool | None, tf32: bool | None) -> None:
    """Set both switches, then let all devices forget: what a thread finds by the former choice is forgotten, too."""
    if (kernels, tf32) != (KERNELS.chosen, TF32.chosen):
        KERNELS.chosen, TF32.chosen = kernels, tf32
        for device in dict.fromkeys(list(_by_type.values())):  # the CPU first, which others may ask
            device.renew()


def current_device() -> Device:
    """The device on which new arrays are made: chosen by `use`, else by MINILORA_DEVICE, else the CPU."""
    global _current
    if _current is None:
        device = _find(os.environ.get("MINILORA_DEVICE", "cpu"))
        refuse(device.name, False, hasattr(device.xp, "products"))
        _current = device
    return _current


def _find(name: str) -> Device:
    for device in _by_type.values():
        if device.name == name:
            return device
    if name not in _NAMES:
        raise ConfigError(f"unknown device {name!r}: expected one of {', '.join(_NAMES)} "
                          "(given to minilora.use, --device or MINILORA_DEVICE)")
    problem = gpu_problem()
    if problem is None:
        return _gpu()
    if name == "auto":
        return cpu
    raise DeviceError(problem)


def _gpu() -> Device:
    import cupy
    import cupy.cublas

    for device in _by_type.values():
        if device.name == "gpu":
            return device
    device = GPU(cupy)
    register_device(device)
    return device


def asarray(value: Numbers, dtype: DTypeLike | None = None, copy: bool = False) -> Array:
    """Numbers, nested lists or a host array as an array on the current device.

    Parameters
    ----------
    value : array_like
    dtype : dtype, optional
        Without it, Python's floats become float32, and what has a dtype keeps it: arrays, and NumPy's numbers.
    copy : bool
        Without it, an array that lives on the current device and has the dtype is returned as it is, and shares its memory.

    Raises
    ------
    DTypeError
        If `value` holds no numbers, or is a `numpy.matrix` or a masked array, whose meaning would be lost.
    DeviceError
        If `value` is an array on another device: move it with `to_host` or `to_device` first.

    Examples
    --------
    >>> import minilora, numpy
    >>> buffer = numpy.ones(2)
    >>> minilora.backend.asarray(buffer) is buffer, minilora.backend.asarray(buffer, copy=True) is buffer
    (True, False)
    """
    device = current_device()
    if isinstance(value, device.array_type) and device is not cpu:
        array: Array = value
        return array.astype(array.dtype if dtype is None else dtype, copy=copy)
    for kind in types_in(value):
        if kind in _by_type and _by_type[kind] is not cpu:
            raise DeviceError(f"asarray got an array on the {_by_type[kind].name}, and works for the {device.name} from the "
                              "host: move it with minilora.to_host(array) first")
    host = host_array(value, dtype, copy and device is cpu)  # what leaves the host is a copy anyway
    return to_device(host, device)


def to_device(array: numpy.ndarray, device: Device | str | None = None) -> Array:
    """Copy a host array to a device (the current one by default). The one path from host to device.

    On the CPU nothing is copied: the array itself is returned.
    """
    device = _named(device)
    if not isinstance(array, numpy.ndarray):
        cure = "minilora.to_host(value)" if type(array) in _by_type else "numpy.asarray(value)"
        raise DeviceError(f"to_device needs a host array (numpy.ndarray), got {type(array).__name__}: make one with {cure}")
    device_of(array)  # refuses arrays whose meaning would be lost on the way
    return device.from_host(array)


def _named(device: Device | str | None) -> Device:
    return current_device() if device is None else _find(device) if isinstance(device, str) else device


def keep(array: numpy.ndarray, device: Device | str | None = None) -> Array:
    """`to_device` for what the caller keeps and gives to all later calls, such as a table: also while a step is recorded."""
    return _named(device).keep(array)


def constant(array: numpy.ndarray, device: Device) -> Array:
    """A small host array that is never written, such as places that shapes alone determine, on a device.

    A GPU gets it once and has it from then on, so that a step may ask for it while it is recorded.
    """
    return device.constant(array)


def to_host(array: Array) -> numpy.ndarray:
    """Copy an array of any device to the host. The one path from device to host; on a GPU a sync point.

    On the CPU nothing is copied: the array itself is returned. A matrix held in low precision is decoded.
    """
    return device_of(array).to_host(dense(array))


def synchronize() -> None:
    """Wait until the current device has finished its work: needed around timings, never for right results."""
    current_device().synchronize()


def add_matmul(out: Array, a: Array, b: Array, scale: float) -> None:
    """out += scale (a @ b), in place and without a temporary where the device can.

    Parameters
    ----------
    out : array, shape (n, m)
        An array that the caller made: it is changed.
    a : array, shape (n, k)
    b : array, shape (k, m)
    scale : float
    """
    device_of(out).add_matmul(out, a, b, scale)
