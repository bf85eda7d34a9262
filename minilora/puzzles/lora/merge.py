"""Merging."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
A trained update can be added into the weight: then one product does what
three did, and the model costs no more than the base.

    y = x W^T + s (x A^T) B^T  =  x (W + D)^T       D = s B A

W       (out, in); or stored as (in, out) where fan_in_fan_out is True,
        as in GPT-2, whose layers compute x W
A       (r, in)       B (out, r)       s a number
return  the merged weight, stored in the same way as W

W belongs to the base model and must stay as it is.

>>> W, A, B = np.zeros((2, 3)), np.array([[1.0, 2.0, 3.0]]), np.array([[1.0],
...                                                                    [2.0]])
>>> merged(W, A, B, 0.5, False)
array([[0.5, 1. , 1.5],
       [1. , 2. , 3. ]])
"""

CODE = """
import numpy as np


def merged(W, A, B, s, fan_in_fan_out):
    <blank>
"""

TURNED = "fan_in_fan_out"


def points(draw: Draw) -> dict[str, Any]:
    n_in, n_out, r = draw.size(), draw.size(), draw.rank()
    turned = draw.case == TURNED
    W = draw.normal(*((n_in, n_out) if turned else (n_out, n_in)))
    return {"W": W, "A": draw.normal(r, n_in), "B": draw.normal(n_out, r), "s": draw.s, "fan_in_fan_out": turned}


def right(W: Any, A: Any, B: Any, s: float, fan_in_fan_out: bool) -> Any:
    """What the layer makes of each unit vector is the merged weight, row by row of its transpose."""
    import numpy

    from ...lora import lora_linear
    from ...tensor import tensor

    one = tensor(numpy.eye(A.shape[1], dtype=W.dtype))
    transposed = lora_linear(one, W.T.copy() if fan_in_fan_out else W, None, A, B, s).data
    return transposed.copy() if fan_in_fan_out else transposed.T.copy()


puzzle = Function(
    name="merge", teaches="merged = forward: W + s B A, for both ways to store W", task=TASK, find="merged", code=CODE,
    answer="D = s * B @ A\nreturn W + (D.T if fan_in_fan_out else D)",
    mistakes=(
        Mistake("return W + (B @ A).T if fan_in_fan_out else W + B @ A",
                "s is missing: the file's lora_alpha would do nothing."),
        Mistake("return W + s * B @ A", says="ValueError"),
        Mistake("return W + s * (B @ A).reshape(W.shape)",
                "reshape keeps the order of the numbers in memory; the transpose of D is D.T."),
        Mistake("D = s * B @ A\nW += D.T if fan_in_fan_out else D\nreturn W", says="W changed"),
        Mistake("D = s * B @ A\nreturn D.T if fan_in_fan_out else D", "It is D alone: the base weight is to be added."),
        Mistake("D = s * s * B @ A\nreturn W + (D.T if fan_in_fan_out else D)", "s is there twice."),
        Mistake("return W + s * A @ B", says="ValueError"),
    ),
    hints=("Which of B A and A B has the shape of W? And of its transpose?",
           "D = s B A is (out, in). A weight stored as (in, out) needs D transposed.",
           "Return W plus D, or plus D.T if fan_in_fan_out. Plus makes a new array; += would write into W."),
    see="docs/adapters.md", points=points, cases=("", "", TURNED, "float32"), outputs=("weight",), right=right)
