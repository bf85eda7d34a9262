"""What a run without numbers would have taken: bytes that live at once, and the FLOPs of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Memory", "Meter", "current", "metered"]


class Meter:
    """Counts while it is the current one.

    Attributes
    ----------
    live, peak : int
        Bytes of the arrays that exist now, and the most so far.
    at_peak : str
        The operation that ran when the peak was reached; "" outside of all.
    within : str
        The operation that runs now.
    kinds : frozenset of str
        The roles of its parameters: see `Hollow`.
    flops : dict of (str, str) to int
        By operation and kind of product, "weights", "adapters" or "activations": a multiplication and an addition are 2.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.at_peak = self.within = ""
        self.kinds: frozenset[str] = frozenset()
        self.flops: dict[tuple[str, str], int] = {}

    def grow(self, nbytes: int) -> None:
        self.live += nbytes
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self.within

    def pass_by(self, nbytes: int) -> None:
        """Count what a library takes within one call, and gives back."""
        self.grow(nbytes)
        self.live -= nbytes

    def multiply(self, flops: int, roles: frozenset[str]) -> None:
        """Count a product of arrays in these roles.

        One with a weight belongs to the weights, its gradient dy^T x too; whatever else an operation with an adapter multiplies
        belongs to the adapter; and where there is no parameter, activations meet each other, as in attention.
        """
        if "constant" in roles:
            return  # a sum along rows, computed as a product
        for kind in ("weights", "adapters"):
            if kind in roles:
                break
        else:
            kind = next((kind for kind in ("adapters", "weights") if kind in self.kinds), "activations")
        key = self.within, kind
        self.flops[key] = self.flops.get(key, 0) + flops


_meter: ContextVar[Meter | None] = ContextVar("minilora.meter", default=None)
_nobody = Meter()  # for arrays that are made outside of all counting


def current() -> Meter:
    return _meter.get() or _nobody


@contextmanager
def metered() -> Iterator[Meter]:
    """Within this context, a new meter counts."""
    meter = Meter()
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


class Memory:
    """What an array and its views share. It is taken when it is made, and given back when nobody refers to it.

    Attributes
    ----------
    nbytes : int
    """

    __slots__ = ("meter", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.meter = nbytes, current()
        self.meter.grow(nbytes)

    def __del__(self) -> None:
        self.meter.live -= self.nbytes
