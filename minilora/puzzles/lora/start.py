"""The first step, and why B starts at zero."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
LoRA starts with A random and B = 0. Then D = s B A = 0: the adapted model
is at first the base model. But can it train from there? Look at

    dB = s dy^T z      with z = x A^T
    dA = s u^T x       with u = dy B

A_zero, B_zero    whether all of A, or of B, is 0 at the start

Return three truths, True or False:
    dA is not zero in the first step
    dB is not zero in the first step
    the update will ever change, however long one trains

>>> start(False, False)
(True, True, True)
"""

CODE = """
import numpy as np


def start(A_zero, B_zero):
    <blank>
"""

B_ZERO, A_ZERO, BOTH, NEITHER = "B = 0", "A = 0", "both zero", "neither zero"


def points(draw: Draw) -> dict[str, Any]:
    return {"A_zero": draw.case in (A_ZERO, BOTH), "B_zero": draw.case in (B_ZERO, BOTH)}


def right(A_zero: bool, B_zero: bool) -> tuple[bool, bool, bool]:
    """By trying it: a few steps of gradient descent."""
    import numpy

    from ...lora import lora_linear
    from ...ops import mse
    from ..oracle import gradients

    rng = numpy.random.default_rng(0)
    x, W, t = (rng.standard_normal(shape) for shape in ((5, 4), (3, 4), (5, 3)))
    A = rng.standard_normal((2, 4)) * (not A_zero)
    B = rng.standard_normal((3, 2)) * (not B_zero)
    steps = []
    for _ in range(3):
        steps.append(gradients(lambda A, B: mse(lora_linear(x, W, None, A, B, 0.5), t), A, B))
        A, B = (value - 0.1 * gradient for value, gradient in zip((A, B), steps[-1]))
    moved = [[bool(gradient.any()) for gradient in step] for step in steps]
    return moved[0][0], moved[0][1], any(map(any, moved))


puzzle = Function(
    name="start", teaches="B = 0: what moves first, and what never trains", task=TASK, find="start", code=CODE,
    answer="return not B_zero, not A_zero, not (A_zero and B_zero)",
    mistakes=(
        Mistake("return not A_zero, not B_zero, not (A_zero and B_zero)",
                "The other way round: dA does not contain A but B (through u), and dB does not contain B but A (through z)."),
        Mistake("return True, True, True", says="dA is True, and should be False"),
        Mistake("return not B_zero, not A_zero, not B_zero",
                "With B = 0 only B moves in the first step, but then B is not 0 any more and A moves too. It trains."),
        Mistake("return not B_zero, not A_zero, True", says="ever is True, and should be False"),
        Mistake("return not B_zero, not A_zero", says="3 values"),
        Mistake("return 1, 1, 1", says="should be True or False"),
    ),
    hints=("dB is a product of dy and z. When is z zero? And u?",
           "A = 0 makes z = 0 and with it dB. B = 0 makes u = 0 and with it dA. Each needs the other to be there.",
           "dA moves if not B_zero, dB if not A_zero. If one of them moves, the other can follow in step 2; if none does, "
           "every later step looks like the first."),
    see="docs/lora_gradients.md, section 9", points=points, cases=(B_ZERO, A_ZERO, BOTH, NEITHER),
    outputs=("dA", "dB", "ever"), right=right)
