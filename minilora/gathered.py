"""What a walk through the graph comes to: the gradients of parameters, and of values in the middle that were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .errors import GraphError

__all__ = ["Gathered", "Retained", "Retaining", "pass_on"]

Array = Any
T = TypeVar("T", bound="Retaining")


class Retained:
    """A place for the gradient of one operation's output. The operation holds it, so it lives as long as a tensor in front.

    Attributes
    ----------
    wanted : bool
        Whether somebody asked for the gradient of this output.
    gradient : array or None
        That gradient, once a walk has succeeded.
    inside : sequence of (Retained, array)
        Of an operation that is a graph of others: what its own walk found for values in there.
    """

    __slots__ = ("gradient", "inside", "wanted")

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.gradient: Array | None = None
        self.inside: Sequence[tuple[Retained, Array]] = ()

    def given(self, xp: Any, dy: Array) -> Iterable[tuple[Retained, Array]]:
        """What is to be handed out when the walk has succeeded. The gradient is copied: the walk's own is borrowed."""
        inside, self.inside = self.inside, ()
        return [*inside, (self, xp.array(dy))] if self.wanted else inside


class Gathered(NamedTuple):
    """What a walk comes to: in the end `leaves` holds the parameters, on its way the operations that it has not met yet too."""

    leaves: dict[Any, Array]
    owned: set[Any]  # those whose entry the walk made, or a room: it may be added to in place
    retained: list[tuple[Retained, Array]]  # for values in the middle that were asked for


class Retainer(Protocol):
    """An operation, as far as `pass_on` sees it."""

    retained: Retained | None


def pass_on(op: Retainer, found: Gathered) -> None:
    """Let the walk that has come to `op` hand out what a walk inside of its backward found for values in there."""
    if found.retained:
        op.retained = op.retained or Retained(False)
        op.retained.inside = found.retained


class Retaining:
    """The gradient of a value in the middle of a graph; a base of `minilora.Tensor`."""

    __slots__ = ()

    node: Any

    def retain_grad(self: T) -> T:
        """Let `backward` keep the gradient of this value, to be read as `grad` afterwards.

        Returns
        -------
        Tensor
            This tensor itself, so that the call can stand where the value is computed. A parameter keeps its gradient anyway.

        Raises
        ------
        GraphError
            If no gradient comes here: nothing trainable took part, or the graph has been used up.

        Notes
        -----
        `grad` is None until a backward has succeeded, and stays None if this value has no part in the loss. It is an array of
        its own, the sum over all uses of the value, in the dtype in which gradients arrive here. It lives as long as the
        tensor. What was not asked for is not kept, and costs nothing.

        Where a part of a network is computed twice (``module.grad_checkpoint``), the tensor of the second pass gets the
        gradient, and that of the first stays at None. In a step under `minilora.record`, let the step give ``z.grad`` back.

        Examples
        --------
        >>> import minilora
        >>> x, A = minilora.tensor([[1.0, 2.0]]), minilora.Parameter([[3.0, 4.0]])
        >>> z = minilora.ops.linear(x, A).retain_grad()
        >>> (z * z).sum().backward()
        >>> z.item(), z.grad
        (11.0, array([[22.]], dtype=float32))
        """
        node = self.node
        if node is None:
            raise GraphError("retain_grad() has no gradient to keep: no trainable parameter took part in this tensor, or it "
                             "was made under no_grad(). Check that some parameter before it has trainable=True; an input keeps "
                             "its gradient as minilora.Parameter(x.data)")
        if node is not self and node.retained is None:
            if node.sources is None:
                raise GraphError("retain_grad() comes too late: this graph was used by an earlier backward() and is gone. "
                                 "Call it where the tensor is computed, before backward()")
            node.retained = Retained(True)
        return self

    @property
    def grad(self) -> Array | None:
        retained = getattr(self.node, "retained", None)
        if retained is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'grad': values in the middle keep none. "
                                 "Write x.retain_grad() before backward() to keep this one; an input keeps its gradient as "
                                 "minilora.Parameter(x.data)")
        return retained.gradient

    @grad.setter
    def grad(self, value: Array | None) -> None:
        raise AttributeError("the grad of a value in the middle is what backward() found, and cannot be assigned; that of a "
                             "parameter can. Its numbers can be changed: x.grad[...] = value")
