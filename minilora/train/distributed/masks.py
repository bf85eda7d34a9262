"""The masks of dropout in several processes: different ones in each, and the same in every run.

A mask is a function of a seed, a counter and the place in the array. All processes hold the same seeds and counters, and each
draws with its own rank mixed into the seed (`parts.seed_here`); so rank 0 draws what a process by itself would. Counters that
have fallen behind in a process without rows are brought level after each update. A checkpoint, which rank 0 writes, therefore
is that of every rank: a run that is resumed in as many processes draws the masks that it would have drawn. In another number of
processes it goes on just as well, but with other masks: rows are shared out differently.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ... import parts
from ...nn import Dropout
from ...nn.module import Module
from .comm import Comm

__all__ = ["Masks"]


class Masks:
    """The dropout of a model that several processes train.

    Parameters
    ----------
    model : Module
    comm : Comm
    """

    def __init__(self, model: Module, comm: Comm) -> None:
        self.rank = comm.rank
        layers = (module for _, module in model.named_modules() if isinstance(module, Dropout) and module.p)
        self.layers = list(layers) if comm.size > 1 else []  # a process by itself has no other to keep level with

    def drawing(self) -> AbstractContextManager[None]:
        """The context in which this process draws its masks."""
        return parts.in_process(self.rank)

    def level(self) -> None:
        """Bring the counters of all processes to the same number; between two updates."""
        for layer in self.layers:
            parts.level(layer)
