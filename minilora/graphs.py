"""Training steps that a GPU repeats without Python."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from . import backend, outside, replay
from .calls import answered
from .errors import ConfigError
from .settings import whole

__all__ = ["Recorded", "played", "record"]

MOST = 8
IDLE = 64  # calls after which a graph that was not used makes room for another


def played(step: Callable[..., Any], most: int, idle: int) -> Callable[..., Any]:
    """How a device calls a step that may be recorded, in at most so many graphs. This is the reference: it calls it.

    A graph that was not used for `idle` calls makes room for another.
    """
    return step


class Recorded:
    """A step that `record` has taken over: called like the step itself. A copy, or a pickle, has recorded nothing yet."""

    def __init__(self, step: Callable[..., Any], most: int = MOST, idle: int = IDLE) -> None:
        functools.update_wrapper(self, step)
        self.step: Any = step
        self.most, self.idle = most, idle
        self.name = getattr(step, "__name__", "")  # of the attribute, in a class
        self._plays: dict[Any, Callable[..., Any]] = {}  # by the device, whether kernels run, and TF32
        self._bound: dict[int, Recorded] = {}  # by the id of the object: equal ones are others, and some cannot be keys

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if replay.current() is not None:  # a step within a step is a part of that
            outside.watch(self.step, arguments)
            return self.step(*arguments, **named)
        now = backend.current_device(), backend.kernels(), backend.tf32()
        play = self._plays.get(now)
        if play is None:
            play = self._plays[now] = now[0].resolve(played)(self.step, self.most, self.idle)
        return play(*arguments, **named)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """A method: the step of this object, with recordings of its own."""
        if owner is None:
            return self
        known = self._bound.get(id(owner))
        if known is None:
            known = self._bound[id(owner)] = Recorded(_Method(self.step, reference(owner)), self.most, self.idle)
            weakref.finalize(owner, self._bound.pop, id(owner)).atexit = False
        return _Bound(known, owner, self.name)

    def __set_name__(self, kind: type, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return Recorded, (self.step, self.most, self.idle)

    @property
    def graphs(self) -> int:
        """How many graphs there are now."""
        return sum(getattr(play, "graphs", 0) for play in self._plays.values())

    def forget(self) -> None:
        """Let go of all recordings and their memory; needed after changes that nobody notices: see the notes of `record`."""
        self._plays.clear()
        for bound in list(self._bound.values()):
            bound.forget()


class _Bound:
    """The step of an object, which it keeps alive, as a method does."""

    def __init__(self, recorded: Recorded, owner: Any, name: str) -> None:
        self.recorded, self.owner, self.name = recorded, owner, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.recorded(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name in ("recorded", "owner", "name"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.recorded, name)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


class _Method:
    """A function and the object that it belongs to, which it does not keep alive."""

    def __init__(self, function: Callable[..., Any], owner: weakref.ref[Any]) -> None:
        self.function, self.owner = function, owner

    @property
    def __wrapped__(self) -> Any:
        return types.MethodType(self.function, self.owner())

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(self.owner(), *arguments, **named)


def reference(owner: Any) -> weakref.ref[Any]:
    try:
        return weakref.ref(owner)
    except TypeError:
        raise ConfigError(f"record: a method's recordings go when its object goes, which a {type(owner).__name__} does not let "
                          "anybody notice: its class has __slots__ without '__weakref__'. Add that to them, or "
                          "weakref_slot=True to @dataclass(slots=True, ...)") from None


@answered
def record(step: Callable[..., Any], most: int = MOST) -> Recorded:
    """Make a training step cheap on a GPU: its launches are recorded once, as a CUDA graph, and then repeated.

    On the CPU nothing changes. On a GPU the first call runs the step, the second records it, and all further ones replay it:
    the same launches on the same memory in the same order, hence the same bits, with little Python between two steps.

    Parameters
    ----------
    step : callable
        Takes arrays (of the host or the device), tensors, tuples, lists and dicts of these, and whatever else it needs; does a
        whole step, forward to ``optimizer.step()``; gives back tensors, arrays of the device, tuples, lists and dicts of them,
        or None. A function or a method: in a class, each object has recordings of its own.

    most : int
        How many graphs are kept, see the notes.

    Returns
    -------
    Recorded
        To be called like `step`. What it gives back is the caller's: no later call overwrites it.

    Raises
    ------
    ConfigError
        If `step` cannot be called, or `most` is no whole number from 1 on.
    StateError
        From the second call on a GPU, if the step cannot be recorded: it waits for the GPU, copies between host and device,
        calls what CUDA does not record, itself changes what it reads from Python (takes items of an iterator, writes into an
        argument), or gives back numbers of Python or objects that it makes. Nothing has changed then, but for what the step
        itself has done to objects that are not minilora's.

    Notes
    -----
    Learning rates, step numbers of Adam, schedules, loss scales and dropout masks are those of every call. All else that the
    step reads from Python is compared before every call, and where it has changed the step is recorded anew, beside what there
    is: for ``train()`` and ``eval()`` in turn, for gradients that add up in some calls and a step of the optimizer in others,
    for two shapes of arguments there are two graphs. It is noticed when attributes of modules change, parameters are frozen,
    adapters injected, activated or merged, arrays or settings replaced, contexts such as `no_grad` entered; and of the step's
    own code, of the functions in its file that it calls and of the methods of its objects, when variables around it, globals,
    defaults, or attributes that it takes of them have other values, or when lists, dicts, sets and arrays there hold others.
    Not noticed is what the code asks for by names that it computes, what functions of other files read, and the numbers in
    arrays of the host with more than 4096: after such a change call ``forget()``.

    At most `most` graphs are kept, each with the memory of its arguments and results; all use one for what lies in between. A
    call for which there is no room runs the step as it is; a graph that was not used for 64 calls makes room. So does a call
    while somebody looks at every operation (`minilora.draw`), or with a tensor through which gradients flow out of the step.
    The memory of the graphs, and the arrays that they read, are held until ``forget()``.

    Integers on the host are checked by an operation that gets them; those among the arguments are copied to the device first,
    where nobody looks at them.

    Examples
    --------
    >>> import minilora, numpy
    >>> layer = minilora.nn.Linear(2, 1, rng=0)
    >>> optimizer = minilora.optim.Adam(layer.parameters(), lr=0.1)
    >>> @minilora.record
    ... def step(x, y):
    ...     loss = minilora.ops.mse(layer(x), y)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> x, y = minilora.tensor([[1.0, 2.0]]), minilora.tensor([[3.0]])
    >>> losses = [step(x, y).item() for _ in range(100)]
    >>> losses[-1] < 0.001 * losses[0]
    True
    """
    if not callable(step):
        raise ConfigError(f"record takes a function that does a step, got {type(step).__name__}")
    return Recorded(step, whole("most", most))
