"""What merging one layer adds: the active adapters of the layer as one update of its stored weight, on the host.

Plain adapters add up to low-rank factors again: s B A with the rows of all A below each other. DoRA's
W' = rho (W + D) stretches row i of the weight besides, by rho_i = m_i / c_i. With weights w_k and any mixture of both,

    W' = kappa W + D',        kappa = 1 + sum_k w_k (rho_k - 1),        D' = sum_k w_k rho_k D_k        (plain: rho_k = 1)

so a merge is described by factors of D' and, with DoRA, the vector kappa.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy

from ... import backend
from ...engine import no_grad
from ...errors import StateError
from ...tensor import Parameter
from .. import gradient
from ..gradients.dora import lengths, ratio
from ..merging.arithmetic import Update
from ..merging.weight import not_finite
from .adapter import Adapter

__all__ = ["delta_of", "merged_bias", "update_of"]

Array = Any


class Adapted(Protocol):
    """What is asked of a layer here: `base.AdaptedLayer` has it, with the meaning that `form.Form` says."""

    weight: Parameter
    bias: Parameter | None
    adapters: dict[str, Adapter]
    active: dict[str, float]

    @property
    def rows_are_outputs(self) -> bool: ...

    def matrix(self, weight: Array) -> Array: ...

    def stored(self, A: Array, B: Array) -> tuple[Array, Array]: ...

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]: ...

    def bias_update(self, adapter: Adapter) -> Array | None: ...

    def refuse_lengths(self) -> None: ...


def factors_of(adapter: Adapter) -> tuple[numpy.ndarray, numpy.ndarray]:
    """A and B of the whole update, on the host, as copies. NaN is named here: as stored, the two may have changed places."""
    with no_grad():
        factors = dict(zip(("lora_A", "lora_B"), (numpy.array(backend.to_host(p.data)) for p in adapter.factors())))
    if not all(numpy.isfinite(array).all() for array in factors.values()):
        raise not_finite("weight", factors, "")
    return factors["lora_A"], factors["lora_B"]


def update_of(layer: Adapted) -> Update:
    """The update of the layer's stored weight, `layer.matrix(weight)`.

    Raises
    ------
    StateError
        If no adapter is active, or DoRA's m / c is not finite.
    """
    if not layer.active:
        raise StateError("merge: no adapter is active in this layer: lora.activate(model, name) first")
    terms = [(layer.adapters[name], weight) for name, weight in layer.active.items()]
    if len(terms) == 1 and terms[0][0].magnitude is None:
        (adapter, weight), = terms
        return Update(*layer.stored(*factors_of(adapter)), adapter.scaling * weight)
    kappa: Array = 1.0
    As: list[Array] = []
    Bs: list[Array] = []
    for adapter, weight in terms:
        A, B = factors_of(adapter)
        B = B.astype(wide_of(B))  # else the factor would be rounded into float16, or overflow there
        factor: Array = adapter.scaling * weight
        with numpy.errstate(all="ignore"):  # what overflows is found, and named
            if adapter.magnitude is not None:
                rho = rho_of(layer, adapter)
                kappa, factor = kappa + weight * (rho - 1.0), (factor * rho).reshape(-1, *[1] * (B.ndim - 1))
            sB = (B * factor).astype(B.dtype)
        if not numpy.isfinite(sB).all():
            raise not_finite("weight", {"lora_B": B}, f"s B overflows {B.dtype}")
        A, B = layer.stored(A, sB)
        As, Bs = [*As, A], [*Bs, B]
    A, B = numpy.concatenate(As), numpy.concatenate(Bs, axis=1)
    if isinstance(kappa, float):
        return Update(A, B, 1.0)
    return Update(A, B, 1.0, kappa[:, None] if layer.rows_are_outputs else kappa[None, :])


def wide_of(array: Array) -> Any:
    """The dtype to compute in: float32, of a float64 array float64."""
    return numpy.result_type(array.dtype, "float32")


def rho_of(layer: Adapted, adapter: Adapter) -> numpy.ndarray:
    """DoRA's m / c on the host, in float64; `StateError` if it is not finite.

    The numbers of `layer.rho`, without a copy of a weight in half precision: its blocks are widened one by one.
    """
    layer.refuse_lengths()
    weight: Any = layer.weight
    with no_grad():
        W, A, B, groups = layer.as_matrices(weight.data, *(p.data for p in adapter.factors()))
        c = weight.device.versions[lengths](W, A, B, adapter.scaling, groups, weight.device.exact, adapter.dtype)
        assert adapter.magnitude is not None
        rho = backend.to_host(ratio(adapter.magnitude.data, c, weight.device.xp)[0]).astype("float64")
    if not numpy.isfinite(rho).all():
        parts = {name: p for name, p in adapter.own_parameters()} | {"weight": layer.weight}
        raise not_finite("weight", {name: backend.to_host(p.data) for name, p in parts.items()},
                         f"m / c overflows {layer.weight.dtype}")
    return rho


def delta_of(layer: Adapted) -> Array:
    """What merging would add to the weight, in its shape and on its device."""
    weight = layer.weight.data
    A, B, s, kappa = update_of(layer)
    D = gradient.delta(A, B, s)
    if kappa is not None:
        D = D + (kappa - 1.0) * layer.matrix(backend.to_host(weight))
    return backend.to_device(D.astype(weight.dtype, copy=False).reshape(weight.shape), layer.weight.device)


def merged_bias(layer: Adapted) -> Array | None:
    """The bias with the biases of the updates added; None if there are none.

    Raises
    ------
    StateError
        If an update has a bias and the layer has none, or the sum is not finite.
    """
    more: list[tuple[Array, float]] = []
    for name, weight in layer.active.items():
        adapter = layer.adapters[name]
        bias = layer.bias_update(adapter)
        if bias is not None and layer.bias is None:
            raise StateError(f"merge: adapter {name!r} has a bias (lora_bias) and this layer has none that could take it up")
        if bias is not None:
            more.append((backend.to_host(bias), adapter.scaling * weight))
    if not more:
        return None
    assert layer.bias is not None
    before = backend.to_host(layer.bias.data)
    with numpy.errstate(all="ignore"):
        total = before.astype(wide_of(before))
        for bias, factor in more:
            total = total + bias.astype(total.dtype) * factor
        merged = total.astype(before.dtype)
    if not numpy.isfinite(merged).all():
        raise not_finite("bias", {"lora_bias": numpy.concatenate([bias for bias, _ in more]), "bias": before},
                         f"the sum overflows {before.dtype}")
    return backend.to_device(merged, layer.bias.device)
