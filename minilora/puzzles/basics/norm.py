"""The backward of RMSNorm."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
RMSNorm divides each row by its own size, the root of the mean square:

    rstd = 1 / sqrt(mean_i x_i^2 + eps)        y = x rstd

x       (N, n)        dy (N, n)
dx      (N, n)        what is wanted

Each x_i reaches L twice: through its own y_i, and through rstd, which all
y's of the row share. Along the second path

    drstd/dx_j = -(1/n) x_j rstd^3

>>> backward(np.array([[1.0, 0.0]]), np.array([[3.0, 1.0]]), 0.0).round(3)
array([[ 0.045, -0.134]])
"""

CODE = """
import numpy as np


def backward(dy, x, eps):
    rstd = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    y = x * rstd
    <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    shape = draw.rows(), draw.size()
    return {"dy": draw.normal(*shape), "x": draw.normal(*shape), "eps": 0.1}


def right(dy: Any, x: Any, eps: float) -> Any:
    from ...ops import rms_norm
    from ..oracle import gradients

    return gradients(lambda x: rms_norm(x, eps=eps), x, dy=dy)[0]


puzzle = Function(
    name="norm", teaches="the backward of RMSNorm: two paths, one shared", task=TASK, find="backward", code=CODE,
    answer="return rstd * (dy - y * (dy * y).mean(axis=-1, keepdims=True))",
    mistakes=(
        Mistake("return dy * rstd",
                "The second path is missing: rstd is taken as a constant, and it depends on every x of the row."),
        Mistake("return rstd * (dy - y * (dy * y).sum(axis=-1, keepdims=True))",
                "The 1/n of the mean is missing in the second path: mean, not sum."),
        Mistake("return rstd * (dy + y * (dy * y).mean(axis=-1, keepdims=True))",
                "The second path has the wrong sign: where x grows, rstd shrinks."),
        Mistake("return rstd * (dy - y * (dy * y).mean())", says="wrong in"),
        Mistake("return rstd * (dy - x * (dy * x).mean(axis=-1, keepdims=True))", says="wrong in"),
        Mistake("return rstd * (dy - dy.mean(axis=-1, keepdims=True) - y * (dy * y).mean(axis=-1, keepdims=True))",
                "It also takes away the mean of dy. That belongs to LayerNorm, which takes away the mean of x; "
                "RMSNorm does not."),
    ),
    hints=("First path: dy_j rstd. Second path: drstd = sum_i dy_i x_i, for the whole row, times drstd/dx_j.",
           "Put y = x rstd in: the second path is -rstd y_j times the mean over i of dy_i y_i.",
           "rstd stands in front of both: rstd * (dy - y * something), and something is the mean of dy * y along the last "
           "axis, with keepdims=True."),
    see="minilora/ops/norm.py: RMSNorm", points=points, outputs=("dx",), right=right)
