"""dB, and why z is kept."""

from typing import Any

from ..draw import Draw
from ..puzzle import Mistake, Operation

TASK = """
The update alone, without W: x goes through A, then through B.

    z = x A^T                 z_nj = sum_i x_ni A_ji
    y = s z B^T               y_nk = s sum_j z_nj B_kj

x       (N, in)       A (r, in)       z (N, r)       B (out, r)
dy      (N, out)      s a number, self.s
dB      (out, r)      what is wanted

forward has z at hand and keeps it: it is small (N r numbers), and makes dB
one product. Seen from B, this is a linear layer with the input s z.
x and A count as constants here, so their gradients are None.

>>> op = LowRank()
>>> op.s = 2.0
>>> y = op.forward(np.array([[1.0, 0.0, 2.0], [-1.0, 1.0, 1.0]]),
...                np.array([[1.0, 2.0, 1.0]]), np.array([[1.0], [-2.0]]))
>>> op.backward(np.array([[1.0, 2.0], [3.0, -1.0]]))[2].tolist()
[[18.0], [8.0]]
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class LowRank(Op):
    """y = s (x A^T) B^T"""

    def forward(self, x, A, B):
        z = x @ A.T
        self.save(z)
        return self.s * z @ B.T

    def backward(self, dy):
        (z,) = self.saved
        <blank>
        return None, None, dB
'''


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out, r = draw.rows(), draw.size(), draw.size(), draw.rank()
    return {"x": draw.normal(N, n_in), "A": draw.normal(r, n_in), "B": draw.normal(n_out, r), "s": draw.s}


puzzle = Operation(
    name="dB", teaches="z = x A^T is kept: dB is one product", task=TASK, find="LowRank", code=CODE,
    answer="dB = self.s * dy.T @ z",
    mistakes=(
        Mistake("dB = dy.T @ z",
                "s is missing. It multiplies the update in forward, so by the chain rule it multiplies dB too."),
        Mistake("dB = self.s * self.s * dy.T @ z", "s is there twice. z was kept before s was applied: multiply once."),
        Mistake("dB = self.s * z.T @ dy", says="got shape"),
        Mistake("dB = self.s * dy @ z", says="ValueError"),
        Mistake("dB = self.s * dy.T @ z / len(dy)", says="a missing factor"),
        Mistake("dB = -self.s * dy.T @ z", says="sign flipped"),
        Mistake("dB = 0.0 * dy.T @ z", says="zero"),
    ),
    hints=("In y = (s z) B^T, what plays the part that x plays in y = x W^T, and what that of W?",
           "dW was dy.T @ x. Put B for W and s z for x.",
           "s times the transposed dy times z: (out, N) times (N, r)."),
    see="docs/lora_gradients.md, sections 3 and 4", points=points, wanted=("B",), settings=("s",))
