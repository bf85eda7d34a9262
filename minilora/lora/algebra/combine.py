"""Several updates of one layer made into one, by sums; and any method for the adapters of whole models.

The sum sum_i w_i D_i is exact in factored form: put the columns of all B_i side by side, the rows of all A_i below each other
(`cat`), and cut the rank if wanted (`linear_sum`, `svd`). Adding the factors instead, (sum_i B_i)(sum_j A_j), is another
matrix: it holds the cross terms B_i A_j of different adapters, whose directions have nothing to do with each other, and it
changes when one adapter is written in another gauge (B C, C^-1 A), which its D does not notice.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Mapping, Sequence, TypeVar

import numpy

from ...errors import ConfigError, DTypeError, MiniloraError, ShapeError, StateDictError
from .compress import Compressed, check_target, recompress
from .factors import LowRank, check_factor

__all__ = ["cat", "combine_adapters", "linear_sum", "svd"]

T = TypeVar("T")


def check_weights(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise ConfigError("combine: expected at least one update, got none")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ConfigError(f"combine: {count} updates and {len(weights)} weights: expected one weight each")
    return [check_factor(f"weights[{i}]", weight) for i, weight in enumerate(weights)]


def kind(update: LowRank) -> tuple[Any, ...]:
    if not isinstance(update, LowRank):
        raise DTypeError(f"combine: expected LowRank, got {type(update).__name__}: write lora.LowRank(lora_A, lora_B, scaling)")
    return update.shape, str(update.dtype), update.device.name


def check_updates(updates: Sequence[LowRank], weights: Sequence[float] | None) -> list[float]:
    """The weights as floats; every update that does not fit the first is named in one error."""
    found = check_weights(len(updates), weights)
    odd = [f"updates[{i}]: {update!r}" for i, update in enumerate(updates) if kind(update) != kind(updates[0])]
    if odd:
        raise ShapeError(f"combine: expected updates of one layer: one shape, dtype and device. updates[0]: {updates[0]!r}; "
                         + "; ".join(odd))
    return found


def cat(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """sum_i w_i D_i, exactly: B = [B_1 B_2 ...], A = [c_1 A_1; c_2 A_2; ...], rank sum_i r_i.

    Parameters
    ----------
    updates : sequence of LowRank
        Of one layer; the ranks may differ.
    weights : sequence of float, optional
        One each, negative and 0 too; 1 by default.

    Returns
    -------
    LowRank
        With c_i = w_i s_i / s. If the w_i s_i differ in their signs only, as in the difference of two adapters of one kind,
        s is their size and no entry is rounded; else s is a power of two, and each entry of A is rounded once, or not at
        all where w_i s_i A_i is exact.

    Raises
    ------
    ShapeError
        If the updates belong to layers of other shapes, dtypes or devices: all are listed.
    ConfigError
        For no updates, or weights that are not one finite number each.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[1.0, 2.0]]), B=numpy.array([[1.0], [1.0]]), s=0.5)
    >>> cat([D, D], [3.0, -1.0]).dense()
    array([[1., 2.],
           [1., 2.]])
    """
    factors = [weight * update.s for weight, update in zip(check_updates(updates, weights), updates)]
    largest = max(map(abs, factors))
    s = largest if all(abs(factor) == largest for factor in factors) else 2.0 ** (math.frexp(largest)[1] - 1)
    s = s or 1.0
    xp = updates[0].device.exact
    A = xp.concatenate([update.A * (factor / s) for factor, update in zip(factors, updates)])
    return LowRank(A.astype(updates[0].dtype, copy=False), xp.concatenate([update.B for update in updates], axis=1), s)


def linear_sum(updates: Sequence[LowRank], weights: Sequence[float] | None = None, *, r: int | None = None,
               energy: float | None = None, tolerance: float | None = None) -> Compressed:
    """sum_i w_i D_i at the lowest rank that meets the target; without one, at its numerical rank: exact but for rounding.

    `recompress` of `cat`; its parameters, errors and cost. PEFT's "linear" adds A and B separately and is another matrix.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.array([[3.0, 4.0]]), B=numpy.array([[1.0], [0.0]]))
    >>> print(linear_sum([D, D], [1.0, 2.0]))
    rank 1: error 0 of norm 15 (0.000%), energy kept 1.000000
    """
    check_target(r, energy, tolerance)
    return recompress(cat(updates, weights), r=r, energy=energy, tolerance=tolerance)


def svd(updates: Sequence[LowRank], weights: Sequence[float] | None = None, r: int | None = None) -> Compressed:
    """sum_i w_i D_i, cut to rank r by SVD; r is the largest r_i by default, as in PEFT's "svd". See `linear_sum`.

    Examples
    --------
    >>> import numpy
    >>> from minilora import lora
    >>> one = lora.LowRank(numpy.eye(2, 5), numpy.eye(4, 2))
    >>> found = lora.svd([one, one], [0.5, 0.5])
    >>> found.update.r, bool(found.relative_error < 1e-12)
    (2, True)
    """
    return linear_sum(updates, weights, r=max((update.r for update in updates), default=1) if r is None else r)


def combine_adapters(adapters: Sequence[Mapping[str, LowRank]], weights: Sequence[float] | None = None,
                     method: Callable[..., T] = cat, *,  # type: ignore[assignment]  # a default for a free T
                     missing: str = "error", **options: Any) -> dict[str, T]:
    """The adapters of whole models, layer by layer; nothing is computed unless all of them fit.

    Parameters
    ----------
    adapters : sequence of mappings, layer path -> LowRank
    weights : sequence of float, optional
        One for each adapter.
    method : function
        `cat`, `linear_sum`, `svd`, `ties`, `dare`, or one's own of (updates, weights, **options).
    missing : "error" or "zero"
        What a layer is that some adapters lack: a mistake, or an update of 0 there.
    **options
        For `method`. A seed given as rng is made into one generator that all layers draw from, in the order of their paths.

    Returns
    -------
    dict, layer path -> what `method` returns

    Raises
    ------
    StateDictError
        Lists every layer that an adapter lacks and every one whose shapes, dtypes or devices differ.
    ConfigError
        For weights or options that do not fit; errors of a layer name its path.

    Examples
    --------
    >>> import numpy
    >>> D = LowRank(A=numpy.ones((1, 3)), B=numpy.ones((2, 1)))
    >>> combine_adapters([{"fc": D}, {"fc": D}], [1.0, -0.5], svd, r=1)["fc"].update
    LowRank(out=2, in=3, r=1, s=1, float64, cpu)
    """
    found = check_weights(len(adapters), weights)
    if missing not in ("error", "zero"):
        raise ConfigError(f"missing must be 'error' or 'zero', got {missing!r}")
    paths = sorted(set().union(*adapters))
    if not paths:
        raise ConfigError(f"combine_adapters: the {len(adapters)} adapters have no layers")
    problems = []
    for path in paths:
        here = {i: adapter[path] for i, adapter in enumerate(adapters) if path in adapter}
        if len(here) < len(adapters) and missing == "error":
            problems.append(f"{path}: not in {', '.join(f'adapters[{i}]' for i in range(len(adapters)) if i not in here)}")
        if len({kind(update) for update in here.values()}) > 1:
            problems.append(f"{path}: " + ", ".join(f"adapters[{i}] has {update!r}" for i, update in here.items()))
    if problems:
        raise StateDictError("combine_adapters: the adapters do not fit together; nothing was combined. For layers that only "
                             "some of them have, pass missing='zero'.\n  " + "\n  ".join(problems))
    if options.get("rng") is not None:
        options["rng"] = numpy.random.default_rng(options["rng"])
    combined = {}
    for path in paths:
        pairs = [(adapter[path], weight) for adapter, weight in zip(adapters, found) if path in adapter]
        try:
            combined[path] = method([update for update, _ in pairs], [weight for _, weight in pairs], **options)
        except MiniloraError as error:
            error.path = error.path or path
            raise
    return combined
