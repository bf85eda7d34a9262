"""Positions as angles. The mathematics is in `ops.rotary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from .. import backend, ops, replay
from ..engine import floating, shape_of
from ..ops.indices import integers
from ..ops.rotary import check_positions
from ..tensor import Tensor
from .module import Module

__all__ = ["RotaryEmbedding"]

LONGEST = 2 ** 24  # positions: tables have a row for each up to the last


class RotaryEmbedding(Module):
    """Turns queries and keys by the angles of their positions. Has no parameters; one can serve all layers of a model.

    Parameters
    ----------
    head_dim : int
        Even: the numbers of a head.
    theta : float
        Base of the frequencies theta^(-2 i / head_dim).
    scaling : mapping, optional
        How they are changed for long texts: ``{"rope_type": "llama3", "factor": 8.0, ...}``, as in a config.json; the kinds
        default, linear, dynamic, yarn and llama3. See `ops.scaled_rotary_frequencies`.
    max_positions : int, optional
        max_position_embeddings of a config.json: some kinds need it. It is no limit.

    Attributes
    ----------
    frequencies : tuple of float
        Radians a position, for texts of up to max_positions.
    factor : float
        Of all turned vectors: 1, but for yarn.

    Raises
    ------
    ConfigError
        If head_dim is not an even int >= 2, theta is not a finite number above 0, or something is wrong with `scaling`.

    Notes
    -----
    Attention depends on differences of positions only. So a batch padded at its left needs a key_padding, but no positions of
    its own.

    With the kind dynamic, all rows of a call are turned by the frequencies of the longest text of this call: its last position
    + 1, or `offset` + T. Nothing is remembered from call to call. Where keys are kept between calls (as when text is generated
    token by token), those that were turned by earlier, faster frequencies stay as they are, as in transformers: the numbers
    then differ a little from those of one call with the whole text.

    Examples
    --------
    >>> import numpy, minilora
    >>> rotary = minilora.nn.RotaryEmbedding(8)
    >>> rotary(minilora.tensor(numpy.ones((2, 4, 5, 8), "float32"))).shape
    (2, 4, 5, 8)
    """

    fresh = frozenset({"tables", "stretched"})  # a recorded step keeps those that it reads

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None,
                 max_positions: int | None = None) -> None:
        self.scaling = ops.check_rotary_scaling(scaling)
        self.frequencies, self.factor = ops.scaled_rotary_frequencies(head_dim, theta, self.scaling, max_positions)
        self.theta = float(theta)
        self.max_positions = max_positions
        self.tables: dict[tuple[str, str], tuple[Any, Any]] = {}  # (device, dtype) -> (cos, sin), made when first needed
        self.moved: dict[str, tuple[Any, Any]] = {}  # device -> the last positions, on the host and there
        self.stretched: dict[tuple[str, str], tuple[Any, tuple[Any, Any]]] = {}  # for dynamic: the last length, and its tables

    def forward(self, x: Any, offset: int = 0, positions: Any = None) -> Tensor:
        """x (..., T, head_dim); its first row stands at the position `offset`, or each row at its own; see `ops.rotary`."""
        rows = length = check_positions(shape_of(floating(x)), 2 * len(self.frequencies), offset)
        x = x if isinstance(x, Tensor) else Tensor(x)
        if positions is not None:
            length, positions = self.placed(positions, x.device)
        cos, sin = self.tables_for(length, max(rows, length), x.device, x.data.real.dtype)
        return ops.rotary(x, cos, sin, offset, positions)

    def placed(self, positions: Any, device: Any) -> tuple[int, Any]:
        """The length of a text with these positions, and the positions on a device: moved once for queries, keys and layers."""
        own = backend.to_host(integers("rotary: position", positions, LONGEST))
        before, there = self.moved.get(device.name, (None, None))
        if before is None or not numpy.array_equal(before, own):
            there = backend.to_device(own, device)
            self.moved[device.name] = own.copy(), there
        return int(own.max(initial=0)) + 1, there

    def tables_for(self, length: int, rows: int, device: Any, dtype: Any) -> tuple[Any, Any]:
        """cos and sin for a text of so many positions, with so many rows or more."""
        key = device.name, dtype.name
        if self.scaling is not None and self.scaling["rope_type"] == "dynamic" and length > (self.max_positions or 0):
            if self.stretched.get(key, ((0, 0),))[0] != (length, rows):
                frequencies, factor = ops.scaled_rotary_frequencies(
                    2 * len(self.frequencies), self.theta, self.scaling, self.max_positions, length)
                self.stretched[key] = (length, rows), ops.rotary_tables(frequencies, rows, dtype, device, factor)
            return of_a_recording(self.stretched[key][1])
        if key not in self.tables or len(self.tables[key][0]) < rows:
            rows = 1 << max(7, (rows - 1).bit_length())  # powers of two: a growing context makes few new tables
            self.tables[key] = ops.rotary_tables(self.frequencies, rows, dtype, device, self.factor)
        return of_a_recording(self.tables[key])

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"head_dim={2 * len(self.frequencies)}, theta={self.theta}{scaling}"


def of_a_recording(tables: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same: a recorded step reads this memory, whatever tables there are later."""
    replay.expect("tables of rotary positions", lambda: tables)
    return tables
