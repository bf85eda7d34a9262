"""Parameters as views of one flat array, so that zeroing, clipping and a step are one pass over memory each."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from .. import replay
from ..errors import DeviceError, DTypeError, ShapeError, StateError
from ..stored import Stored
from ..tensor import Parameter

__all__ = ["Group", "Run"]

Array = Any


class Run(NamedTuple):
    """Neighbouring parameters that are updated together: their step, their range in the flat array, the number of the first."""

    step: int
    start: int
    stop: int
    first: int


class Group:
    """Trainable parameters that share settings, laid out in one flat array; each parameter's data becomes a view of it.

    A copy (copy.deepcopy, or another process) holds copies of the parameters, laid out in a flat array of their own; as the
    copies of parameters do, they start without gradients.

    Attributes
    ----------
    parameters : list of Parameter
    names : list of str or None
        What they are called, where that was given.
    settings : dict
        Hyper-parameters of this group, such as ``"lr"``; may be changed between steps.
    data, grad : array, shape (total,)
        All parameters, and all gradients; the latter, which are sums, in float32 beside parameters of less.
    state : dict of str to array, shape (total,)
        What the rule remembers, such as Adam's moments; likewise.
    steps : list of int
        How many updates each parameter has had.
    """

    def __init__(self, parameters: list[Parameter], settings: dict[str, Any], state_names: Sequence[str],
                 names: Sequence[str | None] | None = None) -> None:
        self.parameters = parameters
        self.names: list[str | None] = [None] * len(parameters) if names is None else list(names)
        self.settings = settings
        xp, dtype = parameters[0].device.xp, parameters[0].dtype
        total = sum(p.size for p in parameters)
        # One allocation for all of a dtype: NumPy asks for huge pages from 4 MB on. Measured with a million numbers: the
        # product that writes the gradient is 2 to 4 % faster, Adam itself is not. Rows begin at multiples of 16 elements:
        # cache lines.
        dtypes = [dtype] + [numpy.promote_types(dtype, "float32")] * (1 + len(state_names))
        rows = [row for each in dict.fromkeys(dtypes)
                for row in xp.zeros((dtypes.count(each), -(-total // 16) * 16), dtype=each)[:, :total]]
        self.data, self.grad = rows[:2]
        self.state = dict(zip(state_names, rows[2:]))
        self.steps = [0] * len(parameters)
        self._ranges: list[tuple[int, int]] = []
        self._views: list[Array] = []
        start = 0
        for p in parameters:
            stop = start + p.size
            view, room = self.data[start:stop].reshape(p.shape), self.grad[start:stop].reshape(p.shape)
            view[...] = p.data
            p.data, p.room = view, room
            self._views.append(view)
            self._ranges.append((start, stop))
            start = stop

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The parameters' shapes, in order: part of the state, since other shapes may have the same total."""
        return [p.shape for p in self.parameters]

    def __reduce__(self) -> Any:
        self.check_arrays()
        return _laid_out_again, (self.parameters, self.settings, self.state, self.steps, self.names)

    def beside(self) -> Group:
        """Another group of the same parameters, settings and state, in arrays of its own, of which the parameters become views.

        This one then no longer fits its parameters, until they have their old arrays back.
        """
        return _laid_out_again(self.parameters, dict(self.settings), self.state, self.steps, self.names)

    @staticmethod
    def check(parameters: list[Parameter]) -> None:
        """Raise unless the parameters can share one flat array."""
        first = parameters[0]
        for p in parameters:
            if isinstance(p.data, Stored):
                raise DTypeError(f"optimizer: a weight held as {p.data.kind} is read only: p.trainable = False, and train an "
                                 "adapter beside it, lora.inject(model, config)")
            if p.device is not first.device:
                raise DeviceError(f"optimizer: parameters on two devices, {first.device.name} and {p.device.name}: move the "
                                  "model with model.to(device) first, or use one group for each device")
            if p.dtype != first.dtype:
                raise DTypeError(f"optimizer: parameters of two dtypes, {first.dtype} and {p.dtype}: put them into separate "
                                 'groups, [{"params": ...}, {"params": ...}]')

    def check_arrays(self) -> None:
        """Raise if a parameter's array was replaced, or a gradient that was assigned before it no longer fits."""
        for p, view in zip(self.parameters, self._views):
            if p.data is not view:
                raise StateError("optimizer: a parameter's array was replaced after the optimizer was made (by model.to, by a "
                                 "second optimizer, or by assignment): make the optimizer last")
            g = p.gathered
            if g is not p.room and g is not None and (g.shape != view.shape or g.dtype not in (view.dtype, self.grad.dtype)):
                raise ShapeError(f"optimizer: a parameter {view.dtype} {view.shape} has a gradient {g.dtype} {g.shape}, of an "
                                 "array that it had before: call optimizer.zero_grad(), and loss.backward() again")

    def part(self, run: Run, flat: Array) -> Array:
        """A run's part of a flat array: usually all of it, and then the array itself, for a slice costs a GPU's host 3 us."""
        return flat if run.stop - run.start == flat.size else flat[run.start:run.stop]

    def widened(self, run: Run) -> tuple[Array, Array]:
        """The data and the gradients of a run in the dtype of the state: the flat arrays themselves, or of data a copy."""
        theta, g = self.part(run, self.data), self.part(run, self.grad)
        return (theta if theta.dtype == g.dtype else theta.astype(g.dtype)), g

    def narrowed(self, run: Run, theta: Array) -> None:
        """Take a run's new data over from what `widened` gave; nothing to do where that was no copy."""
        if theta.dtype != self.data.dtype:
            self.data[run.start:run.stop] = theta.astype(self.data.dtype)

    def collected(self, i: int) -> Array:
        """The gradient of the parameter of this number, which has one, in at least float32."""
        p: Any = self.parameters[i]
        if p.gathered.dtype != self.grad.dtype:  # somebody has read it, or assigned another
            p.room[...] = p.gathered
            p.gathered = p.room
        return p.gathered

    def found(self) -> list[Array]:
        """The gradients that there are, in at least float32."""
        for p in self.parameters:
            replay.found_gradient(p)
        return [self.collected(i) for i, p in enumerate(self.parameters) if p.gathered is not None]

    def gather(self) -> Array:
        """Bring every gradient into the flat array, with zeros for parameters that have none; gives that array."""
        for p, (start, stop) in zip(self.parameters, self._ranges):
            replay.found_gradient(p)
            if p.gathered is None:
                self.grad[start:stop] = 0.0
            elif p.gathered is not p.room:  # somebody has read it, or assigned another
                self.grad[start:stop] = p.gathered.reshape(-1)
                p.gathered = p.room
        return self.grad

    def runs(self) -> Iterator[Run]:
        """Count a step, and a write, of every parameter that has a gradient, and give the ranges to update.

        Neighbours with the same step number come as one range: usually there is one range in all.
        """
        step = begin = end = first = 0  # of the run so far; no parameter is at step 0
        for i, (p, (start, stop)) in enumerate(zip(self.parameters, self._ranges)):
            if p.gathered is None:
                continue
            if p.gathered is not p.room:  # somebody has read it, or assigned another
                self.grad[start:stop] = p.gathered.reshape(-1)
            self.steps[i] += 1
            p.version += 1
            if self.steps[i] != step or start != end:
                if step:
                    yield Run(step, begin, end, first)
                step, begin, first = self.steps[i], start, i
            end = stop
        if step:
            yield Run(step, begin, end, first)

    def record(self, fresh: frozenset[str]) -> None:
        """Tell a recording what the step that was counted just now does at every replay, and what it relies on.

        The arrays must not be replaced, the settings that are not read anew not be changed, and those parameters that were
        updated together have made the same number of steps.
        """
        moved = [i for i, p in enumerate(self.parameters) if p.gathered is not None]
        for p in self.parameters:
            replay.found_gradient(p)

        def count() -> None:
            for i in moved:
                self.steps[i] += 1
                self.parameters[i].version += 1

        replay.repeat(count, lambda: functools.partial(self.steps.__setitem__, slice(None), self.steps[:]))
        recording = replay.current()
        if recording is not None:
            for p in self.parameters:
                recording.reads_parameter(p)
        first = moved[0] if moved else 0
        names = [name for name in self.settings if name not in fresh]

        def relied() -> tuple[Any, ...]:
            settings, steps = self.settings, self.steps
            count = steps[first]
            return *settings, *map(settings.get, names), *[steps[i] - count for i in moved]

        replay.expect("the settings or step numbers of an optimizer", relied)

    def misfits(self, new: Any) -> list[str]:
        """Why a group of a state dict does not fit this one: a line for each reason, none if it does."""
        if isinstance(new, dict) and "shapes" not in new:
            return ["it has no 'shapes' (an early version left them out), so nothing shows whether its moments belong to these "
                    "parameters. If you know they do: state['groups'][i]['shapes'] = optimizer.groups[i].shapes, for each i"]
        kinds = {"settings": dict, "steps": list, "shapes": list, "names": list, "state": dict}
        if not isinstance(new, dict) or {key: type(value) for key, value in {"names": [], **new}.items()} != kinds:
            return ["expected a dict with 'settings' (a dict), 'steps', 'shapes', 'names' (lists) and 'state' (a dict)"]
        lines = []
        for key, own in (("settings", self.settings), ("state", self.state)):
            if set(new[key]) != set(own):
                lines.append(f"{key}: expected the keys {sorted(own)}, got {sorted(new[key])}")
        if len(new["steps"]) != len(self.steps) or not all(type(n) is int and n >= 0 for n in new["steps"]):
            lines.append(f"steps: expected {len(self.steps)} counts, one for each parameter, got {new['steps']}")
        if [tuple(shape) if isinstance(shape, list) else shape for shape in new["shapes"]] != self.shapes:
            lines.append(f"shapes: expected {self.shapes}, in this order, got {new['shapes']}")
        for own_name, name in zip(self.names, new.get("names", [])):
            if own_name is not None and name is not None and own_name != name:
                lines.append(f"names: expected {own_name!r} where {name!r} is: are the parameters in another order?")
        for name, array in self.state.items():
            got = numpy.asarray(new["state"].get(name))
            if got.shape != array.shape or got.dtype != array.dtype:
                lines.append(f"{name}: expected {array.dtype} {array.shape}, got {got.dtype} {got.shape}")
        return lines


def _laid_out_again(parameters: list[Parameter], settings: dict[str, Any], state: dict[str, Array], steps: list[int],
                    names: list[str | None]) -> Group:
    """A copied group, from copies of what it holds: its parameters become views of its own flat array."""
    group = Group(parameters, settings, list(state), names)
    for name, array in state.items():
        group.state[name][...] = array
    group.steps[:] = steps
    return group
