"""Two adapters as one."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Two adapters of one layer, of different ranks, are to become one adapter
whose update is their sum:

    s1 B1 A1 + s2 B2 A2  =  B A             with s = 1

A1 (r1, in)   B1 (out, r1)        A2 (r2, in)   B2 (out, r2)

Return A (r1 + r2, in) and B (out, r1 + r2). Nothing is approximated: a
product of matrices is a sum over its inner index, and a sum may be longer.

>>> A, B = join(np.array([[1.0, 0.0]]), np.array([[1.0]]), 2.0,
...             np.array([[0.0, 1.0]]), np.array([[1.0]]), 3.0)
>>> B @ A
array([[2., 3.]])
"""

CODE = """
import numpy as np


def join(A1, B1, s1, A2, B2, s2):
    <blank>
"""


EQUAL = "equal ranks"


def points(draw: Draw) -> dict[str, Any]:
    n_in, n_out, r1, r2 = draw.size(), draw.size(), draw.rank(), draw.rank()
    r2 = r1 if draw.case == EQUAL else r2
    return {"A1": draw.normal(r1, n_in), "B1": draw.normal(n_out, r1), "s1": draw.s,
            "A2": draw.normal(r2, n_in), "B2": draw.normal(n_out, r2), "s2": draw.s + 0.7}


def run(answer: Any, inputs: dict[str, Any]) -> Any:
    """There are many right pairs: what counts is their product, and that they are as small as was asked."""
    given = answer(*inputs.values())
    if not isinstance(given, tuple) or len(given) != 2:
        return given
    A, B = given
    if A.shape[0] != B.shape[-1]:
        raise ValueError(f"A {A.shape} has {A.shape[0]} rows and B {B.shape} has {B.shape[-1]} columns: there must be as many")
    return B @ A, float(len(A))


def right(A1: Any, B1: Any, s1: float, A2: Any, B2: Any, s2: float) -> Any:
    from ...lora.gradient import delta

    return delta(A1, B1, s1) + delta(A2, B2, s2), float(len(A1) + len(A2))


puzzle = Function(
    name="join", teaches="two adapters side by side are their sum", task=TASK, find="join", code=CODE,
    answer=("A = np.concatenate([A1, A2])\n"
            "B = np.concatenate([s1 * B1, s2 * B2], axis=1)\n"
            "return A, B"),
    mistakes=(
        Mistake("return A1 + A2, s1 * B1 + s2 * B2", "(A1 + A2)(B1 + B2) multiplies out to four products, two of them between "
                "the adapters. Lay them side by side, and only their own products remain."),
        Mistake("return np.concatenate([A1, A2]), np.concatenate([B1, B2], axis=1)",
                "s1 and s2 are lost: the joined adapter has s = 1."),
        Mistake("return np.concatenate([s1 * A1, s2 * A2]), np.concatenate([s1 * B1, s2 * B2], axis=1)",
                "Each scaling is there twice, in A and in B. One of them is enough."),
        Mistake("return np.concatenate([A1, A2]), np.concatenate([B1, B2])", says="ValueError"),
        Mistake("return np.concatenate([A2, A1]), np.concatenate([s1 * B1, s2 * B2], axis=1)", says="D:"),
        Mistake("D = s1 * B1 @ A1 + s2 * B2 @ A2\nreturn D, np.eye(len(D), dtype=D.dtype)", says="rank"),
    ),
    hints=("B A = sum over j of (column j of B) (row j of A). Which columns and rows give both sums?",
           "Put A2 below A1, and B2 to the right of B1, in the same order. The scalings have to go into one of A and B.",
           "np.concatenate([A1, A2]) for A; for B the two B's, each times its s, along axis=1."),
    see="docs/adapter_algebra.md", points=points, cases=(EQUAL, "", "float32"), outputs=("D", "rank"), right=right, run=run)
