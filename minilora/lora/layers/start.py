"""How an adapter starts: with D = 0, so that training begins at the base model, unless tests want another start.

    True           A from U(-1/sqrt(n), 1/sqrt(n)), n the inputs that an output meets; B = 0 (loralib, PEFT)
    "gaussian"     A from N(0, 1/r^2), B = 0. Of an embedding, in both cases, A = 0 and B from N(0, 1)
    False          A as for True, B likewise from U(-1/sqrt(r), 1/sqrt(r)); both N(0, 1) of an embedding. D is not 0: for tests
    "orthogonal"   B A = 0 with neither of them 0: rows of an orthogonal Q (r, r), taken in turn by A and by B
    "pissa"        s B A = the r largest singular parts of W: B = U sqrt(S/s), A = sqrt(S/s) V^T
    "olora"        B = Q and A = R of W = Q R, the first r columns and rows
    "loftq"        s B A = the r largest singular parts of W - Q, and the base is Q, W in four or eight bits: see `loftq`

An adapter that began elsewhere, with data ("eva") or with B frozen ("mica"), can be read from its file, and not be made here.

"pissa" and "olora" begin in directions that matter for W (Meng et al. 2024, arXiv 2404.02948; Büyükakyüz 2024, arXiv
2406.01775). As published they take s B A out of the weight, so that the base is another one afterwards. Here the weight stays:
the frozen start is part of the adapter, D = s (B A - B0 A0). Outputs and gradients are the same, several such adapters fit on
one base, and the adapter is an ordinary update of rank 2 r, with [B, -B0] and [A; A0]. That costs the products of the frozen
pair, 2 N r (in + out) forward and as many for dx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from ... import backend, nn
from ...engine import no_grad
from ...errors import ConfigError, StateError
from ...ops.dropout import check_dropout
from ...tensor import Parameter
from .. import gradient
from .adapter import Adapter
from .precision import trained_dtype

if TYPE_CHECKING:
    from .base import AdaptedLayer
    from .loftq import Begun

__all__ = ["check_start", "new_adapter", "oriented"]

Array = Any


def new_adapter(layer: AdaptedLayer, r: int, lora_alpha: float, lora_dropout: float = 0.0, *,
                init_lora_weights: bool | str = True, use_rslora: bool = False, use_dora: bool = False, exact: bool = False,
                lora_bias: bool = False, loftq_config: Mapping[str, int] | None = None,
                rng: numpy.random.Generator | int | None = None, **unknown: Any) -> Adapter:
    """An adapter that fits a layer and is not part of it yet; parameters and errors as in `kinds.adapt`."""
    _refuse_unknown(unknown)
    s = gradient.scaling(lora_alpha, r, use_rslora)
    check_dropout(lora_dropout)
    if layer.only_factors and (lora_bias or use_dora or init_lora_weights not in (True, "gaussian")):
        raise ConfigError(f"{type(layer).__name__} has A and B only: no use_dora, no lora_bias, and init_lora_weights is True "
                          "or 'gaussian'")
    W, _, _, groups = layer.as_matrices(layer.weight.data, *map(numpy.empty, layer.factor_shapes(int(r))))
    check_start(int(r), W.shape, groups, table=layer.zero == "lora_A", init_lora_weights=init_lora_weights, use_dora=use_dora,
                lora_bias=lora_bias)
    if exact and not use_dora:
        raise ConfigError("exact: says how DoRA's gradient is taken: give use_dora=True too")
    rng, r = numpy.random.default_rng(rng), int(r)
    device, dtype = layer.weight.device, trained_dtype(layer.weight.dtype)
    begun = _begun(layer, r, s, loftq_config) if init_lora_weights == "loftq" else None
    A, B, start = (*layer.stored(begun.A, begun.B), False) if begun else _factors(layer, init_lora_weights, r, s, rng)

    def parameter(array: Array, trainable: bool = True) -> Parameter:
        return Parameter(backend.to_device(numpy.ascontiguousarray(array).astype(dtype), device), trainable)

    adapter = Adapter(parameter(A), parameter(B), r, lora_alpha, nn.Dropout(lora_dropout, rng=rng), use_rslora)
    adapter.begun = begun
    if start:
        adapter.start_A, adapter.start_B = parameter(A, False), parameter(-B, False)
    if lora_bias:
        adapter.lora_bias = parameter(numpy.zeros(len(B)))
    if use_dora:
        from ..gradients.dora import initial_magnitude  # here, because most programs train no lengths

        with no_grad():
            base = Parameter(begun.base, trainable=False) if begun else layer.weight
            W, A, B, groups = layer.as_matrices(base, *adapter.factors())
            adapter.magnitude = Parameter(initial_magnitude(W.data.astype(dtype, copy=False), A.data, B.data, s, groups))
        adapter.exact = bool(exact)
    return adapter


def _refuse_unknown(options: dict[str, Any]) -> None:
    if options:
        from ..config_checks import nearest

        known = ("init_lora_weights", "loftq_config", "use_rslora", "use_dora", "exact", "lora_bias", "rng")
        lines = [f"{name!r}" + "".join(f" (is {close!r} meant?)" for close in nearest(name, known, 1)) for name in options]
        raise ConfigError(f"there is no option {', '.join(lines)}. The options are {', '.join(known)}")


def _begun(layer: AdaptedLayer, r: int, s: float, config: Mapping[str, int] | None) -> Begun:
    """The base and the factors of "loftq", of the weight as it is stored."""
    from . import loftq  # here, because most adapters begin otherwise

    if not layer.begins_quantised:
        raise ConfigError(f"init_lora_weights='loftq' is for linear layers, got {type(layer).__name__}")
    if layer.adapters:
        raise ConfigError("init_lora_weights='loftq' chooses the base too, and this layer has adapters that were made for the "
                          "one that it has: it can only be the first")
    kind, turns = loftq.settings(config)
    return loftq.begin(layer.weight.data, r, s, kind, turns)


def check_start(r: int, shape: tuple[int, ...], groups: int = 1, *, table: bool = False, init_lora_weights: bool | str = True,
                use_dora: bool = False, lora_bias: bool = False) -> None:
    """Raise `ConfigError` if an adapter of rank r cannot start so; `lora.plan` asks too, which has no weights but only shapes.

    Parameters
    ----------
    r : int
    shape : tuple of int
        Of the weight as a matrix (out, n).
    groups : int
        Of a convolution.
    table : bool
        Whether it is an embedding, of which A starts at 0 and not B.
    """
    from ..config_checks import INITS, ONLY_READ, is_init  # here, because importing minilora does not need them

    init = init_lora_weights
    begun = ", ".join(repr(known) for known in INITS if known not in ONLY_READ)
    if not is_init(init):
        raise ConfigError(f"init_lora_weights must be one of {begun}, got {init!r}")
    if init in ONLY_READ:
        raise ConfigError(f"init_lora_weights={init!r}: minilora reads and continues adapters that began so, and begins none: "
                          f"take one of {begun}")
    if lora_bias and (use_dora or not isinstance(init, bool)):
        raise ConfigError("lora_bias: only with init_lora_weights=True or False, and without use_dora, as in PEFT")
    if table and (lora_bias or init not in (True, False, "gaussian")):
        what = "lora_bias" if lora_bias else f"init_lora_weights={init!r}"
        raise ConfigError(f"{what} is not for embeddings: it needs a layer whose B starts at 0")
    if init in (True, False, "gaussian"):
        return
    if groups > 1:
        raise ConfigError(f"init_lora_weights={init!r}: not for a convolution with {groups} groups")
    if init == "orthogonal" and r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' shares r directions between A and B: r must be even, got {r}")
    if init != "orthogonal" and r > min(shape):
        raise ConfigError(f"init_lora_weights={init!r} takes r directions of the weight {tuple(shape)}: r is at most "
                          f"{min(shape)}, got {r}")


def _factors(layer: AdaptedLayer, init: bool | str, r: int, s: float, rng: numpy.random.Generator) -> tuple[Array, Array, bool]:
    """A and B on the host, and whether they are to be subtracted as a frozen start."""
    shapes = layer.factor_shapes(r)
    if layer.zero == "lora_A":
        return numpy.zeros(shapes[0]) if init else rng.standard_normal(shapes[0]), rng.standard_normal(shapes[1]), False
    if isinstance(init, bool):
        in_bound, r_bound = (1.0 / math.sqrt(math.prod(shape[1:])) for shape in shapes)
        A = rng.uniform(-in_bound, in_bound, shapes[0])
        return A, numpy.zeros(shapes[1]) if init else rng.uniform(-r_bound, r_bound, shapes[1]), False
    if init == "gaussian":
        return rng.standard_normal(shapes[0]) / r, numpy.zeros(shapes[1]), False
    A, B = oriented(layer, str(init), r, s, rng)
    return A, B, init != "orthogonal"


def oriented(layer: AdaptedLayer, init: str, r: int, s: float,
             rng: numpy.random.Generator | None = None) -> tuple[Array, Array]:
    """A and B of a start that takes directions of the weight, in float64 on the host, in the shapes of the layer's factors.

    For "pissa" and "olora" the product s B A (olora: B A) follows from the weight alone: with the start of another program it
    agrees although singular vectors and columns of Q may come with the other sign. It is not unique only where the r-th
    singular value comes twice ("pissa"), or the first r columns of W are not independent ("olora").
    """
    shapes = layer.factor_shapes(r)
    W, _, _, _ = layer.as_matrices(backend.to_host(layer.weight.data), *map(numpy.empty, shapes))
    A, B = _ORIENTED[init](W, r, s, rng or numpy.random.default_rng(0))
    return A.reshape(shapes[0]), B.reshape(shapes[1])


def _check_finite(name: str, W: Array) -> None:
    if not numpy.isfinite(W).all():
        raise StateError(f"init_lora_weights={name!r} decomposes the weight, which holds NaN or inf")


def _pissa(W: Array, r: int, s: float, rng: numpy.random.Generator) -> tuple[Array, Array]:
    _check_finite("pissa", W)
    U, S, Vt = numpy.linalg.svd(W.astype("float64"), full_matrices=False)
    root = numpy.sqrt(S[:r] / abs(s))
    return root[:, None] * Vt[:r], U[:, :r] * root * (1 if s > 0 else -1)


def _olora(W: Array, r: int, s: float, rng: numpy.random.Generator) -> tuple[Array, Array]:
    _check_finite("olora", W)
    Q, R = numpy.linalg.qr(W.astype("float64"))
    return R[:r], Q[:, :r]


def _orthogonal(W: Array, r: int, s: float, rng: numpy.random.Generator) -> tuple[Array, Array]:
    Q, _ = numpy.linalg.qr(rng.standard_normal((r, r)))
    A = rng.standard_normal((W.shape[1], r // 2)) @ Q[::2]
    B = rng.standard_normal((W.shape[0], r // 2)) @ Q[1::2]
    return A.T / 10.0, B / 10.0


_ORIENTED = {"pissa": _pissa, "olora": _olora, "orthogonal": _orthogonal}
