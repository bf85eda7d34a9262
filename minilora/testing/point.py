"""A function at one point: evaluated beside it, differentiated at it, and left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy

from .. import backend, complaints, engine
from ..engine import Op, no_grad
from ..errors import DTypeError
from ..tensor import Parameter, Tensor

__all__ = ["Point", "contract"]

Array = Any


class Surroundings(NamedTuple):
    """What a graph shows beside the leaves.

    Attributes
    ----------
    settings : tuple of (float, str)
        Numbers that its operations were given, and their names.
    constants : tuple of str
        What f uses and nobody checks: names, and why.
    """

    settings: tuple[tuple[float, str], ...]
    constants: tuple[str, ...]


class Point:
    """f, its inputs, and the parameters it closes over. A context: what f's tensors held comes back at the end.

    Attributes
    ----------
    leaves : list of (str, Parameter)
        What is checked: every input, and every parameter that is trainable.
    """

    def __init__(self, f: Callable[..., Tensor], inputs: Iterable[Any], parameters: Iterable[Any]) -> None:
        self.f = f
        self.inputs = [_as_leaf(i, value) for i, value in enumerate(inputs)]
        named: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in [*zip(_names(f, len(self.inputs)), self.inputs), *map(_with_name, enumerate(parameters))]:
            named.setdefault(id(tensor), (name, tensor))  # a parameter that two layers share is one leaf
        self.leaves = [(name, t) for name, t in named.values() if isinstance(t, Parameter) and t.trainable]
        for name, leaf in self.leaves:
            _check_float64(name, leaf.data)
        constants = [(name, t) for name, t in named.values() if not (isinstance(t, Parameter) and t.trainable)]
        self.tensors: list[tuple[str, Tensor]] = [*self.leaves, *constants]
        self.start = [numpy.array(backend.to_host(t.data)) for _, t in self.tensors]

    def __enter__(self) -> Point:
        self._kept = [(t, t.data) for _, t in self.tensors]
        self._gradients = [(leaf, leaf.grad, leaf.room) for _, leaf in self.leaves]
        for _, leaf in self.leaves:
            leaf.grad = leaf.room = None
        return self

    def __exit__(self, *error: object) -> None:
        for tensor, data in self._kept:
            tensor.data = data
        self.undo_changes()
        for leaf, gradient, room in self._gradients:
            leaf.grad, leaf.room = gradient, room

    def undo_changes(self) -> list[str]:
        """The names of the arrays that f changed; their old values are put back."""
        changed = []
        for (name, tensor), before in zip(self.tensors, self.start):
            if numpy.array(backend.to_host(tensor.data)).tobytes() != before.tobytes():
                changed.append(name)
                tensor.data[...] = backend.to_device(before, tensor.device)
        return changed

    def output(self) -> Tensor:
        """f at the point, with its graph."""
        try:
            y = self.f(*self.inputs)
        except Exception as error:
            if (note := _forward_of(error)) and note not in getattr(error, "__notes__", []):
                error.__notes__ = [*getattr(error, "__notes__", []), note]  # add_note came with 3.11
            raise
        if not isinstance(y, Tensor):
            raise DTypeError(f"f must return a Tensor, got {type(y).__name__}: compute it with minilora.ops")
        return y

    def gradients(self, y: Tensor, cotangent: Array) -> list[Array | None]:
        """Host copies of the gradient of sum(cotangent y) for each leaf; None where none arrived."""
        for _, leaf in self.leaves:
            leaf.grad = None
        others = [(p, p.gathered, p.room) for p in self._unnamed(y)]
        try:
            for p, _, _ in others:
                p.gathered = p.room = None
            if y.node is not None:
                y.backward(gradient=cotangent)
        finally:
            for p, gathered, room in others:
                p.gathered, p.room = gathered, room
        return [None if leaf.grad is None else numpy.array(backend.to_host(leaf.grad)) for _, leaf in self.leaves]

    def _unnamed(self, y: Tensor) -> list[Parameter]:
        """The trainable parameters that f uses without being given them: nobody asked for their gradients."""
        leaves = {id(leaf) for _, leaf in self.leaves}
        return [node for node in _behind(y) if isinstance(node, Parameter) and id(node) not in leaves]

    def surroundings(self, y: Tensor) -> Surroundings:
        """What the graph of f's output shows, and which tensors are not checked."""
        settings = {(float(value), f"{name} of {complaints.name_of(node)}"): None
                    for node in _behind(y) if isinstance(node, Op) for name, value in _settings(node).items()}
        constants = [f"{name} ({_reason(tensor)})" for name, tensor in self.tensors[len(self.leaves):]]
        constants += [f"a trainable parameter {p.shape} that f uses and parameters=[...] does not name"
                      for p in self._unnamed(y)]
        return Surroundings(tuple(settings), tuple(constants))

    def at(self, shifts: Mapping[int, Array], dtype: str = "float64") -> Array:
        """f's output, on the host, with `shifts` added to the leaves of these numbers; all computed in `dtype`."""
        before = [t.data for _, t in self.tensors]
        try:
            for i, ((_, tensor), x) in enumerate(zip(self.tensors, self.start)):
                if x.dtype.kind == "f":
                    moved = x.astype(dtype)
                    if i in shifts:
                        moved[...] += shifts[i]
                    tensor.data = backend.to_device(moved, backend.device_of(before[i]))
            with no_grad():
                return numpy.array(backend.to_host(self.output().data))
        finally:
            for (_, tensor), data in zip(self.tensors, before):
                tensor.data = data


def contract(cotangent: Array, y: Array) -> float:
    """sum(cotangent y) of two host arrays."""
    return float((cotangent * y).sum())


def _behind(y: Tensor) -> list[Any]:
    """The operations and parameters behind a tensor, the nearest first."""
    found: dict[int, Any] = {}
    frontier: list[Any] = [y.node]
    while frontier:
        node = frontier.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            frontier.extend((node.sources or ()) if isinstance(node, Op) else ())
    return list(found.values())


def _settings(op: Op) -> dict[str, float]:
    """The numbers with a decimal point that an operation was given, or that its class has."""
    classes = type(op).__mro__[:type(op).__mro__.index(Op)]
    named = {name: value for holder in (*reversed(classes), op) for name, value in vars(holder).items()}
    return {name: value for name, value in named.items() if isinstance(value, float) and not name.startswith("_")}


def _reason(tensor: Tensor) -> str:
    if isinstance(tensor, Parameter):
        return "frozen"
    return "constant" if tensor.dtype == "float64" else str(tensor.dtype)


def _forward_of(error: Exception) -> str:
    """In which operation's forward an error arose, and with what; empty if in none."""
    text, arrays, step = "", [], error.__traceback__
    while step is not None:
        code, values = step.tb_frame.f_code, step.tb_frame.f_locals
        if code is engine.apply.__code__:
            arrays = values.get("arrays", [])
        elif code.co_name == "forward" and isinstance(values.get("self"), Op):
            given = ", ".join(complaints.described(array) for array in arrays)
            text = f"in {complaints.name_of(values['self'])}.forward: inputs {given}"
        step = step.tb_next
    return text


def _as_leaf(i: int, value: Any) -> Parameter:
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        raise DTypeError(f"input {i} is a {type(value).__name__} of tensors: hand them over one by one, f, x, A, B")
    data = value.data if isinstance(value, Tensor) else backend.asarray(value)
    _check_float64(f"input {i}", data)
    return Parameter(data)


def _check_float64(name: str, data: Array) -> None:
    if data.dtype != "float64":
        raise DTypeError(f"{name} must be float64, got {data.dtype}: numerical derivatives need every digit. Convert "
                         "with .astype('float64'), a model with model.to(dtype='float64'); integers belong inside f")


def _with_name(numbered: tuple[int, Any]) -> tuple[str, Tensor]:
    i, given = numbered
    name, tensor = given if isinstance(given, tuple) else (f"parameter {i}", given)
    if not isinstance(tensor, Tensor):
        raise DTypeError(f"parameters: expected Parameters or Tensors, or (name, Parameter) pairs as from "
                         f"model.named_parameters(), got {type(tensor).__name__}")
    return name, tensor


def _names(f: Callable[..., Any], n: int) -> list[str]:
    """f's own names for its first n arguments, where it has any."""
    try:
        arguments = inspect.signature(getattr(f, "forward", f)).parameters.values()
    except (TypeError, ValueError):
        arguments = ()  # type: ignore[assignment]  # builtins may have no signature
    names = [p.name for p in arguments if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:n]
    return names + [f"input {i}" for i in range(len(names), n)]
