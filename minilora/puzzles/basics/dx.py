"""The input's gradient of a linear layer."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
A linear layer multiplies each row of x by the transposed weight:

    y = x W^T                 y_nk = sum_i x_ni W_ki

x       (N, in)       W (out, in)       y (N, out)
dy      (N, out)      dL/dy, handed down by whatever follows the layer
dx      (N, in)       dL/dx: what is wanted

x_ni occurs in every output k of its row n, multiplied by W_ki. The chain
rule sums over all the y's through which x_ni reaches L.

>>> backward_x(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0, -1.0],
...                                              [2.0, 1.0, 0.0]]))
array([[ 5.,  2., -1.]])
"""

CODE = """
import numpy as np


def backward_x(dy, W):
    <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out = draw.rows(), draw.size(), draw.size()
    return {"dy": draw.normal(N, n_out), "W": draw.normal(n_out, n_in)}


def right(dy: Any, W: Any) -> Any:
    from ...ops import linear
    from ..oracle import gradients

    x = dy[:, :1] * W[:1]  # any x: y is linear in it
    return gradients(lambda x: linear(x, W), x, dy=dy)[0]


puzzle = Function(
    name="dx", teaches="the gradient of a linear layer's input", task=TASK, find="backward_x", code=CODE,
    answer="return dy @ W",
    mistakes=(
        Mistake("return W.T @ dy.T", says="equals the transpose"),
        Mistake("return dy @ W.T", says="ValueError"),
        Mistake("return dy @ W / len(dy)",
                "It is divided by the number of rows. dy brings the 1/n of the loss with it already: no average here."),
        Mistake("return -dy @ W", says="sign flipped"),
        Mistake("dx = dy @ W", says="is its return missing?"),
    ),
    hints=("Write out dL/dx_ni = sum over k of dL/dy_nk times dy_nk/dx_ni, and say it as a matrix product.",
           "The index that disappears is k, the outputs: the last axis of dy and the first of W.",
           "(N, out) times (out, in) is (N, in): nothing has to be transposed."),
    see="docs/lora_gradients.md, section 4", points=points, outputs=("dx",), right=right)
