"""A low-rank update of an embedding."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
An embedding looks up a row for each token id. Its low-rank update looks up
a column of A:

    a_n = A[:, v]  with v = ids_n           (N, r)
    y = W[ids] + s a B^T                    (N, d)

ids     (N,) whole numbers below V; a token may occur often
W       (V, d)        A (r, V)        B (d, r)        dy (N, d)
dA      (r, V)        what is wanted

Bring dy back to a as always, then put each row of it where its token
lives: column v of dA gets the sum over all places with that token.

>>> backward(np.array([[1.0], [10.0], [100.0]]), np.array([0, 0, 2]),
...          np.zeros((1, 4)), np.array([[1.0]]), 2.0)
array([[ 22.,   0., 200.,   0.]])
"""

CODE = """
import numpy as np


def backward(dy, ids, A, B, s):
    u = dy @ B
    dA = np.zeros_like(A)
    <blank>
    return dA
"""


def points(draw: Draw) -> dict[str, Any]:
    V, d, r, N = draw.size(), draw.size(), draw.rank(), draw.rows()
    return {"dy": draw.normal(N, d), "ids": draw.integers(V, N), "A": draw.normal(r, V), "B": draw.normal(d, r), "s": draw.s}


def right(dy: Any, ids: Any, A: Any, B: Any, s: float) -> Any:
    import numpy

    from ...lora.gradients.embedding import lora_embedding
    from ..oracle import gradients

    W = numpy.zeros((A.shape[1], B.shape[0]), A.dtype)
    return gradients(lambda A: lora_embedding(ids, W, A, B, s), A, dy=dy)[0]


puzzle = Function(
    name="tokens", teaches="scatter-add: a LoRA embedding's A", task=TASK, find="backward", code=CODE,
    answer="np.add.at(dA.T, ids, s * u)",
    mistakes=(
        Mistake("dA[:, ids] += s * u.T",
                "A token that occurs twice got only the last of its gradients, as in the puzzle index: += with a repeated "
                "index writes twice to one place."),
        Mistake("np.add.at(dA.T, ids, u)", "s is missing."),
        Mistake("dA[:, ids] = s * u.T", says="writes twice to one place"),
        Mistake("np.add.at(dA, ids, s * u)", says="Error"),
        Mistake("dA = s * u.T @ np.eye(A.shape[1])[ids]", says="write constants as Python numbers"),
        Mistake("dA = s * u.T", says="shapes differ"),
        Mistake("np.add.at(dA.T, ids, s * u / len(ids))", says="a missing factor"),
    ),
    hints=("If x_n were a row that is 1 at ids_n and 0 elsewhere, this would be the puzzle dA: s u^T x.",
           "np.add.at adds rows. The tokens of dA are its columns: which view of dA has them as rows?",
           "np.add.at(dA.T, ids, ...) writes through the view into dA. What is added is s * u."),
    see="minilora/lora/gradients/embedding.py", points=points, outputs=("dA",), right=right)
