"""Micro-batches of unequal size."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
A batch that does not fit into memory is cut into micro-batches. The loss is
a mean over rows (or tokens), and each micro-batch gives the gradient of its
own mean. Put them together to the gradient of the mean over all rows, the
one that the whole batch would have given.

gradients    a list of arrays of one shape, one for each micro-batch
counts       a list of whole numbers: how many rows each of them had

>>> accumulate([np.array([1.0]), np.array([4.0])], [1, 2])
array([3.])
"""

CODE = """
import numpy as np


def accumulate(gradients, counts):
    <blank>
"""

EQUAL, ONE = "equal counts", "a single micro-batch"


def points(draw: Draw) -> dict[str, Any]:
    shape, n = (draw.size(), draw.size()), 1 if draw.case == ONE else 3
    counts = [4] * n if draw.case == EQUAL else [draw.size() for _ in range(n)]
    return {"gradients": [draw.normal(*shape) for _ in range(n)], "counts": counts}


def right(gradients: list[Any], counts: list[int]) -> Any:
    """Row by row: each row of a micro-batch has its mean as the gradient."""
    import numpy

    return numpy.concatenate([numpy.repeat(g[None], n, axis=0) for g, n in zip(gradients, counts)]).mean(axis=0)


puzzle = Function(
    name="accumulate", teaches="gradients of unequal micro-batches", task=TASK, find="accumulate", code=CODE,
    answer="rows = sum(counts)\nreturn sum(n / rows * g for g, n in zip(gradients, counts))",
    mistakes=(
        Mistake("return sum(gradients) / len(gradients)",
                "It is the mean over micro-batches: a row in a short one counts more than a row in a long one. Real "
                "trainers have had this fault: it shows where texts of unequal length are padded."),
        Mistake("return sum(gradients)", "It is the plain sum: each is a mean already, of its own rows."),
        Mistake("return sum(n * g for g, n in zip(gradients, counts))",
                "It is the sum over rows: divide by how many rows there are in all."),
        Mistake("return sum(g / n for g, n in zip(gradients, counts)) * sum(counts)", says="wrong in"),
        Mistake("for g, n in zip(gradients, counts):\n    g *= n\nreturn sum(gradients) / sum(counts)",
                says="gradients changed"),
        Mistake("return np.average(gradients, axis=0, weights=counts)", says="write constants as Python numbers"),
    ),
    hints=("Undo the means: what is the sum over the rows of one micro-batch?",
           "A mean times its count is a sum. Add the sums, and divide by all rows.",
           "Each gradient has the weight n / sum(counts); the weights sum to 1."),
    see="docs/training.md", points=points, cases=("", "", EQUAL, ONE, "float32"), outputs=("gradient",), right=right)
