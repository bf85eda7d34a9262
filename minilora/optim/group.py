"""Parameters as views of one flat array, so that zeroing, clipping and a step are one pass over memory each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy

from ..errors import DeviceError, DTypeError, ShapeError, StateError
from ..tensor import Parameter

__all__ = ["Group", "Run"]

Array = Any


class Run(NamedTuple):
    """Neighbouring parameters that are updated together: their step number and their range in the flat array."""

    step: int
    start: int
    stop: int


class Group:
    """Trainable parameters that share settings, laid out in one flat array; each parameter's data becomes a view of it.

    Attributes
    ----------
    parameters : list of Parameter
    settings : dict
        Hyper-parameters of this group, such as ``"lr"``; may be changed between steps.
    data, grad : array, shape (total,)
        All parameters, and all gradients.
    state : dict of str to array, shape (total,)
        What the rule remembers, such as Adam's moments.
    steps : list of int
        How many updates each parameter has had.
    """

    def __init__(self, parameters: list[Parameter], settings: dict[str, Any], state_names: tuple[str, ...]) -> None:
        self.parameters = parameters
        self.settings = settings
        xp, dtype = parameters[0].device.xp, parameters[0].dtype
        total = sum(p.size for p in parameters)
        # One allocation for all: NumPy asks for huge pages from 4 MB on. Measured with a million numbers: the product that
        # writes the gradient is 2 to 4 % faster, Adam itself is not. Rows begin at multiples of 16 elements: cache lines.
        storage = xp.zeros((2 + len(state_names), -(-total // 16) * 16), dtype=dtype)[:, :total]
        self.data, self.grad = storage[0], storage[1]
        self.state = {name: storage[2 + i] for i, name in enumerate(state_names)}
        self.steps = [0] * len(parameters)
        self._ranges: list[tuple[int, int]] = []
        self._views: list[Array] = []
        start = 0
        for p in parameters:
            stop = start + p.size
            view, room = self.data[start:stop].reshape(p.shape), self.grad[start:stop].reshape(p.shape)
            view[...] = p.data
            if p.grad is not None:
                room[...] = p.grad
                p.grad = room
            p.data, p.room = view, room
            self._views.append(view)
            self._ranges.append((start, stop))
            start = stop

    @staticmethod
    def check(parameters: list[Parameter]) -> None:
        """Raise unless the parameters can share one flat array."""
        first = parameters[0]
        for p in parameters:
            if p.device is not first.device:
                raise DeviceError(f"optimizer: parameters on two devices, {first.device.name} and {p.device.name}: move the "
                                  "model with model.to(device) first, or use one group for each device")
            if p.dtype != first.dtype:
                raise DTypeError(f"optimizer: parameters of two dtypes, {first.dtype} and {p.dtype}: put them into separate "
                                 'groups, [{"params": ...}, {"params": ...}]')

    def check_gradients(self) -> None:
        """Raise if a parameter's array was replaced, or a gradient that somebody assigned does not fit."""
        for p, view in zip(self.parameters, self._views):
            if p.data is not view:
                raise StateError("optimizer: a parameter's array was replaced after the optimizer was made (by model.to, by a "
                                 "second optimizer, or by assignment): make the optimizer last")
            if p.grad is None or p.grad is p.room:
                continue
            if type(p.grad) is not type(view) or p.grad.dtype != view.dtype:
                raise DTypeError(f"optimizer: expected a gradient {view.dtype} on the {p.device.name} like its parameter, got "
                                 f"{type(p.grad).__name__} {getattr(p.grad, 'dtype', '')}")
            if p.grad.shape != view.shape:
                raise ShapeError(f"optimizer: expected a gradient of shape {view.shape}, got {p.grad.shape}")

    def runs(self) -> Iterator[Run]:
        """Count a step of every parameter that has a gradient, and give the ranges to update.

        Neighbours with the same step number come as one range: usually there is one range in all.
        """
        run: Run | None = None
        for i, (p, (start, stop)) in enumerate(zip(self.parameters, self._ranges)):
            if p.grad is None:
                continue
            if p.grad is not p.room:  # assigned by somebody, not gathered by a backward pass
                self.grad[start:stop] = p.grad.reshape(-1)
            self.steps[i] += 1
            if run is not None and run.stop == start and run.step == self.steps[i]:
                run = run._replace(stop=stop)
                continue
            if run is not None:
                yield run
            run = Run(self.steps[i], start, stop)
        if run is not None:
            yield run

    def misfits(self, new: Any) -> list[str]:
        """Why a group of a state dict does not fit this one: a line for each reason, none if it does."""
        kinds = {"settings": dict, "steps": list, "state": dict}
        if not isinstance(new, dict) or {key: type(value) for key, value in new.items()} != kinds:
            return ["expected a dict with the keys 'settings' (a dict), 'steps' (a list) and 'state' (a dict)"]
        lines = []
        for key, own in (("settings", self.settings), ("state", self.state)):
            if set(new[key]) != set(own):
                lines.append(f"{key}: expected the keys {sorted(own)}, got {sorted(new[key])}")
        if len(new["steps"]) != len(self.steps) or not all(type(n) is int and n >= 0 for n in new["steps"]):
            lines.append(f"steps: expected {len(self.steps)} counts, one for each parameter, got {new['steps']}")
        for name, array in self.state.items():
            got = numpy.asarray(new["state"].get(name))
            if got.shape != array.shape or got.dtype != array.dtype:
                lines.append(f"{name}: expected {array.dtype} {array.shape}, got {got.dtype} {got.shape}")
        return lines
