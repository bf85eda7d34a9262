"""DoRA's length."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
DoRA trains the direction of each row of a weight by a low-rank update, and
its length m_k as a number of its own:

    V = W + s B A             c_k = sqrt(sum_i V_ki^2)
    M_ki = m_k V_ki / c_k     the weight in use

V, M    (out, in)     m, c (out,)     dM (out, in) = dL/dM
return  dm (out,) and dV (out, in)

It is the puzzle norm again, with rows of a weight. As there, V_ki reaches
L twice: by itself, and through c_k, which its whole row shares. A change
of V along V changes nothing: only c absorbs it, for the length is m's.

>>> dm, dV = backward(np.array([[1.0, 2.0]]), np.array([[3.0, 0.0]]),
...                   np.array([6.0]))
>>> dm.tolist(), dV.tolist()
([1.0], [[0.0, 4.0]])
"""

CODE = """
import numpy as np


def backward(dM, V, m):
    c = np.sqrt((V * V).sum(axis=1, keepdims=True))   # (out, 1)
    direction = V / c
    <blank>
    return dm, dV
"""


def points(draw: Draw) -> dict[str, Any]:
    n_out, n_in = draw.rows(), draw.size()
    return {"dM": draw.normal(n_out, n_in), "V": draw.normal(n_out, n_in), "m": draw.normal(n_out) + 3.0}


def right(dM: Any, V: Any, m: Any) -> Any:
    import numpy

    from ...lora.gradients.dora import dora_scale
    from ..oracle import gradients

    A, B = numpy.zeros((1, V.shape[1]), V.dtype), numpy.zeros((len(V), 1), V.dtype)
    return gradients(lambda m, V: dora_scale(V, A, B, m, 1.0, exact=True).reshape(-1, 1) * V, m, V, dy=dM)


DM = "dm = (dM * direction).sum(axis=1)\n"
M_ROWS = "(m[:, None] / c)"

puzzle = Function(
    name="length", teaches="DoRA's length: the gradient through a norm", task=TASK, find="backward", code=CODE,
    answer=DM + f"dV = {M_ROWS} * (dM - dm[:, None] * direction)",
    mistakes=(
        Mistake(DM + f"dV = {M_ROWS} * dM",
                "dV takes c as a constant. (The DoRA paper proposes that to save memory, and PEFT does it; the full gradient "
                "has a second part, through c.)"),
        Mistake("dm = (dM * V).sum(axis=1)\n"
                f"dV = {M_ROWS} * (dM - (dM * direction).sum(axis=1, keepdims=True) * direction)",
                "dm was formed with V. m_k meets V_ki / c_k: the direction."),
        Mistake(DM + f"dV = {M_ROWS} * (dM + dm[:, None] * direction)",
                "The part through c has the wrong sign: a longer row divides more."),
        Mistake(DM + "dV = (dM - dm[:, None] * direction) / c", "dV has no m: the row in use is m_k times the direction."),
        Mistake("dm = dM * direction\ndV = dM", says="shapes differ"),
        Mistake(DM + "dV = (m / c) * (dM - dm[:, None] * direction)", says="Error"),
    ),
    hints=("dm is the easy one: M_ki = m_k direction_ki, and m_k was copied along its row.",
           "dV: as in norm, a first part m_k / c_k dM_ki, and a second one through c that takes away the part of it along the "
           "row's own direction.",
           "How much of dM lies along direction is dm. So dV is m / c times (dM less dm times direction), with m and dm as "
           "columns: m[:, None]."),
    see="minilora/lora/gradients/dora.py", points=points, outputs=("dm", "dV"), right=right)
