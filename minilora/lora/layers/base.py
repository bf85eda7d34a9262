"""AdaptedLayer: a frozen layer with any number of named adapters beside its weight; what all LoRA layers share.

    y = frozen(x) + sum over the active adapters of w update(x)        w the weight that the adapter was activated with

What an update is depends on the adapter only:

    plain           s up(down(x))            down multiplies by A, up by B; for a linear layer s (x A^T) B^T
    with lora_bias  s (up(down(x)) + b_B)
    with a start    the same with [A; start_A] and [B, start_B]
    DoRA            rho (base(x) + s up(down(x))) - base(x)    rho = m / c (`gradients.dora`), base(x) = frozen(x), no bias

How to multiply by A and B, and how both look as matrices, is what a kind of layer defines. D = s B A is seen from two sides:

                     as_update: D by output      stored: D as the weight lies (`matrix`)
    Linear           (out, in)   A, B            (out, in)   A, B
    fan_in_fan_out   (out, in)   A, B            (in, out)   B^T, A^T
    Embedding        (d, V)      A, B            (V, d)      B^T, A^T
    convolutions     (out, n)    A, block B      (out, n)    A, block B     n = in / groups x kernel; a block for each group
    MergedLinear     (out, in)   A, block B      (out, in)   A, block B     a block for each enabled slot
    Projected        (out, in)   A W, B          (out, in)   A W, B

A single active adapter without dropout, which is the usual case, is computed by one operation together with the frozen layer
(`gradient.LoRALinear` and its like): there x is kept once, and nothing is added up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ... import nn
from ...errors import ConfigError, StateError
from ...nn.state import state_names
from ...tensor import Parameter, Tensor
from .adapter import Adapter, check_name
from .mergeable import MergeableLayer, missing

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["AdaptedLayer"]

Array = Any


class AdaptedLayer(MergeableLayer):
    """A frozen layer with named adapters. The base class of `Linear`, `Embedding`, `Conv1d`, `Conv2d` and others.

    Attributes
    ----------
    weight : Parameter, frozen
    bias : Parameter or None, frozen
    adapters : dict of str to Adapter
    active : dict of str to float
        The adapters that take part in the forward pass, and the factors of their updates.
    merged : bool
    r, lora_alpha, scaling, lora_A, lora_B, lora_dropout
        Of the active adapter, if exactly one is active; else of the only one.
    """

    adapts: type[nn.Module]  # the kind of layer that `adapt` makes one of these of
    base_class: type[nn.Module]
    adapters: dict[str, Adapter]
    active: dict[str, float]
    off = False  # inside `disabled`: only the frozen layer takes part
    rows: Rows | None = None  # inside `mixed`: which adapter each row of the batch gets

    # Attributes that the plain layer lacks.
    OWN = frozenset({"adapters", "active", "off", "rows", "way_back", "base_class", "state_names"})

    def adopt(self, base: nn.Module) -> None:
        """Become `base` with no adapters yet: its settings, and the very same Parameters."""
        vars(self).update(vars(base))
        self.base_class, self.state_names = type(base), tuple(state_names(base))
        self.adapters, self.active = {}, {}

    def plain(self) -> nn.Module:
        """The layer without adapters, with the same Parameters."""
        layer = self.base_class.__new__(self.base_class)
        vars(layer).update({name: value for name, value in vars(self).items() if name not in self.OWN})
        return layer

    # -- what a kind of layer defines -------------------------------------------------------------------------------

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_A and lora_B."""
        raise missing(self, "factor_shapes")

    def frozen(self, x: Any, bias: bool = True) -> Tensor:
        """The base layer's output."""
        raise missing(self, "frozen")

    def fused(self, x: Any, A: Any, B: Any, s: float, bias: bool = True) -> Tensor:
        """frozen(x, bias) + s up(down(x, A), B), in one operation."""
        raise missing(self, "fused")

    def down(self, x: Any, A: Any) -> Tensor:
        """A applied to the input."""
        raise missing(self, "down")

    def up(self, z: Any, B: Any) -> Tensor:
        """B applied to what `down` gave."""
        raise missing(self, "up")

    def by_output(self, vector: Any) -> Any:
        """A vector (out,) in the shape in which it goes with the output."""
        return vector

    def as_matrices(self, W: Any, A: Any, B: Any) -> tuple[Any, Any, Any, int]:
        """(W, A, B, groups) as matrices (out, n), (r, n), (out, r / groups), from tensors or from arrays; all are views."""
        return W, A, B, 1

    def stored(self, A: Array, B: Array) -> tuple[Array, Array]:
        """The factors of D as the weight is stored: `matrix(weight)` + s B A. From host arrays."""
        return A, B

    def matrix(self, weight: Array) -> Array:
        """The stored weight as a matrix: a view."""
        return weight

    def bias_update(self, adapter: Adapter) -> Array | None:
        """What merging this adapter adds to the bias, over the scaling; None for nothing."""
        return None if adapter.lora_bias is None else adapter.lora_bias.data

    def as_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        """A (r, n) and B (out, r) of D as a matrix (out, n)."""
        return A, B

    def from_update(self, A: Array, B: Array) -> tuple[Array, Array]:
        """lora_A and lora_B for factors of D as a matrix: the inverse of `as_update`."""
        return A, B

    def rank_for(self, r: int) -> int:
        """The rank of an adapter whose D has factors of rank r."""
        return r

    rows_are_outputs = True  # of matrix(weight)
    zero = "lora_B"  # which of the two starts at 0
    takes_more = True  # adapters than one
    only_factors = False  # whether its adapters consist of A and B alone

    # -- computing --------------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> Tensor:
        if self.merged:
            self.refuse_training()
            return self.frozen(x)  # the same op as the base's: no added latency
        if self.off:
            return self.frozen(x)
        if self.rows is None and len(self.active) == 1:
            (name, weight), = self.active.items()
            adapter = self.adapters[name]
            if not (adapter.lora_dropout.p and self.training):  # with dropout the branches read different arrays
                return self._alone(x, adapter, weight)
        return self.with_updates(self.frozen(x), x, self._update)

    def with_updates(self, y: Tensor, x: Any, update: Callable[..., Tensor]) -> Tensor:
        """y and the updates of x: of the active adapters in all rows, or in a mixed batch in each row that of its adapter."""
        if self.rows is not None:
            updates = {name: partial(update, adapter=adapter, factor=1.0) for name, adapter in self.adapters.items()}
            return self.rows.added(y, x, updates)
        for name, weight in self.active.items():
            y = y + update(x, self.adapters[name], weight)
        return y

    def update(self, x: Any) -> Tensor:
        """The adapters' part of the output alone: for callers who have the frozen part of x already.

        Raises
        ------
        StateError
            If no adapter is active, the layer is merged or switched off, or a mixed batch is running.
        """
        if self.merged or self.off or self.rows is not None or not self.active:
            why = ("this layer is merged, so that the frozen part has the update already: unmerge() first" if self.merged else
                   "this layer is switched off within lora.disabled" if self.off else
                   "the rows of a mixed batch have different adapters" if self.rows is not None else
                   "no adapter is active in this layer: lora.activate(model, name) first")
            raise StateError(f"update: {why}")
        (first, weight), *more = self.active.items()
        total = self._update(x, self.adapters[first], weight)
        for name, weight in more:
            total = total + self._update(x, self.adapters[name], weight)
        return total

    def _alone(self, x: Any, adapter: Adapter, weight: float) -> Tensor:
        """`forward` with this adapter alone, without dropout."""
        if adapter.magnitude is not None:
            if weight != 1.0:
                return self.frozen(x) + self._update(x, adapter, weight)
            y = self._dora(x, adapter)
            return y if self.bias is None else y + self.by_output(self.bias)
        y = self.fused(x, *adapter.factors(), adapter.scaling * weight)
        if adapter.lora_bias is not None:
            y = y + self.by_output(adapter.lora_bias * (adapter.scaling * weight))
        return y

    def _update(self, x: Any, adapter: Adapter, factor: float) -> Tensor:
        """factor times the update of one adapter."""
        x = self.dropped(x, adapter)
        if adapter.magnitude is not None:
            return (self._dora(x, adapter) - self.frozen(x, bias=False)) * factor
        A, B = adapter.factors()
        y = self.up(self.down(x, A) * (factor * adapter.scaling), B)
        return y if adapter.lora_bias is None else y + self.by_output(adapter.lora_bias) * (factor * adapter.scaling)

    def dropped(self, x: Any, adapter: Adapter) -> Any:
        return adapter.lora_dropout(x)

    def _dora(self, x: Any, adapter: Adapter) -> Tensor:
        """rho (base(x) + s up(down(x))), without the bias."""
        y = self.fused(x, *adapter.factors(), adapter.scaling, bias=False)
        return y * self.by_output(self.rho(adapter))  # type: ignore[no-any-return]

    def rho(self, adapter: Adapter) -> Tensor:
        """DoRA's factor of each output, (out,)."""
        if self.merged:
            raise StateError("this layer is merged: its weight is W', and DoRA takes lengths of W + D. Call unmerge() first")
        from ..gradients.dora import dora_scale  # here, because most programs train no lengths

        W, A, B, groups = self.as_matrices(self.weight, *adapter.factors())
        return dora_scale(W, A, B, adapter.magnitude, adapter.scaling, groups=groups, exact=adapter.exact)

    # -- adapters ---------------------------------------------------------------------------------------------------

    def attach(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in, not active yet."""
        check_name(name)
        if name in self.adapters:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name")
        self.adapters[name] = adapter.train(self.training)

    def begin(self, adapter: Adapter) -> None:
        """Take in the first adapter, as "default", and make it active."""
        self.attach("default", adapter)
        self.active = {"default": 1.0}

    @property
    def has_update(self) -> bool:
        return bool(self.active)

    @property
    def running(self) -> bool:
        """Whether `disabled` or `mixed` is open."""
        return self.off or self.rows is not None

    def updating(self) -> list[Parameter]:
        return [p for name in self.active for p in self.adapters[name].parameters()]

    @property
    def adapter(self) -> Adapter:
        """The active adapter, if exactly one is active; else the only one."""
        names = self.active if len(self.active) == 1 else self.adapters
        if len(names) != 1:
            raise StateError(f"this layer has {len(names)} adapters: say which one, as in layer.adapters[name]. It has "
                             f"{', '.join(map(repr, names)) or 'none'}")
        return self.adapters[next(iter(names))]

    @property
    def r(self) -> int:
        return self.adapter.r

    @property
    def lora_alpha(self) -> float:
        return self.adapter.lora_alpha

    @property
    def scaling(self) -> float:
        return self.adapter.scaling

    @property
    def lora_A(self) -> Parameter:
        return self.adapter.lora_A

    @property
    def lora_B(self) -> Parameter:
        return self.adapter.lora_B

    @property
    def lora_dropout(self) -> nn.Dropout:
        return self.adapter.lora_dropout

    # -- text -------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        text = super().extra_repr()
        names = list(self.adapters)
        if names == ["default"] and "default" in self.active:
            text += ", " + self.adapters["default"].extra_repr()
        else:
            text += ", adapters=" + (str([f"{n}*" if n in self.active else n for n in names]) if names else "none")
        return text + (", merged" if self.merged else "")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
