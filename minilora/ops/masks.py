"""Masks of attention: which keys a query may attend to, as numbers that are added to the scores."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

from .. import backend
from ..errors import DTypeError, ShapeError

Array = Any
Shape = tuple[int, ...]


def combine_masks(xp: Any, masks: tuple[Array, ...], rows: slice, keys: slice, ahead: int | None, dtype: Any,
                  window: int | None = None) -> Array | None:
    """What is added to the scores of some queries and keys: the sum of all masks, or None if there is none.

    Summing the masks first costs little, as they have no axis of heads as a rule, and the scores are then walked through once.

    Parameters
    ----------
    xp : module
    masks : tuple of array
        Booleans or numbers that broadcast to (..., H, T, S).
    rows, keys : slice
        From T queries and S keys.
    ahead : int or None
        S - T if a query may see no later key: query t stands at the place of key S - T + t. None if it may.
    dtype : dtype
    window : int, optional
        With `ahead`: how many keys a query sees at most, its own place the last of them.
    """
    parts = [cut(a, rows, keys) for a in masks]
    parts = [xp.where(a, 0.0, -math.inf).astype(dtype) if a.dtype.kind == "b" else a for a in parts]
    if ahead is not None:
        here = ahead + rows.start - keys.start  # the place of the first of these queries, counted from the first of these keys
        shape = rows.stop - rows.start, keys.stop - keys.start
        if here + 1 < shape[1]:  # else even the first of them sees the last key
            parts.append(xp.triu(xp.full(shape, -math.inf, dtype=dtype), here + 1))
        if window is not None and here + shape[0] > window:  # else even the last of them sees the first key
            parts.append(xp.tril(xp.full(shape, -math.inf, dtype=dtype), here - window))
    return functools.reduce(operator.add, parts) if parts else None


def cut(mask: Array, rows: slice, keys: slice) -> Array:
    """The part of a mask that meets some queries and keys; an axis of length 1 meets them all."""
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    return mask[..., keys] if mask.ndim and mask.shape[-1] > 1 else mask


def prepare_masks(x: Any, q: Shape, S: int, key_padding: Any, mask: Any) -> tuple[Array, ...]:
    """The masks as arrays on the device of x that broadcast to the scores of queries of shape q (..., H, T, hd) and S keys."""
    like = x.data if hasattr(x, "node") else x
    masks = []
    if key_padding is not None:
        padding = constant("key_padding", truths(key_padding), like)
        if padding.shape != (*q[:-3], S) or padding.dtype.kind != "b":
            raise ShapeError(f"attention: expected key_padding of booleans in shape {(*q[:-3], S)} = (..., S), True where a "
                             f"key may be attended, got {padding.dtype} {padding.shape}")
        masks.append(padding.reshape((*q[:-3], 1, 1, S)))
    if mask is not None:
        bias, scores = constant("mask", mask, like), (*q[:-1], S)
        if len(bias.shape) > len(scores) or any(n not in (1, m) for n, m in zip(bias.shape[::-1], scores[::-1])):
            raise ShapeError(f"attention: mask {bias.shape} does not broadcast to the scores {scores} = (..., H, T, S)")
        masks.append(bias)
    return tuple(masks)


def truths(padding: Any) -> Any:
    """A key_padding of integers 0 and 1 as booleans; a look at values on another device than the host would wait for it."""
    padding = listed("key_padding", padding)
    if getattr(padding, "dtype", None) is None or padding.dtype.kind not in "iu" or hasattr(padding, "node"):
        return padding
    if backend.device_of(padding) is backend.cpu and ((padding != 0) & (padding != 1)).any():
        raise DTypeError("attention: key_padding of integers must hold 1 where a key may be attended and 0 for padding, got "
                         "others: are these the token ids? Then key_padding = ids != pad, an array of booleans")
    return padding != 0


def listed(name: str, value: Any) -> Any:
    """Nested lists as a host array; anything else as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        return backend.cpu.xp.asarray(value)
    except ValueError as error:
        raise DTypeError(f"attention: {name}: {type(value).__name__} makes no array: {error}") from error


def constant(name: str, value: Any, like: Array) -> Array:
    """A mask on the device of `like`; `DTypeError` unless it is an array of booleans or of the dtype of `like`, or lists."""
    if hasattr(value, "node"):
        raise DTypeError(f"attention: {name} is a constant, which gets no gradient: pass the tensor's array, {name}.data")
    if isinstance(value, (list, tuple)):
        value = listed(name, value)
        value = value.astype(like.real.dtype) if value.dtype.kind == "f" else value  # Python's numbers take the dtype they meet
    device = backend.device_of(like)
    if backend.device_of(value) is not device:
        value = backend.to_device(value, device)
    if value.dtype.kind != "b" and value.dtype != like.real.dtype:
        raise DTypeError(f"attention: expected {name} of booleans (True: may be attended) or of {like.real.dtype}, got "
                         f"{value.dtype}: convert it with .astype(...)")
    return value
