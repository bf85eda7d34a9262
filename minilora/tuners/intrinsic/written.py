"""The weights of a model that something else computes: where they began, and what was last written into them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from ... import backend, replay
from ...errors import StateError
from ...nn.state import moved
from ...ops.weights import COMPUTED, put_weights
from ...tensor import Parameter

__all__ = ["Written"]

Array = Any

_writing = threading.Lock()  # of all spaces: it is held for as long as references are exchanged


class Written:
    """Parameters of a model whose arrays are replaced by computed ones. No module looks into it.

    Attributes
    ----------
    paths : list of str
        Of the parameters, in the model.
    parameters : list of Parameter
        Their `trainable` is `COMPUTED`: leaves within the space, frozen for everybody else.
    start : list of Parameter
        What they were, θ0: frozen, and the very arrays that the model had.
    """

    def __init__(self, named: Sequence[tuple[str, Parameter]]) -> None:
        self.paths, self.parameters = [path for path, _ in named], [p for _, p in named]
        self.start = [Parameter(p.data, trainable=False) for p in self.parameters]
        self.arrays: list[Array] = []
        self.of: list[tuple[Array, int]] = []  # of what numbers: arrays and versions
        for p in self.parameters:
            p.trainable = COMPUTED  # type: ignore[assignment]  # true or false by context

    @property
    def size(self) -> int:
        return sum(p.size for p in self.start)

    def instead(self) -> dict[int, Parameter]:
        """θ0 by the identity of the parameter that is written."""
        return {id(p): start for p, start in zip(self.parameters, self.start)}

    def move(self, to: Parameter) -> None:
        """Bring θ0 to the device of another parameter, where a module around the space has moved that alone."""
        if self.start[0].device is not to.device:
            for p in self.start:
                p.data = moved(p, to.device.name, None)

    def up_to_date(self, own: Iterable[Parameter]) -> bool:
        """Whether the model holds what these numbers give.

        Raises
        ------
        StateError
            If they do not, although these numbers are the same: somebody else wrote into the model.
        """
        now = [(p.data, p.version) for p in (*own, *self.start)]
        if len(now) != len(self.of) or not all(a is b and n == m for (a, n), (b, m) in zip(now, self.of)):
            return False
        others = [path for path, p, array in zip(self.paths, self.parameters, self.arrays) if p.data is not array]
        if others:
            raise StateError(f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}: the array was replaced (by "
                             "load_state_dict, to or an assignment on the model inside, or by merging), and a step of the "
                             "subspace would write over it. Call these on the subspace itself; or make the subspace afterwards")
        return True

    def put(self, theta: Array, own: Sequence[Parameter]) -> None:
        """Write θ, computed from these numbers, unless it is there already: so threads that run one model share its arrays.

        While a step is recorded it is always written: a replay computes θ into this very array.
        """
        with _writing:
            if replay.current() is None and self.up_to_date(own):
                return
            self.of = []
            put_weights(theta, self.parameters, [p.dtype for p in self.start])
            self.arrays = [p.data for p in self.parameters]
            self.of = [(p.data, p.version) for p in (*own, *self.start)]
        replay.expect("the weights that a subspace has written", lambda: tuple([p.data for p in self.parameters]))

    def let_go(self) -> None:
        """Make the parameters ordinary ones again, trained as they were, with what is written."""
        for p in self.parameters:
            p.trainable = True
            p.version += 1


def device_names(parameters: Iterable[Parameter]) -> list[str]:
    """The devices that parameters live on, each once."""
    return sorted({backend.device_of(p.data).name for p in parameters})
