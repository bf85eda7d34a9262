"""A training that has not happened: whatever is done in it, all that it touched is as it was before, to the bit.

Nothing is written back, because nothing is written over: what is trained, and the state of modules, are lent as copies, and
frozen weights as views that cannot be written to. In the end each parameter gets its own array back, by reference; so it is
after an error and after Ctrl-C too. On a GPU, where no view is read only, frozen weights are copied to the host and compared.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy

from ... import backend
from ...lora.undo import rehearse
from ...nn.module import Module
from ...nn.state import as_host, state_names
from ...optim.optimizer import Optimizer
from ...stored import Stored
from ...tensor import Parameter
from ..last_good import copied
from ..run import LossFunction

__all__ = ["again", "rehearsed", "same_bits"]

Array = Any
T = TypeVar("T")


class Held(Module):
    """Parameters that may belong to no module: those of an optimizer."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.held = list(parameters)


def rehearsed(work: Callable[[], T], model: Module, loss: LossFunction, optimizer: Any = None) -> T:
    """What `work` gives; model, loss and optimizer are as they were before, also after an error.

    Parameters
    ----------
    work : callable
        Must not write into the optimizer: `again` makes another one like it.
    model : Module
    loss : callable
        Its modules and generators count too, where it is an object that has such.
    optimizer : Optimizer or anything else, optional
    """
    groups = optimizer.groups if isinstance(optimizer, Optimizer) else []
    roots = [model, *modules_in(loss), Held(p for group in groups for p in group.parameters)]
    frozen = [(p, as_host(p)) for p in every(roots) if not (p.trainable or writable_by_nobody(p))]
    generators = [(one, copy.deepcopy(one.bit_generator.state)) for one in generators_in([*vars_of(roots), vars_of_one(loss)])]
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    owned = [(p, p.data) for p, _ in frozen]

    def lent() -> T:
        lend(roots)
        return work()

    try:
        return rehearse(lent, roots)
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        for one, state in generators:
            one.bit_generator.state = state
        for (_, before), (_, array) in zip(frozen, owned):
            if not same_bits(backend.to_host(array), before):
                array[...] = backend.to_device(before, backend.device_of(array))


def again(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same parameters, settings and state; only to be made, and used, within a rehearsal."""
    other = copy.copy(optimizer)
    other.groups = [group.beside() for group in optimizer.groups]
    return other


def lend(roots: Iterable[Module]) -> None:
    """Put copies, or views that cannot be written to, in the place of what the modules hold; without gradients."""
    for p in every(roots):
        p.gathered = p.room = None
        if p.trainable:
            p.data = p.data.copy()
        elif writable_by_nobody(p) and not isinstance(p.data, Stored):
            p.data = p.data.view()
            p.data.flags.writeable = False
    places = {(id(module), name): (module, name) for root in roots for _, module in root.named_modules()
              for name in state_names(module)}
    for module, name in places.values():
        setattr(module, name, copied(getattr(module, name)))


def every(roots: Iterable[Module]) -> list[Parameter]:
    """The parameters of some modules, each once."""
    return list({id(p): p for root in roots for p in root.parameters()}.values())


def writable_by_nobody(p: Parameter) -> bool:
    """Whether a frozen parameter can be lent such that nobody writes into it: on the host, or stored in low precision."""
    return isinstance(p.data, (numpy.ndarray, Stored))


def same_bits(a: Array, b: Array) -> bool:
    """Whether two host arrays are the same, NaN and the sign of zero included."""
    return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())


def modules_in(loss: Any) -> list[Module]:
    """The modules that a loss function is, or that it holds directly."""
    return [value for value in (loss, *vars_of_one(loss).values()) if isinstance(value, Module)]


def vars_of(roots: Iterable[Module]) -> Iterator[Mapping[str, Any]]:
    for root in roots:
        for _, module in root.named_modules():
            yield vars(module)


def vars_of_one(thing: Any) -> Mapping[str, Any]:
    return getattr(thing, "__dict__", {})


def generators_in(holders: Iterable[Mapping[str, Any]]) -> list[numpy.random.Generator]:
    """The generators of random numbers among some attributes, each once."""
    found = {id(value): value for held in holders for value in held.values() if isinstance(value, numpy.random.Generator)}
    return list(found.values())
