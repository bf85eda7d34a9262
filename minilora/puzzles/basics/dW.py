"""The weight's gradient of a linear layer."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
The same layer, and now its weight:

    y = x W^T                 y_nk = sum_i x_ni W_ki

x       (N, in)       W (out, in)       dy (N, out)
dW      (out, in)     dL/dW, of the shape of W: what is wanted

W_ki occurs in output k of every row n, multiplied by x_ni. So this time
the sum is over the rows.

>>> backward_W(np.array([[1.0, 2.0], [3.0, -1.0]]),
...            np.array([[1.0, 0.0, 2.0], [-1.0, 1.0, 1.0]]))
array([[-2.,  3.,  5.],
       [ 3., -1.,  3.]])
"""

CODE = """
import numpy as np


def backward_W(dy, x):
    <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out = draw.rows(), draw.size(), draw.size()
    return {"dy": draw.normal(N, n_out), "x": draw.normal(N, n_in)}


def right(dy: Any, x: Any) -> Any:
    from ...ops import linear
    from ..oracle import gradients

    W = dy[:1].T * x[:1]  # any W: y is linear in it
    return gradients(lambda W: linear(x, W), W, dy=dy)[0]


puzzle = Function(
    name="dW", teaches="the gradient of a linear layer's weight", task=TASK, find="backward_W", code=CODE,
    answer="return dy.T @ x",
    mistakes=(
        Mistake("return x.T @ dy", says="equals the transpose"),
        Mistake("return dy @ x", says="ValueError"),
        Mistake("return dy.T @ x / len(x)",
                "It is the mean over the rows. The chain rule sums: the 1/n of a loss that is a mean is in dy already."),
        Mistake("return np.outer(dy[0], x[0])", "It looks at the first row only. Every row uses W: sum over all of them."),
        Mistake("return 2.0 * dy.T @ x", says="a factor 2 too many"),
    ),
    hints=("Which index disappears? In dL/dW_ki = sum over n of dy_nk x_ni it is the first axis of both arrays.",
           "A product sums over the last axis of its left factor, so the left factor has to be transposed.",
           "(out, N) times (N, in) is (out, in): the shape of W, with no choice left."),
    see="docs/lora_gradients.md, section 4", points=points, outputs=("dW",), right=right)
