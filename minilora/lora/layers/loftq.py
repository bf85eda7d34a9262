"""LoftQ: a start of A and B that gives back a part of what quantising takes from the weight.

QLoRA begins at Q = quant(W) and B = 0: the model is another one than W's, by W - Q. LoftQ chooses Q, A and B together, so that
Q + s B A is near W. From B A = 0 on, in turns:

    Q_t = quant(W - s B_t-1 A_t-1)                           what A and B hold, Q need not
    W - Q_t = U S V^T                                        its r largest singular parts go to A and B, s divided out:
    B_t = U_r sqrt(S_r / s)      A_t = sqrt(S_r / s) V_r^T

so that s B_t A_t is the best matrix of rank r for what is left of W - Q_t:

    ||W - Q_t - s B_t A_t||^2 = sum over j > r of S_j^2

In the first turn Q_1 is QLoRA's, so every start is at least as near to W as QLoRA's is. A further turn need not be nearer,
since quantising another matrix may lose more: the turn with the smallest rest is taken. The rest of W - Q is nearly as large
in every direction, so that r of n directions win back a little more than r / n of its square.

The base is Q afterwards, and A and B belong to it: saved beside W, or beside quant(W), they would be wrong.

Source: Li et al. 2023, arXiv 2310.08659, algorithm 1. There and in PEFT s is not divided out, which is right for s = 1 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend, quant
from ...errors import StateError
from ...stored import Stored
from ..algebra.compress import top_svd

__all__ = ["Begun", "begin", "settings"]

Array = Any

EXACT = 1024  # the shorter side up to which all singular values are computed, and not only about the first r
KINDS = {4: "nf4", 8: "int8"}  # by loftq_bits


class Begun(NamedTuple):
    """A base, and the factors that begin beside it, of the weight as it is stored.

    Attributes
    ----------
    base : Stored
    A, B : ndarray
        float64, without s.
    rests : tuple of float
        ||W - Q - s B A|| / ||W||: first QLoRA's, then that of each turn.
    turn : int
        The one that was taken.
    """

    base: Stored
    A: Array
    B: Array
    rests: tuple[float, ...]
    turn: int


def settings(config: Mapping[str, Any] | None) -> tuple[str, int]:
    """(kind, turns) of PEFT's loftq_config: loftq_bits, 4 or 8, and loftq_iter."""
    given = config or {}
    return KINDS[given.get("loftq_bits", 4)], int(given.get("loftq_iter", 1))


def begin(W: Array, r: int, s: float, kind: str = "nf4", turns: int = 1) -> Begun:
    """Q, A and B for a weight, as told at the top of this file.

    Parameters
    ----------
    W : array, shape (out, in), or a matrix in 16 bits
        The base is on its device, and computes in its dtype.
    r : int
        At most the shorter side.
    s : float
    kind : {"nf4", "int8"}
    turns : int

    Raises
    ------
    StateError
        If W is not finite, or has too few bits already.

    Notes
    -----
    Works on the host in float64, and needs four copies of W; above `EXACT` the singular parts are found by random projections.
    """
    if getattr(W, "coarse", False) if isinstance(W, Stored) else False:
        raise StateError(f"init_lora_weights='loftq' makes up for what quantising takes, and this weight is held as {W.kind} "
                         "already: inject first, into the exact weights, and quantise the rest of the model afterwards")
    host = numpy.asarray(backend.to_host(W), dtype="float64")
    norm = float(numpy.linalg.norm(host)) or 1.0
    held = quant.stored(W, kind)
    rest = host - backend.to_host(held)
    rests, best = [float(numpy.linalg.norm(rest)) / norm], None
    for turn in range(1, turns + 1):
        A, B = _factors(rest, r, s)
        update = s * (B @ A)
        rest -= update
        rests.append(float(numpy.linalg.norm(rest)) / norm)
        if best is None or rests[-1] < rests[best.turn]:
            best = Begun(held, A, B, (), turn)
        if turn < turns:
            made = quant.stored(backend.to_device(host - update, backend.device_of(W)), kind)
            held = made.astype(W.dtype)
            rest = host - backend.to_host(held)
    assert best is not None
    return best._replace(rests=tuple(rests))


def _factors(rest: Array, r: int, s: float) -> tuple[Array, Array]:
    U, S, Vt = top_svd(rest, r, min(rest.shape) <= EXACT, 0)
    root = numpy.sqrt(S[:r] / abs(s))
    return root[:, None] * Vt[:r], U[:, :r] * root * (1.0 if s > 0 else -1.0)
