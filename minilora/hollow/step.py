"""A training step of a model, rehearsed without numbers: what it takes, in bytes and in FLOPs.

Nothing is estimated. The model's own forward, the engine's own backward and the optimizer's own step run, in the versions that
the CPU has, on arrays that know their shape and dtype. Each array is counted from when it is made until nobody refers to it any
more: what an operation keeps, what it needs for a moment, and when which of it is gone, are as in the real run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


from .. import backend, optim
from ..engine import ledger, recording
from ..errors import ShapeError
from ..nn.module import Module
from ..stored import Stored
from ..tensor import Parameter, Tensor
from . import device  # noqa: F401  (makes the device known)
from .array import Hollow
from .meter import Meter, current, metered

__all__ = ["Flops", "Step", "hollowed", "rehearse", "step_of"]

Loss = Callable[[Module, Any], Tensor]
Example = Any


class Flops(NamedTuple):
    """FLOPs of the products, a multiplication and an addition as 2: with weights (their gradients too), of adapters, and of
    activations with each other, as in attention."""

    weights: int
    adapters: int
    activations: int


class Step(NamedTuple):
    """Bytes and FLOPs of one training step.

    Attributes
    ----------
    weights : int
        The model's parameters and its other state, as they are held.
    gradients, moments : int
        Of what is trained, and what the optimizer remembers.
    activations : int
        Kept for the backward pass when the forward pass is done: what `engine.ledger` says of the real loss.
    scratch : int
        What the moment that needs most has on top: gradients of activations, temporary arrays.
    forward, backward : Flops
    at : str
        The operation that ran in that moment; "" if none did.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    scratch: int
    forward: Flops
    backward: Flops
    at: str

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return sum(self[:5])


def rehearse(model: Module, example: Example, *, loss: Loss | None = None, optimizer: Any = optim.Adam,
             max_norm: float | None = None) -> Step:
    """Tell what a training step of a model takes. The model stays as it is, and none of its numbers is read.

    Parameters
    ----------
    model : Module
        What is trained in it is what requires a gradient. It may be without numbers: `nn.undrawn`, `models.outline`.
    example : dict, tuple or array
        Arguments of the model, as host arrays: only their shapes, and integers, count. Models of `minilora.models` make one:
        ``model.example(rows, length)``.
    loss : callable, optional
        From the model and the example to the loss; by default what the model returns, or its mean if that is no number.
    optimizer : callable
        From the parameters to an optimizer; by default Adam.
    max_norm : float, optional
        Clip the gradients.

    Returns
    -------
    Step

    Raises
    ------
    DeviceError
        If what the model computes depends on the numbers.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.nn.Linear(1000, 500)
    >>> step = rehearse(layer, numpy.zeros((8, 1000), "float32"))
    >>> step.weights, step.activations, step.forward.weights
    (2002000, 32000, 8000000)
    """
    with metered():
        return step_of(hollowed(model), example, loss=loss, optimizer=optimizer, max_norm=max_norm)


def hollowed(model: Module) -> Module:
    """A copy of a model without numbers, on the hollow device. What is stored in low precision stays so, tied weights tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.data
        memo[id(data)] = without_numbers(data)
    return copy.deepcopy(model, memo).to("hollow")


def without_numbers(data: Any) -> Any:
    """An array, or what is stored, without its numbers."""
    if not isinstance(data, Stored):
        return Hollow.like(data)
    if data.base is not None and not data.arrays():
        return data
    return data.with_arrays({name: Hollow.like(array) for name, array in data.arrays().items()})


def step_of(model: Module, example: Example, *, adapters: Iterable[Parameter] = (), loss: Loss | None = None,
            optimizer: Any = optim.Adam, max_norm: float | None = None) -> Step:
    """`rehearse` for a model that is without numbers already, within `metered`."""
    meter = current()
    with backend.use("hollow"), recording():
        model.train()
        made = optimizer(_by_dtype(model))
        given = _beside(example)
        _tell_roles(model, set(map(id, adapters)))
        meter.peak, meter.at_peak, meter.flops = meter.live, "", {}
        value = (loss or loss_of)(model, given)
        if value.size != 1:
            raise ShapeError(f"rehearse: expected a loss, got shape {value.shape}: reduce it, for instance with .mean()")
        forward, kept = _flops(meter), ledger(value).nbytes
        made.zero_grad()
        value.backward()
        backward = _flops(meter)
        if max_norm is not None:
            made.clip_grad_norm(max_norm)
        made.step()
    weights = _weights(model, made)
    gradients = sum(group.grad.nbytes for group in made.groups)
    moments = sum(array.nbytes for group in made.groups for array in group.state.values())
    return Step(weights, gradients, moments, kept, meter.peak - weights - gradients - moments - kept, forward, backward,
                meter.at_peak)


def loss_of(model: Module, example: Example) -> Tensor:
    """What the model returns for an example, or its mean if that is no number."""
    if isinstance(example, Mapping):
        y = model(**example)
    else:
        y = model(*example) if isinstance(example, tuple) else model(example)
    return y if y.size == 1 else y.mean()  # type: ignore[no-any-return]


def _by_dtype(model: Module) -> list[dict[str, Any]]:
    trained: dict[str, list[Parameter]] = {}
    for parameter in model.parameters():
        if parameter.trainable:
            trained.setdefault(parameter.dtype.name, []).append(parameter)
    return [{"params": group} for group in trained.values()]


def _beside(example: Any) -> Any:
    """Floating-point numbers of an example without numbers; integers as they are: on the host, where they are checked."""
    if isinstance(example, Mapping):
        return {name: _beside(value) for name, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(_beside, example))
    data = example.data if isinstance(example, Tensor) else example
    if getattr(getattr(data, "dtype", None), "kind", "") != "f":
        return backend.to_host(data) if hasattr(data, "dtype") else data
    return Tensor(Hollow.like(data))


def _tell_roles(model: Module, adapters: set[int]) -> None:
    for parameter in model.parameters():
        data, role = parameter.data, "adapters" if id(parameter) in adapters else "weights"
        for array in data.arrays().values() if isinstance(data, Stored) else (data,):
            array.role = role


def _flops(meter: Meter) -> Flops:
    found = dict.fromkeys(Flops._fields, 0)
    for (_, kind), n in meter.flops.items():
        found[kind] += n
    meter.flops = {}
    return Flops(**found)


def _weights(model: Module, optimizer: Any) -> int:
    held: dict[int, int] = {}
    arrays = [array for p in model.parameters() if not p.trainable
              for array in (p.data.arrays().values() if isinstance(p.data, Stored) else (p.data,))]
    arrays += [value for _, value in model.named_state() if isinstance(value, Hollow)]
    for array in arrays:
        held[id(array.memory)] = array.memory.nbytes
    return sum(held.values()) + sum(int(group.data.nbytes) for group in optimizer.groups)
