"""Module: an object that owns parameters and other modules, in the order in which they were assigned."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy

from .. import backend, engine, ops, replay
from ..errors import DTypeError, MiniloraError, StateDictError
from ..tensor import Parameter
from .attributes import FLAGS, Made, lacking, placed, refuse_shadow, refuse_swap
from .contents import Entry, entries, modules_in, values_in
from .state import as_host, as_kept, given_array, misfit, moved, own_state
from .stored_parts import parts, put, refuse_training, torn

__all__ = ["Module"]

M = TypeVar("M", bound="Module")


class Module(Made):
    """Base class of layers and models.

    A subclass assigns parameters and modules to attributes, also in lists, tuples and dicts at any depth, and defines
    `forward`. There is no registration: `named_parameters` reads the attributes in the order of their assignment, and that
    order is the order of every state dict and of every optimizer's flat array. Sets, other containers and plain objects
    are not looked into.

    A model that draws its weights makes ``rng = numpy.random.default_rng(rng)`` once and passes that Generator to all its
    layers: an int passed on would give equal weights to layers of equal shapes.

    What must be saved and moved with the parameters but is not trained, numbers and arrays such as counters, masks and
    running means, is assigned as an attribute too, and named in `state_names`.

    Attributes
    ----------
    training : bool
        Switched by `train` and `eval`. Only layers such as dropout read it; it never changes a weight.
    grad_checkpoint : bool
        While it trains, keep nothing of this module but its input, and compute it again in backward: see `nn.grad_checkpoint`.
    state_names : tuple of str
        Attributes that are state but no parameters; set in the class. What a class derives from adds its own. An attribute
        that is None has no state now.

    Raises
    ------
    DTypeError
        When something else than a parameter, a module or None is assigned in the place of a parameter or module, or
        something that cannot be called in the place of a method: ``layer.weight -= x`` would lose the parameter.

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
    grad_checkpoint: bool = False
    state_names: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get(name)
        if isinstance(old, (Parameter, Module)) and not (value is None or isinstance(value, (Parameter, Module))):
            refuse_swap(self, name, old, value)
        if name in METHODS and (isinstance(value, Module) or not callable(value)):
            refuse_shadow(self, name, value)
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # for a type checker a module has the attributes that are written down, and no others
        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property whose own code lacks an attribute: let that error out
                return object.__getattribute__(self, name)
            raise lacking(self, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; called through ``module(...)``."""
        raise TypeError(f"{type(self).__name__} has no forward: define forward(self, x) in the subclass")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay.reads(self, self.named_modules)
        try:
            if self.grad_checkpoint and self.training and engine.is_recording():
                return ops.recompute(self.forward, self.parameters(), *args, **kwargs)
            return self.forward(*args, **kwargs)
        except (MiniloraError, TypeError) as error:
            placed(self, error, args, kwargs)
            raise

    # -- contents ---------------------------------------------------------------------------------------------------

    def children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside, with their names: attributes, and what is in lists, tuples and dicts of them."""
        return ((name, child) for name, _, child in entries(self, Module))

    def own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The parameters directly inside, with their names: attributes, and what is in lists, tuples and dicts of them."""
        return ((name, parameter) for name, _, parameter in entries(self, Parameter))

    def own_state(self) -> Iterator[Entry]:
        """(name, place, value) of this module's own state; a hook for layers that have none under some settings."""
        return own_state(self)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Every module inside with its dotted path, this one first (its path is `prefix`).

        Raises
        ------
        StateError
            If a module is inside itself, or two have one path, like the entries 0 and "0" of a dict.
        """
        return ((path, module) for path, _, module in modules_in(self, Module, prefix))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its dotted path. A parameter shared by several modules comes once, under its first path."""
        seen: set[int] = set()
        for path, _, (_, _, parameter) in values_in(self, Module, _own_parameters):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, parameter

    def named_state(self) -> Iterator[tuple[str, Any]]:
        """All state that is no parameter, numbers and arrays, with dotted paths; that of a shared module once."""
        return ((path, value) for path, _, (_, _, value) in self._kept() if not isinstance(value, Parameter))

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, frozen ones too, in the order of `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def _kept(self, through: Callable[[Any], Any] | None = None) -> Iterator[tuple[str, Module, Entry]]:
        """What a state dict holds, as (path, module, entry), each once: the parameters and the state of module after module."""
        seen: set[Any] = set()
        for path, module, entry in values_in(self, Module, _own_parameters, lambda module: module.own_state(), through=through):
            name, _, value = entry
            key = id(value) if isinstance(value, Parameter) else (id(module), name)
            if key not in seen:
                seen.add(key)
                yield path, module, entry

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
        """Make every parameter trainable (`DTypeError` if one is held in low precision) or freeze every one; the module."""
        if mode:
            refuse_training(self.named_parameters())
        for parameter in self.parameters():
            parameter.trainable = mode
        return self

    def to(self: M, device: str | None = None, dtype: Any = None) -> M:
        """Move parameters and state to a device, convert them to a dtype, or both. Gradients are dropped. Returns the module.

        An explicit copy. Of the state, arrays of floating-point numbers are converted; integers, booleans and Python numbers
        stay what they are. Optimizers hold the arrays they were made with: make them after moving the model.
        """
        if dtype is not None and numpy.dtype(dtype).kind != "f":
            raise DTypeError(f"to: parameters must be floating-point numbers, got dtype {numpy.dtype(dtype)}: a gradient moves "
                             "by fractions. Take to(dtype='float32'), 'float64' or 'float16'")
        if device is not None:
            if not isinstance(device, str):
                raise DTypeError(f"to: expected the name of a device, got {device!r}: for a dtype write to(dtype=...)")
            device = backend.device_of(backend.to_device(numpy.empty(0), device)).name  # raises, if there is none
        self._ask(lambda path, module: module.check_movable())
        parameters, state = [], []
        for _, module, (name, _, value) in self._kept():
            new = moved(value, device, None if dtype is None else module.dtype_for(dtype))
            if isinstance(value, Parameter):
                parameters.append((value, new))
            else:
                state.append((module, name, new))
        for parameter, data in parameters:  # nothing changes before all of it fits on the device
            parameter.data, parameter.grad, parameter.room = data, None, None
        for module, name, new in state:
            setattr(module, name, new)
        return self

    # Hooks for layers that stand for a time in the place of others.

    def holds_merged(self) -> bool:
        """Whether its parameters hold for now what others of the same model hold too."""
        return False

    def as_base(self) -> Module:
        """Where something is merged: what this module is without what is put around it, for `state_dict`."""
        return self

    def dtype_for(self, dtype: Any) -> Any:
        """What becomes of its own numbers when the model is converted to this dtype."""
        return dtype

    def check_movable(self) -> None:
        """Raise `StateError` if this module's parameters are not what should be moved or overwritten now."""

    def check_loading(self, names: Collection[str]) -> None:
        """Raise `StateError` if these of its own names, and of what is inside, must not be loaded without others."""

    def _ask(self, question: Callable[[str, Module], None]) -> None:
        """Put a question to each module; an error gets the path of the one that objects."""
        for path, module in self.named_modules():
            try:
                question(path, module)
            except MiniloraError as error:
                error.path = path
                raise

    def _check_loading(self, paths: Collection[str]) -> None:
        def question(path: str, module: Module) -> None:
            if type(module).check_loading is not Module.check_loading:  # few have something to say, and there are many names
                inside = f"{path}." if path else ""
                module.check_loading({name.removeprefix(inside) for name in paths if name.startswith(inside)})
        self._ask(question)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, numpy.ndarray]:
        """A copy of every parameter, and of all other state, on the host, by dotted path. On a GPU a sync point.

        Of a model with merged layers it is the state of the merged base, under the base's names.
        """
        merged = any(module.holds_merged() for _, module in self.named_modules())
        kept = self._kept(lambda module: module.as_base()) if merged else self._kept()
        return {name: as_host(part) for path, _, (_, _, value) in kept for name, part in parts(path, value)}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> list[str]:
        """Copy values into the parameters and the other state, all of them or none.

        Parameters
        ----------
        state : mapping of str to array
            Host arrays, with exactly the names, shapes and dtypes of `state_dict`. Where a module keeps a Python number, it
            keeps one again.
        strict : bool
            With False, names may be missing or unexpected; shapes and dtypes must still fit.

        Returns
        -------
        list of str
            The names that were missing or unexpected: empty if `strict`.

        Raises
        ------
        StateDictError
            With one line for every missing, unexpected or misfitting name; then nothing has changed.
        """
        self._ask(lambda path, module: module.check_movable())
        own = {full: (module, name, part) for path, module, (name, _, value) in self._kept()
               for full, part in parts(path, value)}
        missing = [path for path in own if path not in state]
        unexpected = [path for path in state if path not in own]
        given = {path: given_array(state[path]) for path in own if path in state}
        faults = [f"misfit     {path}: {wrong}" for path, array in given.items() if (wrong := misfit(own[path][2], array))]
        if strict:
            faults += [f"missing    {path} {getattr(own[path][2], 'shape', ())}" for path in missing]
            faults += [f"unexpected {path} {numpy.shape(state[path])}" for path in unexpected]
        faults += torn(own, given)
        if faults:
            raise StateDictError("\n  ".join([f"state dict does not fit {type(self).__name__}; nothing was loaded:", *faults]))
        self._check_loading(given)
        ready = [(*own[path], as_kept(own[path][2], array)) for path, array in given.items()]
        for entry in ready:  # nothing can fail from here on
            put(*entry)
        return missing + unexpected

    # -- text -------------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets of a layer without children."""
        return ""

    @reprlib.recursive_repr("...")
    def __repr__(self) -> str:
        children = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        return "\n  ".join([f"{type(self).__name__}({self.extra_repr()}", *children]) + ("\n)" if children else ")")


METHODS = frozenset(name for name, value in vars(Module).items() if callable(value)) | {*FLAGS}


def _own_parameters(module: Module) -> Iterator[Entry]:
    return entries(module, Parameter)
