"""Sum where a broadcast copied."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
NumPy copies a small array along an axis so that it fits a larger one: in
x + b with x (N, out) and b (out,), each b_k is added to all N rows. So b_k
reaches the loss along N paths, and the chain rule adds them up: sum where
you copied.

dy      any shape: the gradient of the larger array
shape   of the smaller array, which NumPy copied to the shape of dy
return  an array of that shape

NumPy copies in two ways: it puts new axes in front of a shape that has too
few, and it stretches axes of size 1. Undo both.

>>> dy = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
>>> unbroadcast(dy, (3,))
array([11., 22., 33.])
>>> unbroadcast(dy, (2, 1))
array([[ 6.],
       [60.]])
"""

CODE = """
import numpy as np


def unbroadcast(dy, shape):
    <blank>
"""

ROWS, COLUMN, NUMBER, NOTHING, BOTH = ("a row copied down", "a column copied sideways", "a number copied everywhere",
                                       "nothing copied", "both kinds at once")


def points(draw: Draw) -> dict[str, Any]:
    a, b, c = draw.size(), draw.size(), draw.size()
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        COLUMN: ((a, b), (a, 1)), NUMBER: ((a, b), ()), NOTHING: ((a, b), (a, b)), BOTH: ((a, b, c), (1, c))}
    large, small = shapes.get(draw.case, ((a, b), (b,)))
    return {"dy": draw.normal(*large), "shape": small}


def right(dy: Any, shape: tuple[int, ...]) -> Any:
    import numpy

    from ..oracle import gradients

    return gradients(lambda small: small + numpy.zeros_like(dy), numpy.ones(shape, dy.dtype), dy=dy)[0]


puzzle = Function(
    name="unbroadcast", teaches="sum where NumPy copied", task=TASK, find="unbroadcast", code=CODE,
    answer=("extra = dy.ndim - len(shape)\n"
            "dy = dy.sum(axis=tuple(range(extra)))\n"
            "ones = tuple(i for i, n in enumerate(shape) if n == 1)\n"
            "return dy.sum(axis=ones, keepdims=True)"),
    mistakes=(
        Mistake("return dy.mean(axis=0)", "It is the mean of the paths. Each path adds its own part: sum them."),
        Mistake("return dy[0]", "It takes one of the copies. All of them reach the loss: sum over them."),
        Mistake("return dy.sum(axis=0)", says="shapes differ"),
        Mistake("return dy.sum(axis=tuple(range(dy.ndim - len(shape))))", says="shapes differ"),
        Mistake("return dy.sum()", says="shapes differ"),
        Mistake("return dy", says="shapes differ"),
        Mistake("return dy.sum(axis=0).reshape(shape)", says="ValueError"),
    ),
    hints=("dy.sum(axis=...) takes a tuple of axes. Which axes does dy have that shape has not?",
           "The first dy.ndim - len(shape) axes are new: sum them away. Then sum, with keepdims=True, each axis where shape "
           "says 1.",
           "Two sums: axis=tuple(range(dy.ndim - len(shape))), then a tuple of all i with shape[i] == 1 and keepdims=True. "
           "A sum over no axis, axis=(), changes nothing, so no case needs an if."),
    see="minilora/ops/elementwise.py: unbroadcast", points=points, cases=(ROWS, COLUMN, NUMBER, NOTHING, BOTH, "float32"),
    outputs=("dx",), right=right)
