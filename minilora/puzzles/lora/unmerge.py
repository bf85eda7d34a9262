"""Unmerging."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
An update that was merged into a weight is to come out again. In real
numbers (W + D) - D is W. In a computer each sum is rounded, and a model
that is merged and unmerged a hundred times drifts away from its base.

Fill both methods, so that unmerge gives back the weight that was there
before merge: the same bits.

W       (out, in), belongs to the base model: do not write into it
D       the update, of the same shape

>>> weight = Weight(np.array([[0.1]]))
>>> weight.merge(np.array([[0.7]]))
>>> print(round(weight.W.item(), 3))
0.8
>>> weight.unmerge()
>>> print(weight.W.item() == 0.1)
True
"""

CODE = """
import numpy as np


class Weight:
    def __init__(self, W):
        self.W = W

    def merge(self, D):
        <blank>

    def unmerge(self):
        <blank>
"""


def points(draw: Draw) -> dict[str, Any]:
    shape = draw.size(), draw.size()
    return {"W": draw.normal(*shape), "D": draw.normal(*shape)}


def run(answer: Any, inputs: dict[str, Any]) -> Any:
    weight = answer(inputs["W"])
    weight.merge(inputs["D"])
    merged = weight.W
    weight.unmerge()
    once = weight.W
    weight.merge(inputs["D"])
    weight.unmerge()
    return merged, once, weight.W


def right(W: Any, D: Any) -> Any:
    return W + D, W, W


puzzle = Function(
    name="unmerge", teaches="out again, to the last bit", task=TASK, find="Weight", code=CODE,
    answer=("self.kept = self.W\nself.W = self.W + D", "self.W = self.kept"),
    mistakes=(
        Mistake(("self.D = D\nself.W = self.W + D", "self.W = self.W - self.D"),
                "Adding D rounded digits of W away, and no subtraction brings them back. Keep what must come back."),
        Mistake(("self.kept = self.W\nself.W += D", "self.W = self.kept"), says="W changed"),
        Mistake(("self.kept = self.W.copy()\nself.W = self.W + D", "pass"), says="unmerged"),
        Mistake(("self.kept = self.W + D", "self.W = self.kept"), says="merged"),
        Mistake(("self.D = D\nself.W = self.W + D", "self.W = self.D - self.W"), says="unmerged"),
        Mistake(("self.kept = self.W\nself.W = self.W + D", "self.W = self.keep"), says="AttributeError"),
    ),
    hints=("Try it: (0.1 + 0.7) - 0.7 in Python. What is lost, and when?",
           "What is lost in merge cannot be computed in unmerge. Something has to be kept.",
           "In merge keep self.W under another name, then give self.W a new array (+, not +=). In unmerge put the kept "
           "one back."),
    see="docs/adapters.md (the library keeps fewer bytes than a copy)", points=points, cases=("", "", "float32"),
    outputs=("merged", "unmerged", "unmerged again"), right=right, run=run, exact=True)
