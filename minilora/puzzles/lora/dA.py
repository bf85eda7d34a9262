"""dA, through u."""

from typing import Any

from ..draw import Draw
from ..puzzle import Mistake, Operation
from .dB import points as points_of_dB

TASK = """
The same update, and now its first matrix:

    z = x A^T                 z_nj = sum_i x_ni A_ji
    y = s z B^T               y_nk = s sum_j z_nj B_kj

x       (N, in)       A (r, in)       B (out, r)       dy (N, out)
dA      (r, in)       what is wanted

A reaches L through z. So first bring dy back to z,

    dL/dz_nj = s sum_k dy_nk B_kj = s u_nj        u = dy B  (N, r)

and then from z to A, which is a linear layer with the input x. Form u
first: (dy B) is small, while dy^T x would have the size of W.

>>> op = LowRank()
>>> op.s = 2.0
>>> y = op.forward(np.array([[1.0, 0.0, 2.0], [-1.0, 1.0, 1.0]]),
...                np.array([[1.0, 2.0, 1.0]]), np.array([[1.0], [-2.0]]))
>>> op.backward(np.array([[1.0, 2.0], [3.0, -1.0]]))[1].tolist()
[[-16.0, 10.0, -2.0]]
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class LowRank(Op):
    """y = s (x A^T) B^T"""

    def forward(self, x, A, B):
        z = x @ A.T
        self.save(x, z, B)
        return self.s * z @ B.T

    def backward(self, dy):
        x, z, B = self.saved
        dB = self.s * dy.T @ z
        <blank>
        return None, dA, dB
'''


def points(draw: Draw) -> dict[str, Any]:
    return points_of_dB(draw)


puzzle = Operation(
    name="dA", teaches="u = dy B brings the gradient back to z: dA", task=TASK, find="LowRank", code=CODE,
    answer="u = dy @ B\ndA = self.s * u.T @ x",
    mistakes=(
        Mistake("u = dy @ B\ndA = u.T @ x", "s is missing. It stands between z and y, so dL/dz = s u."),
        Mistake("u = self.s * dy @ B\ndA = self.s * u.T @ x", "s is there twice: once in u, and once more after it."),
        Mistake("u = dy @ B\ndA = self.s * x.T @ u", says="got shape"),
        Mistake("dA = self.s * dy.T @ x", says="shape"),
        Mistake("dA = self.s * z.T @ x",
                "It uses z where u belongs: z is what x is seen through A, u what dy is seen through B."),
        Mistake("u = dy @ B.T\ndA = self.s * u.T @ x", says="ValueError"),
        Mistake("dA = np.zeros_like(x[0] * z[0][:, None])", says="zero"),
    ),
    hints=("Two steps of what you know: dx of the layer with weight B, then dW of the layer with weight A.",
           "The first gives u, dy times B. The second is dW = dy.T @ x with s u in the place of dy.",
           "dA is s times the transposed u times x: (r, N) times (N, in)."),
    see="docs/lora_gradients.md, sections 3 and 4", points=points, wanted=("A", "B"), settings=("s",))
