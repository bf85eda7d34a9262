"""Where dy comes from."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Backpropagation has to begin somewhere: with the loss. Here it is the mean
of the squared differences between a prediction p and a target t,

    L = (1/n) sum (p - t)^2        over all n elements

p, t    (N, out), n = N out
dp      dL/dp, of the same shape: how L changes as each element of p does

Return dp. The next layer down will call it dy.

>>> loss_gradient(np.array([[3.0, 0.0]]), np.array([[1.0, 1.0]]))
array([[ 2., -1.]])
"""

CODE = """
import numpy as np


def loss_gradient(p, t):
    <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    shape = draw.rows(), draw.size()
    return {"p": draw.normal(*shape), "t": draw.normal(*shape)}


def right(p: Any, t: Any) -> Any:
    from ...ops import mse
    from ..oracle import gradients

    return gradients(lambda p: mse(p, t), p)[0]


puzzle = Function(
    name="loss", teaches="where dy comes from: the mean squared error", task=TASK, find="loss_gradient", code=CODE,
    answer="return 2.0 * (p - t) / p.size",
    mistakes=(
        Mistake("return (p - t) / p.size", "The square is missing from it: d/dp (p - t)^2 = 2 (p - t)."),
        Mistake("return 2.0 * (p - t) / len(p)",
                "It divides by the number of rows. The mean is over all n = N out elements: p.size."),
        Mistake("return 2.0 * (p - t)", "The 1/n of the mean is still missing."),
        Mistake("return 2.0 * (t - p) / p.size", says="sign flipped"),
        Mistake("return (p - t) ** 2 / p.size", says="wrong in"),
        Mistake("return np.float64(2.0) * (p - t) / p.size", says="write constants as Python numbers"),
        Mistake("p -= t\np *= 2.0 / p.size\nreturn p", says="p changed"),
        Mistake("return ((p - t) ** 2).mean()", "This is L itself, one number. Its gradient has one for each element of p."),
    ),
    hints=("One element of p occurs in one term of the sum only. What is the derivative of that term?",
           "d/dp of (p - t)^2 is 2 (p - t); the factor 1/n stays in front.",
           "2.0 times the difference, divided by the number of all elements, which NumPy calls p.size."),
    see="minilora/ops/loss.py: MSE", points=points, outputs=("dp",), right=right)
