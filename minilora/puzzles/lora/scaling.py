"""The factor s."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
LoRA adds a low-rank update to a frozen weight W:

    W + D        D = s B A        A (r, in), B (out, r)

D is a sum of r terms, so its size grows with the rank r. The scaling s
evens that out, and lora_alpha says how strong the update is to be:

    s = lora_alpha / r               as in the LoRA paper
    s = lora_alpha / sqrt(r)         rank-stabilised LoRA (use_rslora=True)

The second holds for large r, where the r terms point in different
directions and their sum grows like sqrt(r).

Return s. It must be a Python float: a NumPy number would turn float32
arrays into float64 when it is multiplied with them.

>>> scaling(16, 8, False)
2.0
>>> scaling(16, 64, True)
2.0
"""

CODE = """
import math

import numpy as np


def scaling(lora_alpha, r, use_rslora):
    <blank>
"""

STABLE = "rank-stabilised"


def points(draw: Draw) -> dict[str, Any]:
    return {"lora_alpha": 2 * draw.size() + 1, "r": draw.rank(), "use_rslora": draw.case == STABLE}


def right(lora_alpha: int, r: int, use_rslora: bool) -> float:
    from ...lora import scaling

    return scaling(lora_alpha, r, use_rslora)


puzzle = Function(
    name="scaling", teaches="s = lora_alpha / r, and its rank-stabilised form", task=TASK, find="scaling", code=CODE,
    answer="return lora_alpha / (math.sqrt(r) if use_rslora else r)",
    mistakes=(
        Mistake("return lora_alpha / r", "It is alpha / r. Here use_rslora is True: divide by the root of r."),
        Mistake("return r / lora_alpha", "It is upside down: a larger lora_alpha makes a stronger update."),
        Mistake("return lora_alpha / (np.sqrt(r) if use_rslora else r)", says="numpy.float64"),
        Mistake("return lora_alpha / (r ** 2 if use_rslora else r)", says="should be"),
        Mistake("return lora_alpha // r", says="should be"),
    ),
    hints=("There are two formulas, and use_rslora says which one.",
           "math.sqrt gives a Python float; np.sqrt does not.",
           "lora_alpha divided by math.sqrt(r) if use_rslora, else by r: Python's / gives a float."),
    see="minilora/lora/gradient.py: scaling", points=points, cases=("", "", STABLE, STABLE), outputs=("s",), right=right)
