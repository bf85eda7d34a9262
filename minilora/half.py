"""Half precision: an operation on float16 computes in float32, and rounds each of its results once.

float16 has 11 bits and ends at 65504: a square overflows from 256 on, and a sum stands still once it is 2048 times its next
term. So nothing is added up, squared or multiplied out in it. This holds for every operation, forward and backward, because
it is done around the operation and not in it: inputs are widened, outputs and gradients are rounded. What an operation
keeps for backward is kept as it is: its inputs in float16, what it made of them in float32. Gradients that meet, those of a
tensor or parameter that is used several times, are added in float32 too (`added`).

Results of float32 are at most 2^-24 off for each addition that leads to them, and rounding to float16 costs 2^-11, once.

**Mixed precision** (`mixed`): weights stay float32, and what flows between operations is float16. Inputs of both dtypes may
meet then; each gradient has the dtype of its input, so that the gradient of a weight is never rounded. What comes out is

    float16    of products of matrices, convolutions, attention and embeddings (`Op.rounds` is True);
    float32    of losses, sums, means, exponentials and powers, which leave float16 soonest (`Op.rounds` is False);
    float16    of all others if one of their inputs is, else float32: norms, activations, sums of two, shapes.

A cast has the dtype that it was asked for. For backward an operation whose output is float16 keeps in float16 also what it has
made, if that has as many numbers as the output; means and sums of rows, which are fewer, stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy

from .calls import answered

__all__ = ["added", "in_mixed", "in_single", "mixed", "mixing"]

Array = Any

mixing: ContextVar[bool] = ContextVar("minilora.mixing", default=False)


@answered
@contextmanager
def mixed(on: bool = True) -> Iterator[None]:
    """Within this context, in this thread, float32 models compute in mixed precision.

    Gradients of activations are float16, which ends at 65504 and 6e-8: multiply the loss, see `optim.LossScale`. That some of
    them overflow now and then belongs to it, so NumPy does not warn of it here; outside of this context backward would.

    Parameters
    ----------
    on : bool
        False: in the dtypes that arrays have, also inside of such a context.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.Linear(3, 2, rng=0)
    >>> with mixed():
    ...     y = layer(minilora.tensor([[1.0, 2.0, 3.0]]))
    ...     loss = (y * y).sum()
    ...     loss.backward()
    >>> print(y.dtype, loss.dtype, layer.weight.grad.dtype)
    float16 float32 float32
    """
    token = mixing.set(on)
    try:
        with numpy.errstate(over="ignore", invalid="ignore") if on else nullcontext():
            yield
    finally:
        mixing.reset(token)


def wide(a: Any) -> Any:
    """A float16 array as float32; anything else as it is."""
    return a.astype("float32") if getattr(a, "dtype", None) == "float16" else a


def narrow(a: Any) -> Any:
    """A float32 array as float16; anything else as it is."""
    return a.astype("float16") if getattr(a, "dtype", None) == "float32" else a


def added(one: Array, other: Array) -> Array:
    """The sum of two gradients in an array of its own: of two in float16 it is float32, and rounded when all are there."""
    return wide(one) + other


def kept_for(saved: Any, arrays: tuple[Any, ...], inputs: list[Any], rearranged: int | None) -> Any:
    """What to keep in the place of a saved array: the float16 input of which it is the widened copy, if it is one."""
    for i, (a, x) in enumerate(zip(arrays, inputs)):
        if saved is x:
            return a
        if x is not a and (i == rearranged or getattr(saved, "base", None) is x):
            return narrow(saved)  # the same numbers as in the copy: nothing is lost
    return saved


def root(array: Any) -> Any:
    """What owns the memory of an array."""
    base = getattr(array, "base", None)
    return array if base is None else base


class Widening:
    """The forward and backward pass of an operation that is given float16, put before its own in the order of methods."""

    saved: tuple[Any, ...]
    moves: bool
    rearranged: Mapping[int, int]

    def forward(self, *arrays: Array) -> Array:
        if self.moves:
            return self.result(super().forward(*arrays), arrays)  # type: ignore[misc]
        inputs = [wide(a) for a in arrays]
        y = super().forward(*inputs)  # type: ignore[misc]
        self.saved = tuple(kept_for(a, arrays, inputs, self.rearranged.get(i)) for i, a in enumerate(self.saved))
        return self.result(y, arrays)

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        kept, self.saved = self.saved, tuple(wide(a) for a in self.saved)
        try:
            return self.gradients(super().backward(wide(dy)))  # type: ignore[misc]
        finally:
            self.saved = kept

    def result(self, y: Array, arrays: tuple[Array, ...]) -> Array:
        raise NotImplementedError

    def gradients(self, dxs: Any) -> tuple[Array | None, ...]:
        raise NotImplementedError


@functools.cache
def in_single(version: Any) -> Any:
    """The version of an operation for float16 arrays: a subclass that computes in float32, unless it sees to that itself."""
    if not version.widens:
        return version

    class InSingle(Widening, version):  # type: ignore[misc]
        reference = version.reference or version  # it goes by that name in a ledger

        def result(self, y: Array, arrays: tuple[Array, ...]) -> Array:
            return y if self.moves else narrow(y)

        def gradients(self, dxs: Any) -> tuple[Array | None, ...]:
            return tuple(narrow(dx) for dx in dxs)

        def into(self, i: int) -> Array | None:
            return None  # that place is float16

    InSingle.__name__ = version.__name__
    return InSingle


@functools.cache
def in_mixed(version: Any) -> Any:
    """The version of an operation for mixed precision: as `in_single`, and each input has a dtype of its own."""
    if not version.widens:
        return version

    class InMixed(Widening, version):  # type: ignore[misc]
        reference = version.reference or version
        rounds = (version.reference or version).rounds
        chars = ""  # of the dtypes of the inputs, "-" for what is no array

        def forward(self, *arrays: Array) -> Array:
            self.chars = "".join(getattr(getattr(a, "dtype", None), "char", "-") for a in arrays)
            return super().forward(*arrays)

        def result(self, y: Array, arrays: tuple[Array, ...]) -> Array:
            if not ("e" in self.chars if self.rounds is None else self.rounds):
                return y
            roots = {id(root(a)) for a in arrays}
            self.saved = tuple(
                a if i in self.rearranged or id(root(a)) in roots or getattr(a, "size", 0) < y.size else narrow(a)
                for i, a in enumerate(self.saved))
            return narrow(y)

        def gradients(self, dxs: Any) -> tuple[Array | None, ...]:
            return tuple(narrow(dx) if self.chars[i:i + 1] == "e" else dx for i, dx in enumerate(dxs))

        def into(self, i: int) -> Array | None:
            return super().into(i) if self.chars[i] == "f" else None

    InMixed.__name__ = version.__name__
    return InMixed
