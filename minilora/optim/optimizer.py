"""The base of the optimizers: parameters as views of one flat array, so that a step is one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy

from .. import backend
from ..errors import ConfigError, DeviceError, DTypeError, ShapeError, StateDictError, StateError
from ..tensor import Parameter

__all__ = ["Group", "Optimizer", "Run"]

Array = Any


class Run(NamedTuple):
    """Neighbouring parameters of a group that are updated together: their step number and their range in the flat array."""

    step: int
    start: int
    stop: int


class Group:
    """Trainable parameters that share settings, laid out in one flat array; each parameter's data becomes a view of it.

    Attributes
    ----------
    parameters : list of Parameter
    settings : dict
        Hyper-parameters of this group (``"lr"`` and so on); may be changed between steps.
    data, grad : array, shape (total,)
        All parameters, and all gradients.
    state : dict of str to array, shape (total,)
        What the rule remembers, such as Adam's moments.
    steps : list of int
        How many updates each parameter has had.
    """

    def __init__(self, parameters: list[Parameter], settings: dict[str, Any], state_names: tuple[str, ...]) -> None:
        first = parameters[0]
        for p in parameters:
            if p.device is not first.device:
                raise DeviceError(f"optimizer: parameters on two devices, {first.device.name} and {p.device.name}: "
                                  "move the model first, or use one group for each device")
            if p.dtype != first.dtype:
                raise DTypeError(f"optimizer: parameters of two dtypes, {first.dtype} and {p.dtype}: "
                                 "put them into separate groups")
        xp = first.device.xp
        total = sum(p.size for p in parameters)
        self.parameters = parameters
        self.settings = settings
        self.data = xp.empty(total, dtype=first.dtype)
        self.grad = xp.zeros(total, dtype=first.dtype)
        self.state = {name: xp.zeros(total, dtype=first.dtype) for name in state_names}
        self.steps = [0] * len(parameters)
        self._ends: list[int] = []
        self._views: list[Array] = []
        start = 0
        for p in parameters:
            stop = start + p.size
            view = self.data[start:stop].reshape(p.shape)
            view[...] = p.data
            room = self.grad[start:stop].reshape(p.shape)
            if p.grad is not None:
                room[...] = p.grad
                p.grad = room
            p.data, p.room = view, room
            self._views.append(view)
            self._ends.append(stop)
            start = stop

    def runs(self) -> Iterator[Run]:
        """The ranges to update: neighbours that have a gradient and the same step number, joined. Usually one range."""
        self._check_views()
        start, open_run = 0, None
        for i, (p, stop) in enumerate(zip(self.parameters, self._ends)):
            if p.grad is not None:
                self._collect(p, start, stop)
                self.steps[i] += 1
                if open_run and open_run.stop == start and open_run.step == self.steps[i]:
                    open_run = open_run._replace(stop=stop)
                else:
                    if open_run:
                        yield open_run
                    open_run = Run(self.steps[i], start, stop)
            start = stop
        if open_run:
            yield open_run

    def _check_views(self) -> None:
        for p, view in zip(self.parameters, self._views):
            if p.data is not view:
                raise StateError("optimizer: a parameter's array was replaced after the optimizer was made (by model.to, by a "
                                 "second optimizer, or by assignment): make the optimizer last")

    def _collect(self, p: Parameter, start: int, stop: int) -> None:
        if p.grad is not p.room:  # somebody assigned a gradient of their own
            if p.grad is None or p.grad.shape != p.shape:
                raise ShapeError(f"optimizer: expected a gradient of shape {p.shape}, got {getattr(p.grad, 'shape', None)}")
            self.grad[start:stop] = p.grad.reshape(-1)


class Optimizer:
    """Base class: holds groups of parameters, and updates those that have a gradient.

    A subclass names what it remembers in `state_names` and defines `update`.

    Parameters
    ----------
    parameters : iterable of Parameter, or list of dict
        Frozen ones are left out. A dict ``{"parameters": ..., "lr": ...}`` makes a group with settings of its own.
    **settings
        Hyper-parameters, the defaults of every group.

    Raises
    ------
    ConfigError
        If there is no trainable parameter, or one is given twice.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, parameters: Iterable[Parameter] | Iterable[dict[str, Any]], **settings: Any) -> None:
        given = list(parameters)
        specs = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"parameters": given}]
        seen: set[int] = set()
        chosen: list[tuple[list[Parameter], dict[str, Any]]] = []
        for spec in specs:
            members = [p for p in spec.pop("parameters") if p.trainable]
            unknown = sorted(set(spec) - set(settings))
            if unknown:
                raise ConfigError(f"{type(self).__name__}: unknown settings {unknown} in a group: expected {sorted(settings)}")
            for p in members:
                if id(p) in seen:
                    raise ConfigError(f"{type(self).__name__}: a parameter of shape {p.shape} was given twice: "
                                      "it would be updated twice a step")
                seen.add(id(p))
            if members:
                chosen.append((members, {**settings, **spec}))
        if not chosen:
            raise ConfigError(f"{type(self).__name__}: no trainable parameter among {len(given)} given: nothing would ever "
                              "train. Is the whole model frozen? Pass model.parameters()")
        for _, merged in chosen:
            self.check_settings(merged)
        self.groups = [Group(members, merged, self.state_names) for members, merged in chosen]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for a setting outside its range."""
        check_range("lr", settings["lr"], 0.0)

    def update(self, group: Group, run: Run) -> None:
        """Write one run's new values into ``group.data[run.start:run.stop]``; the rule, defined by the subclass."""
        raise TypeError(f"{type(self).__name__} has no update: define update(self, group, run) in the subclass")

    def step(self) -> None:
        """Update every parameter that has a gradient; one without is left alone, its moments too.

        Raises
        ------
        StateError
            If no parameter has a gradient, or a parameter's array was replaced since the optimizer was made.
        """
        updated = False
        for group in self.groups:
            for run in group.runs():
                self.update(group, run)
                updated = True
        if not updated:
            raise StateError(f"{type(self).__name__}.step(): no parameter has a gradient: call loss.backward() first, and "
                             "check that the loss depends on the parameters given to the optimizer")

    def zero_grad(self) -> None:
        """Forget all gradients. Writes nothing: the next backward overwrites the flat array."""
        for group in self.groups:
            for p in group.parameters:
                p.grad = None

    def clip_grad_norm(self, max_norm: float) -> Array:
        """Scale all gradients together so that their global norm is at most `max_norm`.

        Returns
        -------
        array, shape ()
            The norm before, on the device: reading it is a sync point, this call is not. NaN or inf if a gradient is:
            then the gradients become NaN or 0, so check it where that can happen.

        Raises
        ------
        ConfigError
            If `max_norm` is not a finite number above 0.
        """
        check_range("max_norm", max_norm, 0.0, open_below=True)
        gradients = [p.grad for group in self.groups for p in group.parameters if p.grad is not None]
        if not gradients:
            raise StateError("clip_grad_norm: no parameter has a gradient: call loss.backward() first")
        xp = self.groups[0].parameters[0].device.xp
        total = sum((g * g).sum() for g in gradients)
        norm = xp.sqrt(xp.asarray(total))
        factor = xp.minimum(max_norm / xp.maximum(norm, 1e-6), 1.0)  # no `if`: it would wait for the GPU
        for g in gradients:
            g *= factor
        return norm

    def state_dict(self) -> dict[str, Any]:
        """A copy of settings, step numbers and moments on the host: with the parameters, all that a resume needs."""
        return {"groups": [{
            "settings": dict(group.settings),
            "steps": list(group.steps),
            "state": {name: numpy.array(backend.to_host(array)) for name, array in group.state.items()},
        } for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, all of it or nothing.

        Raises
        ------
        StateDictError
            If groups, parameters, sizes or dtypes differ.
        """
        groups = state.get("groups")
        problems = []
        if not isinstance(groups, list) or len(groups) != len(self.groups):
            raise StateDictError(f"{type(self).__name__}: expected a state dict with {len(self.groups)} groups under 'groups'")
        for i, (group, new) in enumerate(zip(self.groups, groups)):
            if set(new["settings"]) != set(group.settings):
                problems.append(f"group {i}: settings {sorted(new['settings'])}, expected {sorted(group.settings)}")
            if len(new["steps"]) != len(group.steps):
                problems.append(f"group {i}: {len(new['steps'])} parameters, expected {len(group.steps)}")
            if set(new["state"]) != set(group.state):
                problems.append(f"group {i}: state {sorted(new['state'])}, expected {sorted(group.state)}")
                continue
            for name, array in group.state.items():
                got = numpy.asarray(new["state"][name])
                if got.shape != array.shape or got.dtype != array.dtype:
                    problems.append(f"group {i}: {name} {got.dtype} {got.shape}, expected {array.dtype} {array.shape}")
        if problems:
            raise StateDictError(f"{type(self).__name__}: state dict does not fit; nothing was loaded:\n  " + "\n  ".join(problems))
        for group, new in zip(self.groups, groups):
            group.settings.update(new["settings"])
            group.steps[:] = new["steps"]
            for name, array in group.state.items():
                array[...] = backend.to_device(numpy.asarray(new["state"][name]), backend.device_of(array))


def check_range(name: str, value: Any, low: float, high: float = float("inf"), open_below: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a number with low <= value < high (low < value if `open_below`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value if open_below else low <= value) or not value < high:
        bracket = "(" if open_below else "["
        raise ConfigError(f"{name} must be a number in {bracket}{low:g}, {high:g}), got {value!r}")
