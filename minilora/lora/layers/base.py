"""AdaptedLayer: a frozen layer with any number of named adapters beside its weight; what all LoRA layers share.

    y = frozen(x) + sum over the active adapters of w update(x)        w the weight that the adapter was activated with

What an update is depends on the adapter only:

    plain           s up(down(x))            down multiplies by A, up by B; for a linear layer s (x A^T) B^T
    with lora_bias  s (up(down(x)) + b_B)
    with a start    the same with [A; start_A] and [B, start_B]
    DoRA            rho (base(x) + s up(down(x))) - base(x)    rho = m / c (`gradients.dora`), base(x) = frozen(x), no bias

How to multiply by A and B is what a kind of layer defines, in `form`.

A single active adapter without dropout, which is the usual case, is computed by one operation together with the frozen layer
(`gradient.LoRALinear` and its like): there x is kept once, and nothing is added up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from ... import nn
from ...errors import ConfigError, StateError
from ...nn.by_row import rows_of
from ...nn.state import state_names
from ...tensor import Parameter, Tensor
from .adapter import Adapter, check_name
from .form import Form
from .precision import beside, in_dtype, rounded, trained_dtype

if TYPE_CHECKING:
    from ...nn.by_row import Rows

__all__ = ["AdaptedLayer"]

Array = Any


class AdaptedLayer(Form):
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

    # Attributes that the plain layer lacks.
    OWN = frozenset({"adapters", "active", "way_back", "base_class", "state_names"})

    def adopt(self, base: nn.Module) -> None:
        """Become `base` with no adapters yet: its settings, and the very same Parameters."""
        vars(self).update(vars(base))
        self.base_class, self.state_names = type(base), tuple(state_names(base))
        self.adapters, self.active = {}, {}

    def plain(self) -> nn.Module:
        """The layer without adapters, with the same Parameters; if it is merged, with what is merged."""
        layer = self.base_class.__new__(self.base_class)
        vars(layer).update({name: value for name, value in vars(self).items() if name not in self.OWN})
        return layer

    def as_base(self) -> nn.Module:
        return self.plain()

    def check_loading(self, names: Collection[str]) -> None:
        if "weight" not in names:
            return
        for name, adapter in self.adapters.items():
            taken = [part for part, p in adapter.own_parameters() if part in ("magnitude", "start_A", "start_B")]
            lacking = [part for part in taken if f"adapters.{name}.{part}" not in names]
            if lacking:
                raise StateError(f"load_state_dict: {', '.join(lacking)} of adapter {name!r} were taken from the weight that "
                                 "would be replaced, and are not in this state: load the base first, then lora.inject(model, "
                                 "config); or load a state that holds both. Nothing was loaded")

    # -- computing --------------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> Tensor:
        if self.merged:
            self.refuse_merged_use()
            return self.frozen(x)  # the same op as the base's: no added latency
        rows, active = rows_of(self), self.active
        if rows is None and len(active) == 1:
            (name, weight), = active.items()
            adapter = self.adapters[name]
            if not (adapter.lora_dropout.p and self.training):  # with dropout the branches read different arrays
                return rounded(self._alone(x, adapter, weight), self.weight.dtype)
        return self.with_updates(self.frozen(x), x, self._update, rows)

    def with_updates(self, y: Tensor, x: Any, update: Callable[..., Tensor], rows: Rows | None,
                     without: Collection[str] = ()) -> Tensor:
        """y and the updates of x: of the active adapters in all rows, or within a context in each row that of its adapter."""
        was, y = y.dtype, in_dtype(y, trained_dtype(y.dtype))
        if rows is not None:
            updates = {name: partial(update, adapter=adapter, factor=1.0) for name, adapter in self.adapters.items()
                       if name not in without}
            y = rows.added(y, x, updates)
        else:
            for name, weight in self.active.items():
                y = y if name in without else y + update(x, self.adapters[name], weight)
        return in_dtype(y, was)

    def update(self, x: Any) -> Tensor:
        """The adapters' part of the output alone: for callers who have the frozen part of x already.

        Raises
        ------
        StateError
            If no adapter is active, the layer is merged or switched off, or a mixed batch is running.
        """
        rows = rows_of(self)
        if self.merged or rows is not None or not self.active:
            why = ("this layer is merged, so that the frozen part has the update already: unmerge() first" if self.merged else
                   "this layer is switched off within lora.disabled" if rows is not None and not rows.names else
                   "the rows of a mixed batch have different adapters" if rows is not None else
                   "no adapter is active in this layer: lora.activate(model, name) first")
            raise StateError(f"update: {why}")
        (first, weight), *more = self.active.items()
        total = self._update(x, self.adapters[first], weight)
        for name, weight in more:
            total = total + self._update(x, self.adapters[name], weight)
        return rounded(total, self.weight.dtype)

    def _alone(self, x: Any, adapter: Adapter, weight: float) -> Tensor:
        """`forward` with this adapter alone, without dropout; in the adapter's dtype."""
        if adapter.magnitude is not None:
            if weight != 1.0:
                return in_dtype(self.frozen(x), adapter.dtype) + self._update(x, adapter, weight)
            y = self._dora(x, adapter)
            return y if self.bias is None else y + self.by_output(in_dtype(self.bias, adapter.dtype))
        y = self._both(x, adapter, adapter.scaling * weight)
        if adapter.lora_bias is not None:
            y = y + self.by_output(adapter.lora_bias * (adapter.scaling * weight))
        return y

    def _update(self, x: Any, adapter: Adapter, factor: float) -> Tensor:
        """factor times the update of one adapter, in its dtype."""
        x = self.dropped(x, adapter)
        if adapter.magnitude is not None:
            return (self._dora(x, adapter) - in_dtype(self.frozen(x, bias=False), adapter.dtype)) * factor
        y = self._low_rank(x, adapter, factor * adapter.scaling)
        return y if adapter.lora_bias is None else y + self.by_output(adapter.lora_bias) * (factor * adapter.scaling)

    def dropped(self, x: Any, adapter: Adapter) -> Any:
        return adapter.lora_dropout(x)

    def _dora(self, x: Any, adapter: Adapter) -> Tensor:
        """rho (base(x) + s up(down(x))), without the bias."""
        y = self._both(x, adapter, adapter.scaling, bias=False)
        return y * self.by_output(self.rho(adapter))  # type: ignore[no-any-return]

    def _low_rank(self, x: Any, adapter: Adapter, s: float) -> Tensor:
        return self.low_rank(beside(x, adapter.dtype), *adapter.factors(), s)

    def _both(self, x: Any, adapter: Adapter, s: float, bias: bool = True) -> Tensor:
        """frozen(x, bias) + s up(down(x)), in the adapter's dtype: one operation, unless the weight has another dtype."""
        if adapter.dtype == self.weight.dtype:
            return self.fused(x, *adapter.factors(), s, bias)
        return in_dtype(self.frozen(x, bias), adapter.dtype) + self._low_rank(x, adapter, s)

    def rho(self, adapter: Adapter) -> Tensor:
        """DoRA's factor of each output, (out,)."""
        self.refuse_lengths()
        from ..gradients.dora import dora_scale  # here, because most programs train no lengths

        # Of a weight in half precision a copy is made here, for this call: out x in numbers.
        W, A, B, groups = self.as_matrices(in_dtype(self.weight, adapter.dtype), *adapter.factors())
        return dora_scale(W, A, B, adapter.magnitude, adapter.scaling, groups=groups, exact=adapter.exact)

    def refuse_lengths(self) -> None:
        if self.merged:
            raise StateError("this layer is merged: its weight is W', and DoRA takes lengths of W + D. Call unmerge() first")

    # -- adapters ---------------------------------------------------------------------------------------------------

    def attach(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in, not active yet."""
        check_name(name)
        if name in self.adapters:
            raise ConfigError(f"there is an adapter {name!r} already: choose another name")
        if adapter.begun is not None:
            self.weight.data, adapter.begun = adapter.begun.base, None
        self.adapters = {**self.adapters, name: adapter.train(self.training)}  # a new dict: another thread may be reading this

    def begin(self, adapter: Adapter) -> None:
        """Take in the first adapter, as "default", and make it active."""
        self.attach("default", adapter)
        self.active = {"default": 1.0}

    @property
    def has_update(self) -> bool:
        return bool(self.active)

    @property
    def running(self) -> bool:
        """Whether `disabled` or `mixed` is open, here in this thread."""
        return rows_of(self) is not None

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
