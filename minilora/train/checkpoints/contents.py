"""A run as arrays and plain values, and back.

What is computed from them, such as the order of the data, the rate of a step or the masks of dropout, is no part: it is a
function of the seed and of what is here. So there is no stream of random numbers whose place could be forgotten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend
from ...errors import FormatError, StateError
from ...nn.state import misfit
from ..result import Evaluation
from ..run import Run

__all__ = ["Contents", "capture", "misfits", "put_back", "trained"]

Array = Any
MODEL, STATE, BEST, OPTIMIZER = "model/", "state/", "best/", "optimizer/"
COUNTS = ("step", "tokens", "worse")
ARRAY = "$array"  # in plain values: here is the array of this name


class Contents(NamedTuple):
    """Arrays by name, and plain values: numbers, texts, lists and dicts of them."""

    arrays: Mapping[str, Array]
    values: dict[str, Any]

    def inside(self, room: str) -> dict[str, Array]:
        """The arrays whose names begin so, without that beginning."""
        return {name[len(room):]: self.arrays[name] for name in self.arrays if name.startswith(room)}


def trained(run: Run) -> dict[str, Any]:
    """The parameters of a run that are trained, by path.

    Raises
    ------
    StateError
        If the optimizer trains others, which no checkpoint of the model would hold.
    """
    ours = {id(p) for p in run.model.parameters()}
    others = [p.shape for group in run.optimizer.groups for p in group.parameters if id(p) not in ours]
    if others:
        raise StateError(f"the optimizer trains {len(others)} parameters that are not in the model, of shapes "
                         f"{', '.join(map(str, others[:5]))}: a checkpoint would not hold them. Make them part of the model, "
                         "as an attribute of it or of a module that holds both")
    return {path: p for path, p in run.model.named_parameters() if p.trainable}


def capture(run: Run) -> Contents:
    """All state of a run as it is now. The arrays of parameters and modules are their own, not copies."""
    arrays: dict[str, Array] = {MODEL + path: p.data for path, p in trained(run).items()}
    arrays.update({STATE + path: as_array(value) for path, value in run.model.named_state()})
    arrays.update({BEST + path: value for path, value in (run.best_weights or {}).items()})
    values = {**{name: getattr(run, name) for name in COUNTS}, "since": dict(run.since),
              "optimizer": _taken_apart(run.optimizer.state_dict(), OPTIMIZER, arrays),
              "scheduler": _taken_apart(run.scheduler.state_dict(), "scheduler/", arrays),
              "scaling": None if run.scaling is None else run.scaling.state_dict(),
              "losses": [list(each) for each in run.losses],
              "evaluations": [dataclasses.asdict(each) for each in run.evaluations],
              "best": None if run.best is None else dataclasses.asdict(run.best)}
    return Contents(arrays, values)


def as_array(value: Any) -> Array:
    """State of a module as an array: Python's numbers as those that hold them."""
    value = getattr(value, "data", value) if not isinstance(value, (numpy.ndarray, numpy.generic)) else value
    return value if hasattr(value, "dtype") and not isinstance(value, numpy.generic) else numpy.asarray(value)


def _taken_apart(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """Plain values, with the arrays among them put into `arrays` under names that begin so."""
    if isinstance(value, dict):
        return {key: _taken_apart(each, f"{name}{key}.", arrays) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_taken_apart(each, f"{name}{i}.", arrays) for i, each in enumerate(value)]
    if isinstance(value, numpy.generic):
        return value.item()
    if not hasattr(value, "dtype"):
        return value
    arrays[name.rstrip(".")] = value
    return {ARRAY: name.rstrip(".")}


def _put_together(value: Any, arrays: Mapping[str, Array]) -> Any:
    """What `_taken_apart` was given."""
    if isinstance(value, list):
        return [_put_together(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {ARRAY}:
        if value[ARRAY] not in arrays:
            raise FormatError(f"there is no array {value[ARRAY]!r:.80} in it")
        return arrays[value[ARRAY]]
    return {key: _put_together(each, arrays) for key, each in value.items()}


def misfits(run: Run, saved: Contents) -> list[str]:
    """Why these contents have no place in a run: a line for each array or value, none if they have."""
    lines = []
    places: dict[str, Any] = dict(trained(run))
    places = {MODEL: places, STATE: dict(run.model.named_state())}
    for room, what in ((MODEL, "parameter"), (STATE, "state")):
        own, given = places[room], saved.inside(room)
        lines += [f"{what} {path}: not there, and trained here" if room == MODEL else f"{what} {path}: not there"
                  for path in own.keys() - given.keys()]
        lines += [f"{what} {path}: there, and not here" for path in given.keys() - own.keys()]
        lines += [f"{what} {path}: {wrong}" for path in own if path in given and (wrong := misfit(own[path], given[path]))]
    both = {**places[STATE], **places[MODEL]}
    for path, array in saved.inside(BEST).items():
        wrong = misfit(both[path], array) if path in both else "not here"
        lines += [f"best weights {path}: {wrong}"] if wrong else []
    groups, own_groups = _groups(saved), run.optimizer.groups
    if lines:
        return sorted(lines)  # the optimizer's would say it again
    if len(groups) != len(own_groups):
        lines.append(f"optimizer: {len(groups)} groups there, {len(own_groups)} here")
    lines += [f"optimizer, group {i}: {line}" for i, (own, given) in enumerate(zip(own_groups, groups))
              for line in own.misfits(given)]
    return sorted(lines)


def _groups(saved: Contents) -> list[Any]:
    optimizer = _put_together(saved.values["optimizer"], saved.arrays)
    groups = optimizer.get("groups") if isinstance(optimizer, dict) else None
    return groups if isinstance(groups, list) else []


def put_back(run: Run, saved: Contents) -> None:
    """Take saved contents into a run, all of it or nothing.

    Settings of the optimizer and base rates stay the run's own: `identity` says where they are others than the saved ones.
    """
    progress = _progress(saved.values)
    best = {path: numpy.array(array) for path, array in saved.inside(BEST).items()}
    now, settings = capture(run), [dict(group.settings) for group in run.optimizer.groups]
    before = Contents({name: numpy.array(backend.to_host(array)) for name, array in now.arrays.items()}, now.values)
    try:
        _write(run, saved)
    except BaseException:
        _write(run, before)
        for group, own in zip(run.optimizer.groups, settings):
            group.settings.update(own)
        raise
    run.best_weights = best or None
    for name, value in progress.items():
        setattr(run, name, value)


def _write(run: Run, saved: Contents) -> None:
    run.model.load_state_dict({**saved.inside(STATE), **saved.inside(MODEL)}, strict=False)
    optimizer = _put_together(saved.values["optimizer"], saved.arrays)
    for group, given in zip(run.optimizer.groups, optimizer["groups"]):
        given["settings"] = dict(group.settings)
    run.optimizer.load_state_dict(optimizer)
    count = _put_together(saved.values["scheduler"], saved.arrays)["count"]
    run.scheduler.load_state_dict({**run.scheduler.state_dict(), "count": count})
    if run.scaling is not None and saved.values.get("scaling") is not None:  # that of a run in full precision has none
        run.scaling.load_state_dict(saved.values["scaling"])


def _progress(values: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run was, out of plain values that are checked: they come from a file."""
    try:
        return {**{name: whole(values[name]) for name in COUNTS},
                "since": {name: real(number) for name, number in values["since"].items()},
                "losses": [(whole(step), real(loss)) for step, loss in values["losses"]],
                "evaluations": [evaluation(each) for each in values["evaluations"]],
                "best": None if values["best"] is None else evaluation(values["best"])}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"it does not say how far the run was: {error!r:.100}") from error


def whole(value: Any) -> int:
    """A whole number of a file that is not negative."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, got {value!r:.40}")
    return value


def real(value: Any) -> float:
    """A number of a file."""
    if type(value) not in (int, float):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


def evaluation(fields: Any) -> Evaluation:
    """An evaluation of a file."""
    for value in fields.values():
        if value is not None:
            real(value)
    return Evaluation(**fields)
