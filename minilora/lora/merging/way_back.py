"""What leads back from a merged layer. How a layer comes to hold it, and goes back, is in `transaction`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from .arithmetic import Update
from .holding import make_read_only
from .report import WeightReport
from .weight import Correction

__all__ = ["WayBack"]

Array = Any


class WayBack:
    """What a merged layer holds to become unmerged: W', its correction and report, the update as it was merged, and the bias.

    Attributes
    ----------
    bias : tuple of two arrays, or None
        The bias before and after, if it takes part.
    """

    __slots__ = ("bias", "correction", "merged", "original", "report", "update")

    def __init__(self, merged: Array, correction: Correction, update: Update, report: WeightReport,
                 bias: tuple[Array, Array] | None = None, original: Array | None = None) -> None:
        self.merged, self.correction, self.update, self.report, self.bias = merged, correction, update, report, bias
        self.original: Callable[[], Any] = (lambda: None) if original is None else weakref.ref(original)
        for array in (merged, bias and bias[1]):
            make_read_only(array)

    def __reduce__(self) -> Any:
        # without the weak reference, which can be neither copied nor pickled
        return WayBack, (self.merged, self.correction, self.update, self.report, self.bias)
