"""One adapter, two layers."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Two layers in a row share one A and one B:

    h = x + s (x A^T) B^T            the first use
    y = h + s (h A^T) B^T            the second use

x, h, y    (N, d)       A (r, d)       B (d, r)

The backward of one use is given. Walk back through both, the last first,
and return dx, dA, dB. A is one matrix that reaches the loss along two
paths, and so is B: what does the chain rule do with paths?

>>> x, A, B = np.array([[1.0]]), np.array([[1.0]]), np.array([[1.0]])
>>> backward(np.array([[1.0]]), x, 2.0 * x, A, B, 1.0)   # y = x (1 + A B)^2
(array([[4.]]), array([[4.]]), array([[4.]]))
"""

CODE = """
import numpy as np


def one_use(dy, x, A, B, s):
    u = dy @ B
    return dy + s * u @ A, s * u.T @ x, s * dy.T @ (x @ A.T)   # dx, dA, dB


def backward(dy, x, h, A, B, s):
    <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    N, d, r = draw.rows(), draw.size(), draw.rank()
    x, A, B = draw.normal(N, d), draw.normal(r, d), draw.normal(d, r)
    return {"dy": draw.normal(N, d), "x": x, "h": x + draw.s * (x @ A.T) @ B.T, "A": A, "B": B, "s": draw.s}


def right(dy: Any, x: Any, h: Any, A: Any, B: Any, s: float) -> Any:
    import numpy

    from ...lora import lora_linear
    from ..oracle import gradients

    one = numpy.eye(x.shape[1], dtype=x.dtype)
    return gradients(lambda x, A, B: lora_linear(lora_linear(x, one, None, A, B, s), one, None, A, B, s), x, A, B, dy=dy)


puzzle = Function(
    name="shared", teaches="a shared adapter sums", task=TASK, find="backward", code=CODE,
    answer=("dh, dA2, dB2 = one_use(dy, h, A, B, s)\n"
            "dx, dA1, dB1 = one_use(dh, x, A, B, s)\n"
            "return dx, dA1 + dA2, dB1 + dB2"),
    mistakes=(
        Mistake("dh, dA, dB = one_use(dy, h, A, B, s)\ndx, dA, dB = one_use(dh, x, A, B, s)\nreturn dx, dA, dB",
                "The second line overwrote dA and dB of the second use. Both uses reach the loss: add them."),
        Mistake("dh, dA2, dB2 = one_use(dy, h, A, B, s)\ndx, dA1, dB1 = one_use(dh, x, A, B, s)\n"
                "return dx, (dA1 + dA2) / 2.0, (dB1 + dB2) / 2.0",
                "It is the mean of both uses. The chain rule sums over paths."),
        Mistake("dx2, dA2, dB2 = one_use(dy, h, A, B, s)\ndx1, dA1, dB1 = one_use(dy, x, A, B, s)\n"
                "return dx1 + dx2, dA1 + dA2, dB1 + dB2",
                "The first use was given dy. The two stand in a row: what reaches the first is dh, which the "
                "second one gives."),
        Mistake("dh, dA2, dB2 = one_use(dy, x, A, B, s)\ndx, dA1, dB1 = one_use(dh, x, A, B, s)\n"
                "return dx, dA1 + dA2, dB1 + dB2", "The second use was given x. Its input was h."),
        Mistake("dh, dA1, dB1 = one_use(dy, x, A, B, s)\ndx, dA2, dB2 = one_use(dh, h, A, B, s)\n"
                "return dx, dA1 + dA2, dB1 + dB2",
                "The uses are in the order of forward. Backward meets the second one first, whose input was h."),
        Mistake("dh, dA, dB = one_use(dy, h, A, B, s)\nreturn dh, dA, dB",
                "It stops after the second use: walk back through the first too."),
    ),
    hints=("Start with the use that is nearest to the loss. What was its input, and what is its dy?",
           "The dx of the second use is the dy of the first. Each call gives its own part of dA and dB.",
           "one_use(dy, h, ...) gives dh and one pair, one_use(dh, x, ...) gives dx and another pair: return dx and the sums."),
    see="docs/engine.md, How backward walks", points=points, outputs=("dx", "dA", "dB"), right=right)
