"""Integers that choose: token ids and labels. They come from the host, and are checked there."""

from __future__ import annotations

from typing import Any

from .. import backend
from ..errors import DTypeError, OutOfRangeError

Array = Any


def integers(what: str, values: Any, limit: int, ignore: int | None = None) -> Array:
    """Check that integers lie in [0, limit).

    Parameters
    ----------
    what : str
        What one of them is called in a message: "embedding: token id".
    values : array, Tensor, or nested lists of int
        Values on the host are checked. Those on another device are not: a look at them would wait for the device.
    limit : int
    ignore : int, optional
        A value that is allowed, too.

    Returns
    -------
    array of int64
        On the device where the values are; for lists, on the host.

    Raises
    ------
    OutOfRangeError
        With the first value outside, its position, and how many there are.
    DTypeError
        If the values are not integers.
    """
    values = values.data if hasattr(values, "node") else values  # a tensor
    if isinstance(values, (int, list, tuple)):
        try:
            values = backend.cpu.xp.asarray(values)
        except ValueError as error:
            raise DTypeError(f"{what}s: {type(values).__name__} makes no array: {error}") from error
    device = backend.device_of(values)
    if values.dtype.kind not in "iu":
        raise DTypeError(f"{what}s must be integers, got {values.dtype}: they choose rows. Convert with .astype('int64')")
    if device is backend.cpu:
        outside = (values < 0) | (values >= limit)
        if ignore is not None:
            outside &= values != ignore
        if outside.any():
            first = tuple(backend.cpu.xp.argwhere(outside)[0].tolist())
            more = f" (and {outside.sum() - 1} more)" if outside.sum() > 1 else ""
            place = f" at position {first[0] if len(first) == 1 else first}" if first else ""
            exempt = "" if ignore is None else f", or {ignore} for those to leave out"
            raise OutOfRangeError(f"{what} {values[first]}{place} is out of range{more}: expected 0 to {limit - 1}{exempt}")
    return values.astype("int64", copy=False)


def first_of_all(values: Array) -> int | None:
    """The first of values that count up by one, as positions do; None if they do not, or do not lie on the host."""
    if backend.device_of(values) is not backend.cpu or not values.size:
        return None
    flat = values.reshape(-1)
    first, last = int(flat[0]), int(flat[-1])
    if last - first != flat.size - 1:
        return None
    return first if (flat == backend.cpu.xp.arange(first, last + 1)).all() else None


def beside(x: Any, values: Array) -> Array:
    """Integers moved from the host to the device where the tensor or array x lives; those that live there, as they are."""
    device = backend.device_of(x.data if hasattr(x, "node") else x)
    return values if isinstance(values, device.array_type) else backend.to_device(values, device)
