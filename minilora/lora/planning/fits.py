"""What fits into a given memory: the largest batch, or the largest rank, of each way to train a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ... import nn
from ...errors import ConfigError
from ...nn.linear import check_size
from ...shown import shown
from ..config import Config
from ...tables import table
from .human import human
from .ways import WAYS, Way, rehearsed, ways_for

__all__ = ["Fit", "Fits", "what_fits"]

ASKED = ("batch", "rank")
MOST = 10_000  # that are told


class Fit(NamedTuple):
    """One way to train, in a given memory.

    Attributes
    ----------
    name : str
    least : int
        Bytes that it takes with one row, and with the config's rank.
    largest : int
        The largest batch, or rank, that fits; 0 if none does.
    peak : int
        Bytes that it takes with that; or, if none fits, `least`.
    """

    name: str
    least: int
    largest: int
    peak: int


@shown
class Fits(NamedTuple):
    """What fits into a memory. Printed as a table with a sentence.

    Attributes
    ----------
    memory : int
    length : int
        Tokens of a row.
    asked : str
        "batch" or "rank".
    ways : tuple of Fit
        In the order in which they were asked for.
    """

    memory: int
    length: int
    asked: str
    ways: tuple[Fit, ...]

    @property
    def first(self) -> Fit | None:
        """The first way that fits, of those that spare more and more; None if none does."""
        return next((way for way in self.ways if way.largest), None)

    @property
    def nearest(self) -> Fit:
        """The way that takes least."""
        return min(self.ways, key=lambda way: way.least)

    def __str__(self) -> str:
        cells = [("way to train", "with one row", f"largest {self.asked}", "takes")]
        for way in self.ways:
            most = f"{'>= ' * (way.largest == MOST)}{way.largest:,}" if way.largest else "none fits"
            cells.append((way.name, human(way.least), most, human(way.peak) if way.largest else "-"))
        return "\n".join([*table(cells, left=(0,)), "", self.verdict()])

    def verdict(self) -> str:
        """One sentence."""
        rows, memory = f"rows of {self.length:,} tokens", human(self.memory)
        if self.first is None:
            way = self.nearest
            return (f"nothing fits into {memory}: {way.name} comes nearest, with {human(way.least)} for one row of "
                    f"{self.length:,} tokens, {human(way.least - self.memory)} too many. A shorter length, or a smaller model")
        if self.first is self.ways[0]:
            return f"even {self.first.name} fits into {memory}, with {rows}"
        return f"what first makes it fit into {memory}, with {rows}: {self.first.name}"


def what_fits(model: nn.Module, config: Config, memory: int, *, length: int, asked: str = "batch", rows: int = 1,
              ways: Sequence[Way] = WAYS, optimizer: Any = "adam") -> Fits:
    """Find what fits into a memory: for each way to train, the largest batch of texts of a length, or the largest rank.

    Each candidate is rehearsed (`hollow.rehearse`), with the numbers of nothing: a model may be much larger than this machine.

    Parameters
    ----------
    model : Module
        One that has ``example(rows, length)``, as those of `minilora.models`; it may be without numbers, as `models.outline`
        and `nn.undrawn` make it.
    config : Config
    memory : int
        Bytes for what a step takes: weights, gradients, moments, activations and temporary arrays. The interpreter and its
        libraries come on top: 0.1 to 0.2 GB.
    length : int
        Tokens of a row.
    asked : {"batch", "rank"}
        Which of the two to make as large as it goes: the answer is rehearsed, and so is one more, which does not fit.
    rows : int
        Rows of a batch, where the rank is asked for.
    ways : sequence of Way
    optimizer : {"adam", "sgd"} or callable

    Returns
    -------
    Fits

    Raises
    ------
    ConfigError
        If config and model do not fit, a number is no int >= 1, or `asked` is something else.

    Examples
    --------
    >>> import minilora
    >>> with minilora.nn.undrawn():
    ...     model = minilora.nn.GPT2(minilora.nn.GPT2Config(n_layer=2))
    >>> found = what_fits(model, Config(r=8, target_modules=["c_attn"]), 500_000_000, length=64)
    >>> found.first.name
    'LoRA'
    """
    for name, value in (("memory", memory), ("length", length), ("rows", rows)):
        check_size(name, value)
    if asked not in ASKED:
        raise ConfigError(f"asked must be one of {', '.join(ASKED)}, got {asked!r}")
    found = []
    for way in ways_for(model, ways):
        if asked == "rank" and not way.adapters:
            continue

        def peak(n: int, way: Way = way) -> int:
            used = dataclasses.replace(config, r=n, rank_pattern={}) if asked == "rank" else config
            example = (n, length) if asked == "batch" else (rows, length)
            return rehearsed(model, used, example, way, optimizer=optimizer).peak

        least, largest, taken = peak(1), 0, 0
        if least <= memory:
            largest, taken = _largest(peak, least, memory)
        found.append(Fit(way.name, least, largest, taken or least))
    return Fits(memory, length, asked, tuple(found))


def _largest(peak: Callable[[int], int], least: int, memory: int) -> tuple[int, int]:
    """The largest n with peak(n) <= memory, and its peak; `MOST` at most.

    The peak is the largest of sums that each grow in a line with n, or nearly so: so each next n is where the line through the
    two nearest that are known meets the memory. It closes in from both sides, and from the third miss on by halves besides.
    """
    low, at_low, high, at_high, tried = 1, least, MOST + 1, 0, 0
    slope = 0.0  # bytes that one more takes
    while high - low > 1:
        guess = low + int((memory - at_low) / slope) if slope > 0 else 2 * low
        if at_high and tried > 3 and tried % 2:
            guess = (low + high) // 2
        n = min(max(guess, low + 1), high - 1)
        value, tried = peak(n), tried + 1
        if value <= memory:
            slope = (value - at_low) / (n - low) if not at_high else (at_high - value) / (high - n)
            low, at_low = n, value
        else:
            slope = (value - at_low) / (n - low)
            high, at_high = n, value
    return low, at_low
