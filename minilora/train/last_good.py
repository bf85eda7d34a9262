"""What a step may spoil, as it was before: so that a run that diverges leaves a model that it has not spoilt."""

from __future__ import annotations

from typing import Any

from ..nn.module import Module
from ..nn.state import state_names
from ..optim.optimizer import Optimizer
from ..tensor import Tensor

__all__ = ["LastGood"]


class LastGood:
    """The trained weights, and the other state of modules, as they were when they were good.

    Costs as much memory as what is trained, and in every step one pass over these numbers to copy them and one to look at them:
    of an adapter next to nothing, and less than the optimizer's own pass where a whole model is trained.

    Parameters
    ----------
    model : Module
    optimizer : Optimizer
        Its flat arrays are what is copied.
    """

    def __init__(self, model: Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.xp = optimizer.groups[0].parameters[0].device.xp
        self.weights = [group.data.copy() for group in optimizer.groups]
        self.places = list({(id(module), name): (module, name) for _, module in model.named_modules()
                            for name in state_names(module)}.values())
        self.state = [copied(getattr(module, name)) for module, name in self.places]

    def keep(self) -> None:
        """Take what is there now as good."""
        for kept, group in zip(self.weights, self.optimizer.groups):
            kept[...] = group.data
        self.state = [copied(getattr(module, name)) for module, name in self.places]

    def finite(self) -> Any:
        """Whether all trained weights are finite now: an array () on their device."""
        answers = [self.xp.isfinite(group.data).all() for group in self.optimizer.groups]
        answer = answers[0]
        for other in answers[1:]:
            answer = answer & other
        return answer

    def give_back_state(self) -> None:
        """Put back what modules keep beside their weights, such as the counters of dropout: the next masks are the same."""
        for (module, name), value in zip(self.places, self.state):
            setattr(module, name, copied(value))

    def give_back(self) -> None:
        """Put everything back as it was when it was kept."""
        self.give_back_state()
        for kept, group in zip(self.weights, self.optimizer.groups):
            group.data[...] = kept
            for parameter in group.parameters:
                parameter.version += 1


def copied(value: Any) -> Any:
    """A copy of an array that may be written to; numbers, which cannot, as they are."""
    if isinstance(value, Tensor):
        return Tensor(value.data.copy())
    return value.copy() if getattr(value, "shape", ()) else value
