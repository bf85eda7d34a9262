"""Rows: which adapter each row of a batch gets; as masks, one for each adapter, that its update is multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from .. import backend
from ..errors import ShapeError
from ..tensor import Parameter
from .adapter import BASE

__all__ = ["Rows"]

Array = Any


class Rows:
    """The adapters of a batch, row by row.

    Every adapter that occurs is computed for the whole batch and multiplied by 0 in the rows of others: r (in + out) products
    a row and adapter, no gathering of rows, and no shape that depends on the names. So one compiled shape serves all requests,
    and on a GPU nothing waits for the host.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.distinct = [name for name in dict.fromkeys(self.names) if name != BASE]
        self._made: dict[tuple[Any, ...], dict[str, Array]] = {}

    def factors(self, batch: tuple[int, int], like: Parameter) -> dict[str, Array]:
        """For each adapter that occurs an array (rows, 1, ..., 1) of 1 and 0, with the dtype and on the device of `like`.

        Parameters
        ----------
        batch : (int, int)
            Rows of the batch, and axes of the array.
        like : Parameter

        Raises
        ------
        ShapeError
            If the batch has another number of rows than there are names.
        """
        n, axes = batch
        if n != len(self.names):
            raise ShapeError(f"adapter_names has {len(self.names)} names, but the first axis of this layer's input has {n} "
                             "rows: give one name for each row of the batch")
        key = like.device.name, like.dtype, axes
        if key not in self._made:  # made once a forward pass and shape: small copies to the device
            self._made[key] = {name: backend.to_device(self._mask(name, axes).astype(like.dtype), like.device)
                               for name in self.distinct}
        return self._made[key]

    def _mask(self, name: str, axes: int) -> numpy.ndarray:
        chosen = numpy.array([other == name for other in self.names])
        return chosen.reshape(-1, *[1] * (axes - 1))
