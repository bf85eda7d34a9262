"""What a user writes, as mypy must see it: ``mypy --strict`` finds nothing wrong here.

Each line of `wrong` must be an error of exactly the kind that its comment names: strict mypy also complains about a comment
that silences nothing, so an error that is no longer found is found. tests/test_typing.py runs the lines as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

import minilora
from minilora import Parameter, Tensor, nn, ops
from minilora.typing import Integers, Numbers, Operand, TensorLike

if TYPE_CHECKING:
    from typing_extensions import assert_type


def scaled(x: TensorLike, by: Operand) -> Tensor:
    """A function of a user's own, for whatever an operation takes."""
    return ops.mul(ops.relu(x), by)


def right() -> Tensor:
    """Tensors, raw arrays and numbers wherever they are allowed."""
    array: NDArray[numpy.float32] = numpy.ones((2, 3), "float32")
    x, w = minilora.tensor(array), Parameter([[1.0, 2.0, 3.0]])
    y = ops.linear(array, w)
    labels: Integers = [0, 0]
    nested: Numbers = [[1.0, 2], (3, numpy.float32(4.0))]
    loss = ops.cross_entropy(y, labels) + scaled(x, 2).mean() + scaled(array, numpy.float64(0.5)).sum(axis=0)[0]
    root: float = numpy.sqrt(2.0)
    loss = loss * root - 1 + 0.5 * ops.sum(x, axis=(0, 1)) / numpy.float32(3.0)
    loss = loss + ops.max_pool2d(numpy.ones((1, 1, 2, 2), "float32"), (2, 2)).mean() + minilora.tensor(nested, "float32").sum()
    loss.backward()
    if TYPE_CHECKING:
        assert_type(x, Tensor)
        assert_type(y, Tensor)
        assert_type(loss, Tensor)
        assert_type(x * array, Tensor)
        assert_type(x[0].T.reshape(-1), Tensor)
        assert_type(x.numpy(), NDArray[Any])
        assert_type(w.trainable, bool)
        assert_type(loss.item(), float)
        assert_type(x.shape, tuple[int, ...])
        assert_type(ops.softmax(x, axis=0).astype("float16"), Tensor)
        assert_type(nn.Linear(3, 2, rng=0).weight, Parameter)
    return loss


def wrong(x: Tensor, p: Parameter) -> list[Callable[[], object]]:
    """One mistake a line: a type error for mypy, and an error when it runs."""
    return [
        lambda: ops.relu("text"),  # type: ignore[arg-type]
        lambda: ops.relu([1.0, 2.0]),  # type: ignore[arg-type]
        lambda: ops.relu(2.0),  # type: ignore[arg-type]
        lambda: ops.relu(None),  # type: ignore[arg-type]
        lambda: ops.add(x, "text"),  # type: ignore[arg-type]
        lambda: x + [1.0],  # type: ignore[operator]
        lambda: x * None,  # type: ignore[operator]
        lambda: ops.linear(x, p, "bias"),  # type: ignore[arg-type]
        lambda: ops.cross_entropy(x, "labels"),  # type: ignore[arg-type]
        lambda: ops.embedding(["a"], p),  # type: ignore[arg-type]
        lambda: ops.concatenate(["a", "b"]),  # type: ignore[list-item]
        lambda: ops.max_pool2d(x, "2"),  # type: ignore[arg-type]
        lambda: ops.sum(x, "0"),  # type: ignore[arg-type]
        lambda: minilora.tensor("text"),  # type: ignore[arg-type]
        lambda: minilora.backend.asarray(["text"]),  # type: ignore[arg-type]
        lambda: Parameter("text"),  # type: ignore[arg-type]
        lambda: x.sum(dim=0),  # type: ignore[arg-type]
        lambda: x.exp(),  # type: ignore[attr-defined]
        lambda: x.requires_grad,  # type: ignore[attr-defined]
        lambda: x % 2,  # type: ignore[operator]
        lambda: x < "text",  # type: ignore[operator]
    ]
