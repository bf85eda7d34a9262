"""The backward of softmax."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Softmax turns each row of numbers into positive ones that sum to 1:

    y_i = e^(x_i) / sum_j e^(x_j)          along the last axis

Raising one x raises its own y and lowers all others in its row:

    dy_i/dx_j = y_i (1 - y_i)  for i = j,      -y_i y_j  otherwise

dy      (..., n)      dL/dy
y       (..., n)      what forward gave: x itself is not needed
dx      (..., n)      what is wanted

Sum over i, and take out the factor that all terms share.

>>> backward(np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]))
array([[ 0.25, -0.25]])
"""

CODE = """
import numpy as np


def backward(dy, y):
    <blank>
"""

AXES = "three axes"


def points(draw: Draw) -> dict[str, Any]:
    import numpy

    shape = ((2,) if draw.case == AXES else ()) + (draw.rows(), draw.size())
    e = numpy.exp(draw.normal(*shape))
    return {"dy": draw.normal(*shape), "y": e / e.sum(axis=-1, keepdims=True)}


def right(dy: Any, y: Any) -> Any:
    import numpy

    from ...ops import softmax
    from ..oracle import gradients

    return gradients(lambda x: softmax(x, axis=-1), numpy.log(y), dy=dy)[0]


puzzle = Function(
    name="softmax", teaches="the backward of softmax", task=TASK, find="backward", code=CODE,
    answer="return y * (dy - (dy * y).sum(axis=-1, keepdims=True))",
    mistakes=(
        Mistake("return dy * y * (1.0 - y)",
                "It is the diagonal alone, each y as if it depended on its own x only. The sum below the fraction holds "
                "all x."),
        Mistake("return y * (dy - (dy * y).sum())", "The sum runs over all rows. Each row is a softmax of its own: axis=-1."),
        Mistake("return y * (dy - dy.sum(axis=-1, keepdims=True))",
                "The sum is of dy alone. Each path into it brings its own y along: sum dy * y."),
        Mistake("return y * (dy - (dy * y).sum(axis=-1))", says="ValueError"),
        Mistake("return dy * y", "The part through the sum below the fraction is missing: dx must sum to 0 in each row."),
        Mistake("return y * (dy - (dy * y).mean(axis=-1, keepdims=True))", says="wrong in"),
    ),
    hints=("dx_j = sum_i dy_i dy_i/dx_j. Write both cases in one: dy_i/dx_j = y_i ([i = j] - y_j), and put it in.",
           "Two terms come out: dy_j y_j, and y_j times a sum over i that is the same for every j of the row.",
           "y times (dy less that sum). The sum is of dy * y along the last axis; keepdims=True keeps it beside its row."),
    see="minilora/ops/softmax.py: Softmax", points=points, cases=("", "", "one row", "float32", AXES), outputs=("dx",),
    right=right)
