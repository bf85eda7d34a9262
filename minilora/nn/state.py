"""State of a module that is no parameter: counters, seeds, running numbers, masks. As host arrays, and back as what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy

from .. import backend
from ..errors import DTypeError, StateError
from ..stored import Stored
from ..tensor import Parameter, Tensor
from .stored_parts import StoredPart

__all__ = ["as_host", "as_kept", "given_array", "misfit", "moved", "own_state", "state_names"]

Array = Any
NUMBERS = {bool: "b", int: "iu", float: "f", complex: "c"}  # Python's numbers, and the kinds of arrays that hold them
MISSING = object()


def state_names(module: Any) -> list[str]:
    """The names in `state_names` of a module's class, of all that it derives from, and of its own, each once."""
    found: dict[str, None] = {}
    for owner in (*type(module).__mro__[::-1], module):
        names = getattr(owner, "__dict__", {}).get("state_names", ())
        if isinstance(names, str):
            raise DTypeError(f"{type(module).__name__}.state_names must be a tuple of names, got {names!r}: write ({names!r},)")
        found.update(dict.fromkeys(names))
    return list(found)


def own_state(module: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, place, value) of what a module names in `state_names`; what is None is left out, like a bias that is None.

    Raises
    ------
    StateError
        If there is no attribute of a name.
    DTypeError
        If a value is neither a number nor an array.
    """
    for name in state_names(module):
        value = getattr(module, name, MISSING)
        if value is MISSING:
            raise StateError(f"{type(module).__name__}.state_names has {name!r}, but there is no such attribute: assign it in "
                             "__init__, None if it comes later")
        if value is not None:
            _check(type(module).__name__, name, value)
            yield name, f".{name}", value


def _check(owner: str, name: str, value: Any) -> None:
    where = f"{owner}.{name} is in state_names, which is for numbers and arrays that are no parameters; it is"
    if isinstance(value, Parameter):
        raise DTypeError(f"{where} a Parameter, which every state dict holds anyway: take the name out")
    if type(value) in NUMBERS or isinstance(value, (Tensor, numpy.generic)):
        return
    try:
        backend.device_of(value)
    except DTypeError:
        raise DTypeError(f"{where} a {type(value).__name__}: keep it as one or several arrays, each an attribute") from None


def as_host(value: Any) -> numpy.ndarray:
    """A copy on the host. On a GPU a sync point."""
    value = value.data if isinstance(value, (Tensor, StoredPart)) else value
    number = type(value) in NUMBERS or isinstance(value, numpy.generic)
    array = numpy.array(value if number else backend.to_host(value))
    if array.dtype.hasobject:
        raise DTypeError(f"expected state of numbers of at most 64 bits, got {value!r:.80}: a file of arrays cannot hold it")
    return array


def given_array(value: Any) -> numpy.ndarray:
    """What a state dict gives for a name, as a host array."""
    value = value.data if isinstance(value, Tensor) else value
    if type(value) in NUMBERS or isinstance(value, (list, tuple, numpy.generic)):
        return numpy.asarray(value)
    return backend.to_host(value)


def misfit(own: Any, given: numpy.ndarray) -> str:
    """What is wrong with an array that is to take the place of `own`, or "". Python's numbers take any width."""
    kinds = NUMBERS.get(type(own))
    shape, dtype = ((), type(own).__name__) if kinds else (own.shape, own.dtype)
    if given.shape == shape and (given.dtype.kind in kinds if kinds else given.dtype == dtype):
        return ""
    return f"expected {dtype} {shape}, got {given.dtype} {given.shape}"


def as_kept(own: Any, given: numpy.ndarray) -> Any:
    """A fitting array as what `own` is: a number, an array on its device, or a tensor of one. Never the given array itself."""
    if type(own) in NUMBERS:
        return given.item()
    if isinstance(own, numpy.generic):
        return given[()]
    array = backend.to_device(numpy.array(given), backend.device_of(own.data if isinstance(own, (Tensor, StoredPart)) else own))
    return Tensor(array) if isinstance(own, Tensor) else array


def moved(own: Any, device: str | None, dtype: Any) -> Any:
    """An array or tensor on a device and, if it holds floating-point numbers, of a dtype; other state as it is."""
    if type(own) in NUMBERS or isinstance(own, numpy.generic):
        return own
    data = own.data if isinstance(own, Tensor) else own
    if isinstance(data, Stored):
        data = data if dtype is None else data.astype(dtype)
        return data if device is None else data.with_arrays({name: moved(a, device, None) for name, a in data.arrays().items()})
    if dtype is not None and data.dtype.kind == "f":
        data = data.astype(dtype, copy=False)
    if device is not None and backend.device_of(data).name != device:
        data = backend.to_device(backend.to_host(data), device)
    return Tensor(data) if isinstance(own, Tensor) and not isinstance(own, Parameter) else data
