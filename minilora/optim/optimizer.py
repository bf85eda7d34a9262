"""The base of the optimizers: what they share is a loop over groups, and strictness."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy

from .. import backend, replay
from ..errors import ConfigError, DTypeError, StateDictError, StateError
from ..tensor import Parameter
from .group import Group, Run

__all__ = ["Optimizer", "check_range"]

Array = Any


class Optimizer:
    """Base class: holds groups of parameters, and updates those that have a gradient.

    A subclass names what it remembers in `state_names`, checks its settings, and defines `update`.

    Parameters
    ----------
    params : iterable of Parameter or (str, Parameter), or list of dict
        Frozen ones are left out. A dict ``{"params": ..., "lr": ...}`` makes a group with settings of its own. With names, as
        from ``model.named_parameters()``, these are part of the state, and a state in another order is refused.
    **settings
        Hyper-parameters, the defaults of every group.

    Attributes
    ----------
    groups : list of Group
        ``optimizer.groups[0].settings["lr"]`` may be changed between steps.

    Raises
    ------
    ConfigError
        If there is no trainable parameter, one is given twice, or a setting is out of range.
    DTypeError
        If something else than a Parameter is given, or the parameters of a group differ in dtype.
    """

    state_names: tuple[str, ...] = ()
    fresh: frozenset[str] = frozenset()  # settings that `update` reads anew at every replay of a recorded step

    def __init__(self, params: Iterable[Parameter] | Iterable[dict[str, Any]], **settings: Any) -> None:
        name = type(self).__name__
        specs = _specs(name, params)
        seen: set[int] = set()
        chosen: list[tuple[list[tuple[str | None, Parameter]], dict[str, Any]]] = []
        for spec in specs:
            members = [(label, p) for label, p in spec.pop("params") if p.trainable]
            unknown = sorted(set(spec) - set(settings))
            if unknown:
                raise ConfigError(f"{name}: unknown settings {unknown} in a group: expected some of {sorted(settings)}")
            for _, p in members:
                if id(p) in seen:
                    raise ConfigError(f"{name}: a parameter of shape {p.shape} was given twice: "
                                      "it would be updated twice a step")
                seen.add(id(p))
            checked = self.check_settings({**settings, **spec})
            if members:
                chosen.append((members, checked))
        if not chosen:
            raise ConfigError(f"{name}: no trainable parameter was given: nothing would ever train. Is the whole model frozen? "
                              "Pass model.parameters()")
        for members, _ in chosen:
            Group.check([p for _, p in members])
        self.groups = [Group([p for _, p in members], checked, self.state_names, [label for label, _ in members])
                       for members, checked in chosen]

    def __repr__(self) -> str:
        lines = []
        for group in self.groups:
            settings = ", ".join(f"{key}={value!r}" for key, value in group.settings.items())
            lines.append(f"{settings}; {len(group.parameters)} parameters, {group.data.size:,} numbers")
        text = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines) + "\n"
        return f"{type(self).__name__}({text})"

    @property
    def param_groups(self) -> NoReturn:
        """Not here: PyTorch's name for `groups`, which hold their settings in a dict of their own."""
        raise AttributeError(f"{type(self).__name__} has no param_groups: its groups are optimizer.groups, and a learning "
                             "rate is optimizer.groups[0].settings['lr']")

    def check_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as Python floats, which promote no array; `ConfigError` for one outside its range."""
        return {"lr": check_range("lr", settings["lr"], 0.0)}

    def update(self, group: Group, run: Run) -> None:
        """Write one run's new values into ``group.data[run.start:run.stop]``; the rule, defined by the subclass."""
        raise TypeError(f"{type(self).__name__} has no update: define update(self, group, run) in the subclass")

    def step(self) -> None:
        """Update every parameter that has a gradient; one without is left alone, its moments too.

        Raises
        ------
        StateError
            If no parameter has a gradient, or a parameter's array was replaced since the optimizer was made. After either
            nothing has changed.
        """
        for group in self.groups:
            group.check_arrays()
        runs = [(group, run) for group in self.groups for run in group.runs()]
        if not runs:
            self._refuse(f"{type(self).__name__}.step()")
        if replay.current() is not None:
            replay.expect("the groups of an optimizer", lambda: tuple(self.groups))
            for group in self.groups:
                group.record(self.fresh)
        for group, run in runs:
            self.update(group, run)

    def _refuse(self, where: str) -> NoReturn:
        """No parameter has a gradient: say why that may be."""
        if not any(p.trainable for group in self.groups for p in group.parameters):
            raise StateError(f"{where}: no parameter has a gradient: all that this optimizer was given have been frozen since, "
                             "by requires_grad(False) or by adapters that train in their place. Make the optimizer again, "
                             f"after that: optimizer = {type(self).__name__}(model.parameters(), ...)")
        raise StateError(f"{where}: no parameter has a gradient: call loss.backward() first, and check that the loss depends "
                         "on the parameters given to the optimizer")

    def zero_grad(self) -> None:
        """Forget all gradients. Writes nothing: the next backward overwrites the flat array."""
        for group in self.groups:
            for p in group.parameters:
                replay.left_gradient(p)
                p.gathered = None

    def clip_grad_norm(self, max_norm: float) -> Array:
        """Scale all gradients together so that their global norm is at most `max_norm`.

        Returns
        -------
        array, shape ()
            The norm before, on the device: reading it is a sync point, this call is not. It is NaN or inf if a gradient
            is; then the gradients become NaN or 0.

        Raises
        ------
        ConfigError
            If `max_norm` is not a finite number above 0.
        StateError
            If no parameter has a gradient.
        """
        max_norm = check_range("max_norm", max_norm, 0.0, open_below=True)
        gradients = [g for group in self.groups for g in group.found()]
        if not gradients:
            self._refuse("clip_grad_norm")
        xp = self.groups[0].parameters[0].device.xp
        total: Array = 0.0
        for g in gradients:
            total = total + (g * g).sum()
        norm = xp.sqrt(xp.asarray(total))
        factor = xp.minimum(max_norm / xp.maximum(norm, 1e-30), 1.0)  # no `if`: it would wait for the GPU
        for g in gradients:
            g *= factor
        return norm

    def state_dict(self) -> dict[str, Any]:
        """A copy of settings, step numbers and moments on the host: with the parameters, all that a resume needs.

        The parameters' shapes, and their names if they were given, say to whom the moments belong.
        """
        return {"groups": [{
            "settings": dict(group.settings),
            "steps": list(group.steps),
            "shapes": group.shapes,
            "names": list(group.names),
            "state": {name: numpy.array(backend.to_host(array)) for name, array in group.state.items()},
        } for group in self.groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, all of it or nothing.

        Raises
        ------
        StateDictError
            If groups, parameters, their shapes or names, or dtypes differ.
        ConfigError
            If a setting is out of range.
        """
        name = type(self).__name__
        groups = state.get("groups") if isinstance(state, Mapping) else None
        if not isinstance(groups, list) or len(groups) != len(self.groups):
            raise StateDictError(f"{name}: expected a state dict with a list of {len(self.groups)} groups under 'groups'")
        problems = [f"group {i}: {line}" for i, group in enumerate(self.groups) for line in group.misfits(groups[i])]
        if problems:
            raise StateDictError(f"{name}: state dict does not fit; nothing was loaded:\n  " + "\n  ".join(problems))
        checked = [self.check_settings(new["settings"]) for new in groups]
        for group, settings, new in zip(self.groups, checked, groups):
            group.settings.update(settings)
            group.steps[:] = new["steps"]
            for key, array in group.state.items():
                array[...] = backend.to_device(numpy.asarray(new["state"][key]), backend.device_of(array))


def _specs(name: str, params: Any) -> list[dict[str, Any]]:
    """The groups given to an optimizer, as dicts with a list of (name or None, parameter) under 'params'."""
    if isinstance(params, Parameter) or not isinstance(params, Iterable):
        raise DTypeError(f"{name}: expected an iterable of parameters, got {type(params).__name__}: pass model.parameters(), "
                         "or [parameter]")
    given = list(params)
    specs = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for spec in specs:
        if "params" not in spec:
            raise ConfigError(f"{name}: a group needs its parameters under 'params', got the keys {sorted(spec)}")
        spec["params"] = [p if isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) else (None, p)
                          for p in spec["params"]]
        wrong = sorted({type(p).__name__ for _, p in spec["params"] if not isinstance(p, Parameter)})
        if wrong:
            raise DTypeError(f"{name}: expected parameters, got {', '.join(wrong)}: pass model.parameters(); "
                             "only a minilora.Parameter can be trained")
    return specs


def check_range(name: str, value: Any, low: float, high: float = float("inf"), open_below: bool = False) -> float:
    """`value` as a Python float; `ConfigError` unless it is a number, NumPy's too, and low <= value < high.

    With `open_below`, low < value.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (low < value if open_below else low <= value) or not value < high:
        raise ConfigError(f"{name} must be a number in {'(' if open_below else '['}{low:g}, {high:g}), got {value!r}")
    return float(value)
