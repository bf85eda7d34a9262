"""The device "hollow": it computes nothing, in the versions of operations that the CPU has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy

from .. import backend
from ..device import Device
from ..engine import Op
from ..versions import Versions
from . import making, rules  # noqa: F401  (rules: writes down its answers)
from .array import Hollow
from .meter import current
from .repeats import remembered

__all__ = ["hollow"]

Array = Any


class _Module(SimpleNamespace):
    """NumPy, whose functions take hollow arrays by themselves; those that make arrays make hollow ones."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


class _Watched(Versions):
    """The CPU's versions, each with a note of which operation runs."""

    def __missing__(self, reference: Any) -> Any:
        version = backend.cpu.versions[reference]
        self[reference] = version = watched(version) if isinstance(version, type) and issubclass(version, Op) else version
        return version


def watched(version: Any) -> Any:
    """A subclass of an operation that tells the meter when it begins and ends, and what roles its parameters have."""
    class Watched(version):  # type: ignore[misc]
        reference = version.reference or version  # it goes by that name in a ledger
        kinds: frozenset[str] = frozenset()

        def forward(self, *arrays: Array) -> Array:
            self.kinds = frozenset(role for x in arrays for role in roles_of(x))
            return self.within(super().forward, *arrays)

        def backward(self, dy: Array) -> Any:
            return self.within(super().backward, dy)

        def within(self, half: Any, *arrays: Array) -> Any:
            meter = current()
            before = meter.within, meter.kinds
            meter.within, meter.kinds = (version.reference or version).__name__, self.kinds
            try:
                return half(*arrays)
            finally:
                meter.within, meter.kinds = before

    for name in ("attend", "differentiate"):  # blocks of each head of each text: by far the most of a rehearsal
        if hasattr(version, "_parts"):
            setattr(Watched, name, once(getattr(version, name)))
    Watched.__name__ = version.__name__
    return Watched


def once(method: Any) -> Any:
    """A method that is run for the first of equal calls only."""
    def call(self: Any, *arrays: Array) -> Any:
        return remembered(self, method.__get__(self), *arrays)

    return call


def roles_of(x: Any) -> list[str]:
    held = x.arrays().values() if hasattr(x, "arrays") else [x]
    return [array.role for array in held if isinstance(array, Hollow)]


class HollowDevice(Device):
    """A device without memory."""

    def __init__(self) -> None:
        made = dict(empty=making.empty, zeros=making.empty, ones=making.ones, full=making.full, arange=making.arange,
                    array=making.array,
                    asarray=making.asarray, ascontiguousarray=making.ascontiguousarray, ndarray=Hollow)
        super().__init__("hollow", _Module(**made), Hollow)

    def renew(self) -> None:
        self.versions = _Watched("hollow")

    def to_host(self, array: Array) -> numpy.ndarray:
        return array._refuse()  # type: ignore[no-any-return]

    def from_host(self, array: numpy.ndarray) -> Array:
        return Hollow.like(array)


hollow = HollowDevice()
backend.register_device(hollow)
