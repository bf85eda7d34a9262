"""A model that moves in a random subspace of all its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy

from ... import backend, ops
from ...engine import is_recording, no_grad
from ...errors import ConfigError, DeviceError, StateError
from ...nn.contents import Entry
from ...nn.module import Module
from ...settings import whole
from ...tensor import Parameter, Tensor
from .projections import KINDS, Projection
from .written import Written, device_names

__all__ = ["METHODS", "Subspace"]

S = TypeVar("S", bound="Subspace")
METHODS = ("did", "said")


class Subspace(Module):
    """A model whose weights are θ = θ0 + P v: trained are the few numbers of v, and no weight by itself.

        z = P v                          P (D, d) random and fixed, see `Dense` and `Fastfood`
        θ_i = θ0_i + λ_i z_i             z_i the part of tensor i; λ = 1 ("did"), or one trained λ_i for each tensor ("said")

        dz_i = λ_i dθ_i        dλ_i = <z_i, dθ_i>        dv = Pᵀ dz

    It begins as the model is: v = 0, λ = 1. What the model has trainable, at that moment, is moved; freeze what is to stay.
    What is made trainable afterwards is trained beside, as it is. A weight that several modules share is moved once.

    The space takes the place of the model: it is called like it, and optimizers, `train.fit`, `summary` and ``state_dict`` see
    v, λ and the frozen θ0 under its own paths. Each call computes θ and gives it to the model: for 2 L log2 L additions a
    block and about 4 D numbers (θ0, θ, z and, in backward, dθ) beside the draws. The model inside can be used too; its weights
    are those of the last call, or of `write`.

    Parameters
    ----------
    model : Module
        Changed: its trained parameters are frozen for everybody but this space, and get new arrays.
    d : int
        How many numbers are trained in all: with "said" v has one less for each tensor.
    method : {"did", "said"}
    projection : {"fastfood", "dense"}
    seed : int
        Of what P draws.

    Attributes
    ----------
    v : Parameter, shape (d,) or (d - m,)
        In float32 at least, also where the model is of less.
    scales : Parameter, shape (m,), or None
        λ.
    model : Module
    projection : Projection

    Raises
    ------
    ConfigError
        If a setting is out of range, or nothing in the model is trained.
    StateError
        If the model holds something that must not be moved now, such as merged adapters.
    DeviceError
        If its parameters live on two devices.

    Notes
    -----
    v is a vector of its own: its learning rate is not that of the weights. A step in v of length s moves all of θ by about s.

    Source: Li et al. 2018, arXiv 1804.08838 (θ = θ0 + P v); Aghajanyan et al. 2020, arXiv 2012.13255 (Fastfood, λ).

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(20, 30, rng=0), minilora.nn.Linear(30, 2, rng=1))
    >>> space = Subspace(model, d=8)
    >>> [(name, p.shape) for name, p in space.named_parameters() if p.trainable]
    [('v', (8,))]
    >>> space(minilora.tensor([[1.0] * 20])).sum().backward()
    >>> space.v.grad.shape
    (8,)
    """

    scales: Parameter | None

    def __init__(self, model: Module, d: int, *, method: str = "did", projection: str = "fastfood", seed: int = 0) -> None:
        named = moved_in(model)
        tensors, size = len(named), sum(p.size for _, p in named)
        faults = [f"{name} must be one of {', '.join(known)}, got {value!r}" for name, value, known in (
            ("method", method, METHODS), ("projection", projection, tuple(KINDS))) if value not in known]
        least = 1 + (tensors if method == "said" else 0)
        if whole("d", d) > size or d < least:
            faults.append(f"d must lie between {least:,} and {size:,}, got {d:,}: the model trains {size:,} numbers in "
                          f"{tensors} tensors" + (", and said takes one number for each of these" if least > 1 else ""))
        if faults:
            raise ConfigError("Subspace: " + "; ".join(faults))
        dtype = numpy.result_type("float32", *(p.dtype for _, p in named))
        device = named[0][1].device
        self.method = method
        self.v = Parameter(backend.to_device(numpy.zeros(int(d) - least + 1, dtype), device))
        self.scales = Parameter(backend.to_device(numpy.ones(tensors, dtype), device)) if method == "said" else None
        self.model = model
        self.projection: Projection = KINDS[projection](len(self.v), size, seed)
        self.written: Written | None = Written(named)

    @property
    def d(self) -> int:
        """How many numbers are trained."""
        return sum(p.size for p in self.own())

    def own(self) -> list[Parameter]:
        """v and λ."""
        return [self.v] if self.scales is None else [self.v, self.scales]

    def weights(self) -> Tensor:
        """θ of now as one vector (D,), with its graph."""
        written = self.inside()
        written.move(self.v)
        return ops.displace(self.projection(self.v), self.scales, written.start)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        written = self.inside()
        if not is_recording():
            self.write()
            return self.model(*args, **kwargs)
        theta = self.weights()
        written.put(theta.data, self.own())
        beside = [p for p in self.model.parameters() if p.trainable]
        return ops.with_weights(self.model, written.parameters, theta, beside, *args, **kwargs)

    def inside(self) -> Written:
        """What is written; `StateError` after `fold`."""
        if self.written is None:
            raise StateError("this subspace was folded: its model is an ordinary one again. Use space.model, or make a new "
                             "Subspace around it")
        return self.written

    @no_grad()
    def write(self) -> None:
        """Let the model inside have the weights of now: after a step, before it is used by itself."""
        written = self.inside()
        if not written.up_to_date(self.own()):
            written.put(self.weights().data, self.own())

    def fold(self) -> Module:
        """The model with θ as plain weights, trained as before. The space is at its end."""
        self.write()
        written, self.written = self.inside(), None
        written.let_go()
        return self.model

    # -- what others see: θ0 in the place of what is written -----------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """v, λ, and the parameters of the model: those that are moved as they began, frozen."""
        instead = {} if self.written is None else self.written.instead()
        return ((path, instead.get(id(p), p)) for path, p in super().named_parameters())

    def _kept(self, through: Callable[[Any], Any] | None = None) -> Iterator[tuple[str, Module, Entry]]:
        instead = {} if self.written is None else self.written.instead()
        return ((path, module, (name, place, instead.get(id(value), value)))
                for path, module, (name, place, value) in super()._kept(through))

    def requires_grad(self: S, mode: bool = True) -> S:
        """Train v and λ or, with False, freeze them. What the model was before stays frozen. Returns the space."""
        for p in self.own():
            p.trainable = mode
        return self

    def to(self: S, device: str | None = None, dtype: Any = None) -> S:
        """As `Module.to`; v and λ stay in float32 at least. Returns the space."""
        super().to(device, dtype)
        if self.written is not None:
            self.write()
        return self

    def load_state_dict(self, state: Any, strict: bool = True) -> list[str]:
        """As `Module.load_state_dict`: v and λ, and for the model what it began with."""
        left = super().load_state_dict(state, strict)
        if self.written is not None:
            self.write()
        return left

    def __getstate__(self) -> dict[str, Any]:
        if self.written is not None:
            self.write()  # a copy has the weights of now
        return self.__dict__

    def dtype_for(self, dtype: Any) -> Any:
        return numpy.promote_types(dtype, "float32")

    def extra_repr(self) -> str:
        size = "" if self.written is None else f", moves {self.written.size:,} numbers in {len(self.written.start)} tensors"
        return f"d={self.d}, method={self.method!r}, {self.projection!r}{size}"


def moved_in(model: Module) -> list[tuple[str, Parameter]]:
    """The parameters of a model that a space would move."""
    if not isinstance(model, Module):
        raise ConfigError(f"Subspace: expected a model, got {type(model).__name__}: pass a minilora.nn.Module")
    named = [(path, p) for path, p in model.named_parameters() if p.trainable]
    if not named:
        raise ConfigError("Subspace: nothing in the model is trained, so that there is nothing to move: it is frozen, or in a "
                          "subspace already. For all of its weights write model.requires_grad() before")
    devices = device_names(p for _, p in named)
    if len(devices) > 1:
        raise DeviceError(f"Subspace: the model's parameters live on {' and '.join(devices)}: call model.to(device) before")
    for path, module in model.named_modules():
        try:
            module.check_movable()
        except StateError as error:
            error.path = path
            raise
    return named
