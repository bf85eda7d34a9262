"""Which token comes next: a choice from logits, on the host, in float64.

In this order, each step only if it is asked for:

    repetition penalty p      z <- z / p where z > 0, z p else, for every token that the text has
    temperature t             z <- z / t
    top-k                     z <- -inf below the k-th largest; what is equal to it stays
    top-p                     z <- -inf for the least probable tokens that together have at most 1 - p; the most probable stays
    a draw                    token i with e^(z_i - max z) / sum_j e^(z_j - max z)

and without a temperature the largest z, the first if there are several.

Sources: the penalty, Keskar et al. 2019, arXiv 1909.05858, section 4.1, turned round for z < 0, where
it would be a reward; top-k, Fan et al. 2018, arXiv 1805.04833, section 5.4; top-p, Holtzman et al. 2020, arXiv 1904.09751,
section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ...errors import ConfigError, StateError
from ...settings import number, whole

__all__ = ["Sampler", "keep_top_k", "keep_top_p", "penalise"]

Array = Any


def penalise(z: Array, seen: Array, penalty: float) -> Array:
    """Logits z (B, V) with those of the tokens `seen` (B, V) made smaller; a penalty below 1 makes them larger."""
    return numpy.where(seen, numpy.where(z < 0.0, z * penalty, z / penalty), z)


def keep_top_k(z: Array, k: int) -> Array:
    """Logits z (B, V) with -inf for all below the k-th largest of their row."""
    k = min(k, z.shape[-1])
    least = numpy.partition(z, -k, axis=-1)[:, -k, None]
    return numpy.where(z < least, -numpy.inf, z)


def keep_top_p(z: Array, p: float) -> Array:
    """Logits z (B, V) with -inf for the least probable tokens that together have at most 1 - p."""
    order = z.argsort(axis=-1, kind="stable")
    total = probabilities(numpy.take_along_axis(z, order, axis=-1)).cumsum(axis=-1)
    dropped = total <= 1.0 - p
    dropped[:, -1] = False
    z = z.copy()
    numpy.put_along_axis(z, order, numpy.where(dropped, -numpy.inf, numpy.take_along_axis(z, order, axis=-1)), axis=-1)
    return z


def probabilities(z: Array) -> Array:
    """Softmax of the rows of z (B, V)."""
    P = numpy.exp(z - z.max(axis=-1, keepdims=True))
    return P / P.sum(axis=-1, keepdims=True)


class Sampler:
    """The settings of a choice, checked; and the random numbers of every row.

    Parameters
    ----------
    rows : int
        B.
    vocab_size : int
        V.
    temperature, top_k, top_p, repetition_penalty, seed
        As in `generate`.

    Notes
    -----
    Each row draws from a generator of its own, made from the seed and the row's number: what is drawn for a text does not
    depend on how many others there are, or on when they end.
    """

    def __init__(self, rows: int, vocab_size: int, temperature: float, top_k: int | None, top_p: float | None,
                 repetition_penalty: float | None, seed: Any) -> None:
        self.temperature = number("temperature", temperature, 0.0)
        self.top_k = None if top_k is None else whole("top_k", top_k)
        self.top_p = None if top_p is None else number("top_p", top_p, 0.0, 1.0, ends="(]")
        self.penalty = None if repetition_penalty is None else number("repetition_penalty", repetition_penalty, 0.0, ends="()")
        given = [name for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None]
        if given and not self.temperature:
            raise ConfigError(f"{' and '.join(given)} choose among tokens that are drawn, but with temperature=0.0 nothing is "
                              "drawn, the most probable token is taken: give a temperature, such as 1.0")
        self.seen = None if self.penalty is None else numpy.zeros((rows, vocab_size), bool)
        self.generators = numpy.random.default_rng(seed).spawn(rows) if self.temperature else []

    def read(self, ids: Array, tokens: Array | None = None) -> None:
        """Note that the rows have these ids (B, T), where `tokens` (B, T) is True."""
        if self.seen is not None:
            rows = numpy.broadcast_to(numpy.arange(len(ids))[:, None], ids.shape)
            chosen = slice(None) if tokens is None else tokens
            self.seen[rows[chosen], ids[chosen]] = True

    def __call__(self, logits: Array) -> Array:
        """The next token of every row, (B,), from logits (B, V) on the host.

        Raises
        ------
        StateError
            If logits are NaN or inf, or all -inf.
        """
        z: Array = logits
        highest = z.max(axis=-1)
        if not numpy.isfinite(highest).all():
            self._refuse(highest)
        if self.seen is not None and self.penalty is not None:
            z = penalise(z.astype("float64"), self.seen, self.penalty)
        if not self.temperature:
            return z.argmax(axis=-1)
        z = z.astype("float64") / self.temperature
        if self.top_k is not None:
            z = keep_top_k(z, self.top_k)
        if self.top_p is not None:
            z = keep_top_p(z, self.top_p)
        return draw(probabilities(z), self.generators)

    def _refuse(self, highest: Array) -> None:
        rows = numpy.flatnonzero(~numpy.isfinite(highest)).tolist()
        more = f" (and {len(rows) - 1} more rows are like it)" if len(rows) > 1 else ""
        raise StateError(f"the largest logit of row {rows[0]} is {highest[rows[0]]}{more}: no token can be chosen. Do weights "
                         "hold NaN or inf, or does half precision overflow? Look with numpy.isfinite at model.state_dict()")


def draw(P: Array, generators: Sequence[numpy.random.Generator]) -> Array:
    """One column of every row of P (B, V), with the row's probabilities: one number a row is drawn."""
    chosen = []
    for row, generator in zip(P.cumsum(axis=-1), generators):
        place = int(row.searchsorted(generator.random() * row[-1], side="right"))
        chosen.append(min(place, int(row.searchsorted(row[-1]))))  # u row[-1] may round up to row[-1]
    return numpy.array(chosen, dtype="int64")
