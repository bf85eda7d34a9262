"""An index that repeats."""

from typing import Any

from ..draw import Draw
from ..puzzle import Function, Mistake

TASK = """
Choosing rows of an array is an operation too:

    y = x[index]              y_n = x_i        with i = index_n

x       (rows, d)
index   whole numbers, of any shape; a row may be chosen twice or never
dy      index.shape + (d,)
dx      (rows, d)     what is wanted

With index [0, 0, 2] the first row of x is copied twice, so it gets the sum
of two gradients; row 1 is not used and gets zeros.

>>> backward(np.array([[1.0], [10.0], [100.0]]), np.zeros((3, 1)),
...          np.array([0, 0, 2]))
array([[ 11.],
       [  0.],
       [100.]])
"""

CODE = """
import numpy as np


def backward(dy, x, index):
    dx = np.zeros_like(x)
    <blank>
    return dx
"""

AXES, END = "an index with two axes", "an index from the end"


def points(draw: Draw) -> dict[str, Any]:
    rows, d, n = draw.size(), draw.size(), draw.rows()
    shape = (n, 3) if draw.case == AXES else (n,)
    index = draw.integers(rows, *shape) - (rows if draw.case == END else 0)
    return {"dy": draw.normal(*shape, d), "x": draw.normal(rows, d), "index": index}


def right(dy: Any, x: Any, index: Any) -> Any:
    from ..oracle import gradients

    return gradients(lambda x: x[index], x, dy=dy)[0]


puzzle = Function(
    name="index", teaches="an index that repeats: x[[0, 0, 2]]", task=TASK, find="backward", code=CODE,
    answer="np.add.at(dx, index, dy)",
    mistakes=(
        Mistake("dx[index] += dy",
                "A row that is chosen twice got only the last of its gradients. Both = and += write once to each place: NumPy "
                "reads dx[index], adds, and writes back, and of two writes to one row the last stays."),
        Mistake("dx[index] = dy", says="the last stays"),
        Mistake("for i in index:\n    dx[i] += dy[i]",
                "It adds dy[i] to row i. dy has a row for each place n of index, and what belongs to row i is dy[n]."),
        Mistake("dx[index] = dy.sum(axis=0)", says="dx:"),
        Mistake("dx = dy", says="shapes differ"),
        Mistake("x[index] += dy", says="x changed"),
        Mistake("dx = np.zeros(x.shape)\nnp.add.at(dx, index, dy)", says="write constants as Python numbers"),
    ),
    hints=("Try it in Python: a = np.zeros(3); a[[0, 0, 2]] += 1; print(a). Is that what you expected?",
           "A loop over the positions of index, each adding its row of dy to one row of dx, is right. NumPy has a function "
           "that is that loop.",
           "np.add.at(array, index, values) adds without losing repeats: the array is dx."),
    see="minilora/ops/shape.py: GetItem", points=points, cases=("", "", "one row", "float32", AXES, END), outputs=("dx",),
    right=right)
