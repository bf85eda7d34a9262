"""A network whose weights are no numbers of their own, but come out of other operations as one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .. import backend
from ..engine import Op, apply, is_recording
from ..errors import DTypeError, GraphError, ShapeError
from ..gathered import Gathered, pass_on
from ..tensor import Parameter, Tensor
from ..walk import collect
from .recompute import parameters_in, taken_apart

__all__ = ["COMPUTED", "WithWeights", "put_weights", "with_weights"]

Array = Any

_inside: ContextVar[bool] = ContextVar("minilora.weights", default=False)


class Computed:
    """What `Parameter.trainable` is of weights that are computed: true inside of `with_weights`, false for everybody else.

    Inside, they are leaves of the graph there, and get the gradients that it passes on. Outside they are frozen: no optimizer
    takes them. It holds for a thread (a context) and not for a time, so that threads may run one network at once.
    """

    def __bool__(self) -> bool:
        return _inside.get()

    def __repr__(self) -> str:
        return "COMPUTED"

    def __reduce__(self) -> str:
        return "COMPUTED"  # a copy, in another process too, is this very object


COMPUTED = Computed()


@contextmanager
def computing() -> Iterator[None]:
    """Within this context computed weights are leaves."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


class WithWeights(Op):
    """y = f(x1 ... xn; θ): θ (D,) holds the weights of f one behind the other.

    The inputs are θ, then the x, then other parameters that f may use. Forward runs f, whose weights have been written
    (`put_weights`), and keeps its graph, of which the x and the weights are leaves. Backward walks it from dy, and uses it up:

        dθ = (∂y/∂θ_1 ... ∂y/∂θ_m)ᵀ dy, one behind the other; 0 where f did not use a weight        dx_i = (∂y/∂x_i)ᵀ dy

    A weight that f uses at several places is one leaf. Kept: what f keeps; besides, backward makes one array of D.
    """

    composed = True
    widens = False
    function: Callable[[Sequence[Any]], Any]
    parameters: tuple[Parameter, ...]
    beside: tuple[Parameter, ...]

    def forward(self, theta: Array, *xs: Array) -> Array:
        self.dtype = theta.dtype
        count = len(xs) - len(self.beside)
        self.given = [Parameter(x) if need else Tensor(x) for x, need in zip(xs[:count], self.needs[1:])]
        with computing():
            y = self.function(self.given)
        if not isinstance(y, Tensor):
            raise DTypeError(f"with_weights: expected one Tensor, got {type(y).__name__}: a network in a subspace gives one "
                             "output while it trains, its loss for instance; under no_grad() it may give several")
        self.root = y.node
        return y.data

    def backward(self, dy: Array) -> list[Array | None]:
        root, given, self.root, self.given = self.root, [*self.given, *self.beside], None, []
        y = Tensor(dy)  # of y nothing but its place in the graph is kept
        y.node = root
        walked = Gathered({}, set(), []) if root is None else collect(y, dy, rooms=False)
        found = walked.leaves
        strangers = found.keys() - {*given, *self.parameters}
        if strangers:
            raise GraphError(f"with_weights: trainable parameters of shape {', '.join(str(p.shape) for p in strangers)} took "
                             "part that belong to another module: their gradient would be lost. Freeze them, or make them "
                             "attributes of the module inside")
        pass_on(self, walked)
        dtheta = None
        if self.needs[0]:
            dtheta, at = self.xp.zeros(sum(p.size for p in self.parameters), dtype=self.dtype), 0
            for p in self.parameters:
                part, at = slice(at, at + p.size), at + p.size
                if p in found:
                    dtheta[part] = found[p].reshape(-1)
        return [dtheta, *(None if not need else found[x] if x in found else self.xp.zeros_like(x.data)
                          for x, need in zip(given, self.needs[1:]))]


def put_weights(theta: Array, parameters: Sequence[Parameter], dtypes: Sequence[Any]) -> None:
    """Let the arrays of parameters be the parts of θ: views, or copies where a parameter has another dtype.

    Parameters
    ----------
    theta : array, shape (D,)
        Not to be written to afterwards.
    parameters : sequence of Parameter
        Of D numbers together.
    dtypes : sequence of dtype
        What each of them holds.
    """
    xp, at = backend.device_of(theta).xp, 0
    for p, dtype in zip(parameters, dtypes):
        kind = dtype if theta.dtype.kind != "c" else xp.result_type(dtype, xp.complex64)  # a complex step stays one
        part = theta[at:at + p.size].reshape(p.shape)
        p.data, at = part.astype(kind, copy=False), at + p.size


def with_weights(function: Callable[..., Any], parameters: Sequence[Parameter], theta: Tensor, beside: Iterable[Parameter],
                 *args: Any, **kwargs: Any) -> Any:
    """Call a network whose weights are the parts of a vector: gradients go to that vector. See `WithWeights`.

    Parameters
    ----------
    function : callable
        Gives one Tensor; while nothing is recorded, anything.
    parameters : sequence of Parameter
        Its weights. They have been written already, `put_weights`, and their `trainable` is `COMPUTED`.
    theta : Tensor, shape (D,)
    beside : iterable of Parameter
        What else it reads that is trained.
    *args, **kwargs
        For the function. Tensors among them, also in tuples, lists and dicts, get their gradients.

    Raises
    ------
    ShapeError
        If the parameters do not have D numbers together.
    DTypeError
        If the function gives something else than one Tensor.
    GraphError
        In backward, if other trainable parameters took part.

    Examples
    --------
    >>> import minilora
    >>> from minilora import ops
    >>> theta, x = minilora.Parameter([3.0, 4.0]), minilora.tensor([[1.0, 2.0]])
    >>> w = minilora.Parameter(minilora.backend.asarray([[0.0, 0.0]]), trainable=COMPUTED)
    >>> put_weights(theta.data, [w], ["float32"])
    >>> y = with_weights(lambda x: ops.linear(x, w), [w], theta, [], x).sum()
    >>> y.backward()
    >>> y.item(), theta.grad, w.grad
    (11.0, array([1., 2.], dtype=float32), None)
    """
    total = sum(math.prod(p.shape) for p in parameters)
    if theta.shape != (total,):
        raise ShapeError(f"with_weights: the {len(parameters)} weights have {total} numbers together, theta has shape "
                         f"{theta.shape}")
    if not is_recording():
        return function(*args, **kwargs)
    tensors, call = taken_apart(function, args, kwargs)
    others = tuple(dict.fromkeys([*beside, *parameters_in((args, kwargs))]))
    return apply(WithWeights, theta, *tensors, *others, function=call, parameters=tuple(parameters), beside=others)
