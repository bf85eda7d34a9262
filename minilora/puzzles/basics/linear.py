"""A whole operation, in the form in which the library has it."""

from typing import Any

from ..draw import Draw
from ..draw import CASES
from ..puzzle import Mistake, Operation

TASK = """
In minilora an operation is a class: forward computes y and says what
backward will need (self.save), backward takes dy and returns one gradient
for each input of forward, in the same order, as a tuple. Both work on plain
NumPy arrays. Here is the linear layer with a bias.

    y = x W^T + b

x       (..., in)     any number of axes in front, such as batch and time
W       (out, in)     b (out,)      y and dy (..., out)

Return dx, dW, db, shaped as x, W, b. With two rows: dx and dW as before,
and b was copied to every row. With more axes in front, first lay all rows
below one another: a.reshape(-1, a.shape[-1]).

>>> op = Linear()
>>> y = op.forward(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 5.0]]),
...                np.array([10.0]))
>>> dx, dW, db = op.backward(np.array([[1.0], [2.0]]))
>>> dx.tolist(), dW.tolist(), db.tolist()
([[1.0, 5.0], [2.0, 10.0]], [[7.0, 10.0]], [3.0])
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class Linear(Op):
    """y = x W^T + b"""

    def forward(self, x, W, b):
        self.save(x, W)
        return x @ W.T + b

    def backward(self, dy):
        x, W = self.saved
        <blank>
'''

AXES = "batch and time"


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out = draw.rows(), draw.size(), draw.size()
    front = (2, N) if draw.case == AXES else (N,)
    return {"x": draw.normal(*front, n_in), "W": draw.normal(n_out, n_in), "b": draw.normal(n_out)}


ROWS = "rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])\n"

puzzle = Operation(
    name="linear", teaches="a whole operation: one gradient for each input", task=TASK, find="Linear", code=CODE,
    answer=ROWS + "return dy @ W, dy_rows.T @ rows, dy_rows.sum(axis=0)",
    mistakes=(
        Mistake(ROWS + "return dy_rows.T @ rows, dy @ W, dy_rows.sum(axis=0)", says="x"),
        Mistake(ROWS + "return dy @ W, dy_rows.T @ rows", says="2 gradients for 3 inputs"),
        Mistake(ROWS + "return dy @ W, dy_rows.T @ rows, dy", says="shape"),
        Mistake(ROWS + "return dy @ W, dy_rows.T @ rows, dy_rows.mean(axis=0)",
                "db is the mean over the rows: sum where you copied."),
        Mistake("return dy @ W, dy.T @ x, dy.sum(axis=0)", says="batch and time"),
        Mistake(ROWS + "dy *= 1.0\ndy += 0.5\nreturn dy @ W, dy_rows.T @ rows, dy_rows.sum(axis=0)", says="dy"),
        Mistake(ROWS + "return dy @ W, dy_rows.T @ rows, None", says="None"),
    ),
    hints=("You have dx and dW from the puzzles before, and unbroadcast says what to do for b.",
           "dx = dy @ W works for any axes in front. dW and db sum over all rows: lay them below one another first.",
           "With rows and dy_rows, the two reshaped arrays: dW is dy_rows.T @ rows, db is dy_rows summed over axis 0. Return "
           "the three in the order of forward's arguments."),
    see="minilora/ops/linear.py: Linear", points=points, cases=(*CASES, AXES), wanted=("x", "W", "b"))
