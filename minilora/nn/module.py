"""Module: an object that owns parameters and other modules, in the order in which they were assigned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy

from .. import backend
from ..errors import MiniloraError, StateDictError
from ..tensor import Parameter, Tensor

__all__ = ["Module"]

M = TypeVar("M", bound="Module")
T = TypeVar("T")


class Module:
    """Base class of layers and models.

    A subclass assigns parameters and modules (also lists, tuples and dicts of them) to attributes, and defines
    `forward`. There is no registration: `named_parameters` reads the attributes in the order of their assignment, and that
    order is the order of every state dict and of every optimizer's flat array.

    Attributes
    ----------
    training : bool
        Switched by `train` and `eval`. Only layers such as dropout read it; it never changes a weight.

    Examples
    --------
    >>> import minilora
    >>> class Scale(minilora.nn.Module):
    ...     def __init__(self, n):
    ...         self.weight = minilora.Parameter(minilora.backend.asarray([1.0] * n))
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> [name for name, p in Scale(3).named_parameters()]
    ['weight']
    """

    training: bool = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; called through ``module(...)``."""
        raise TypeError(f"{type(self).__name__} has no forward: define forward(self, x) in the subclass")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.forward(*args, **kwargs)
        except MiniloraError as error:
            # The innermost module marks the error; each one outside of it knows a longer part of the path.
            error.origin = error.origin or self
            error.path = next((name for name, m in self.named_modules() if m is error.origin), "")
            raise

    # -- contents ---------------------------------------------------------------------------------------------------

    def _entries(self, kind: type[T]) -> Iterator[tuple[str, T]]:
        for name, value in vars(self).items():
            if isinstance(value, kind):
                yield name, value
            elif isinstance(value, (list, tuple, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}.{key}", item) for key, item in items if isinstance(item, kind))

    def children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside, with their names: attributes, and the entries of lists, tuples and dicts."""
        return self._entries(Module)

    def own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The parameters directly inside, with their names: attributes, and the entries of lists, tuples and dicts."""
        return self._entries(Parameter)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Every module inside with its dotted path, this one first (its path is `prefix`)."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its dotted path. A parameter shared by several modules comes once, under its first path."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, parameter in module.own_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{path}.{name}" if path else name), parameter

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, frozen ones too, in the order of `named_parameters`."""
        for _, parameter in self.named_parameters():
            yield parameter

    # -- modes and places -------------------------------------------------------------------------------------------

    def train(self: M, mode: bool = True) -> M:
        """Switch this module and all inside to training mode (or, with False, to evaluation). Returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self: M) -> M:
        """The same as ``train(False)``."""
        return self.train(False)

    def requires_grad(self: M, mode: bool = True) -> M:
        """Make every parameter trainable or, with False, freeze every one. Returns the module."""
        for parameter in self.parameters():
            parameter.trainable = mode
        return self

    def to(self: M, device: str | None = None, dtype: Any = None) -> M:
        """Move every parameter to a device, convert it to a dtype, or both. Gradients are dropped. Returns the module.

        An explicit copy. Optimizers hold the arrays they were made with: make them after moving the model.
        """
        if dtype is not None and numpy.dtype(dtype).kind != "f":
            Parameter(numpy.empty(0, dtype))  # raises: a parameter must be floating-point
        self._check_movable()
        moved = []
        for parameter in self.parameters():
            data = parameter.data
            if dtype is not None:
                data = data.astype(dtype, copy=False)
            if device is not None and backend.device_of(data).name != device:
                data = backend.to_device(backend.to_host(data), device)
            moved.append((parameter, data))
        for parameter, data in moved:  # nothing changes before all of it fits on the device
            parameter.data, parameter.grad, parameter.room = data, None, None
        return self

    def check_movable(self) -> None:
        """Raise `StateError` if this module's parameters are not what should be copied, moved or overwritten now.

        A hook for layers whose parameters have a temporary value; the base class never objects.
        """

    def _check_movable(self) -> None:
        for path, module in self.named_modules():
            try:
                module.check_movable()
            except MiniloraError as error:
                error.path = path
                raise

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, numpy.ndarray]:
        """A copy of every parameter on the host, by dotted path. On a GPU a sync point."""
        self._check_movable()
        return {name: numpy.array(backend.to_host(p.data)) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> list[str]:
        """Copy values into the parameters, all of them or none.

        Parameters
        ----------
        state : mapping of str to array
            Host arrays, with exactly the names, shapes and dtypes of `state_dict`.
        strict : bool
            With False, names may be missing or unexpected; shapes and dtypes must still fit.

        Returns
        -------
        list of str
            The names that were missing or unexpected: empty if `strict`.

        Raises
        ------
        StateDictError
            With one line for every missing, unexpected or misfitting name; then no parameter has changed.
        """
        self._check_movable()
        own = dict(self.named_parameters())
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        wrong, new = [], {}
        for name, p in own.items():
            if name not in state:
                continue
            value = state[name].data if isinstance(state[name], Tensor) else state[name]
            value = numpy.asarray(value) if isinstance(value, (list, float, int)) else backend.to_host(value)
            if value.shape != p.shape or value.dtype != p.dtype:
                wrong.append(f"misfit     {name}: expected {p.dtype} {p.shape}, got {value.dtype} {value.shape}")
            new[name] = value
        problems = wrong
        if strict:
            problems += [f"missing    {name} {own[name].shape}" for name in missing]
            problems += [f"unexpected {name} {numpy.shape(state[name])}" for name in unexpected]
        if problems:
            raise StateDictError(f"state dict does not fit {type(self).__name__}; nothing was loaded:\n  "
                                 + "\n  ".join(problems))
        for name, value in new.items():
            p = own[name]
            if p.room is None:  # a new array: the old one may be shared, as lora.adapt shares a base's
                p.data = backend.to_device(numpy.array(value), p.device)
            else:
                p.data[...] = backend.to_device(value, p.device)  # a view of the optimizer's flat array
                p.version += 1
        return missing + unexpected

    # -- text -------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets of a layer without children."""
        return ""

    def __repr__(self) -> str:
        children = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        return f"{type(self).__name__}({self.extra_repr()}\n  " + "\n  ".join(children) + "\n)"
