"""What modules keep beside their weights, in several processes: counters of dropout, and what else they count or average.

A mask of dropout is a function of a seed, a counter and the place in the array. All processes hold the same seeds and counters;
each draws with its own rank mixed into the seed (`parts.seed_here`): different masks in each process, the same ones in every
run, and in rank 0 those that a process by itself would draw. Counters that have fallen behind in a process without rows are
brought level after each update, without a message.

All other state, such as a running mean, becomes that of rank 0 after each update: one more message, for models that have any.

So a checkpoint, which rank 0 writes, is that of every rank, and a run that is resumed in as many processes goes on to the bit.
In another number of processes, which a resume asks to be permitted, it goes on just as well, but with other masks: rows are
shared out differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy

from ... import parts
from ...nn import Dropout
from ...nn.module import Module
from ...nn.state import as_host, as_kept, state_names
from .comm import Comm

__all__ = ["KeptAlike"]


class KeptAlike:
    """The state of a model's modules, which several processes train.

    Parameters
    ----------
    model : Module
    comm : Comm
    """

    def __init__(self, model: Module, comm: Comm) -> None:
        self.comm = comm
        modules = [module for _, module in model.named_modules()] if comm.size > 1 else []  # alone there is nobody to be like
        self.dropouts = [module for module in modules if isinstance(module, Dropout) and module.p]
        self.places = [(module, name) for module in modules if not isinstance(module, Dropout) for name in state_names(module)
                       if getattr(module, name) is not None]

    def drawing(self) -> AbstractContextManager[None]:
        """The context in which this process draws its masks."""
        return parts.in_process(self.comm.rank)

    def level(self) -> None:
        """Make the state of all processes the same; between two updates."""
        for dropout in self.dropouts:
            parts.level(dropout)
        if not self.places:
            return
        values = [getattr(module, name) for module, name in self.places]
        hosts = [as_host(value) for value in values]
        data = b"".join(host.tobytes() for host in hosts)
        message = numpy.frombuffer(data + bytes(-len(data) % 8), dtype=numpy.int64).copy()
        self.comm.broadcast_(message)
        start = 0
        for (module, name), value, host in zip(self.places, values, hosts):
            given = message.view(numpy.uint8)[start:start + host.nbytes].view(host.dtype).reshape(host.shape)
            setattr(module, name, as_kept(value, given))
            start += host.nbytes
