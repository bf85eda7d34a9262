"""s goes in once."""

from typing import Any

from ..draw import Draw
from ..puzzle import Mistake, Operation
from .dB import points as points_of_dB

TASK = """
Somebody has moved s in forward: now it is part of the z that is kept.

    z = s x A^T               kept with s inside
    y = z B^T

It is the same function as before, so dA and dB are the same numbers, but
the lines that compute them are not: each must hold s exactly once, and
what forward kept says where. s twice in dB is a fault that trains, slowly
or wildly, and never raises an error.

x       (N, in)       A (r, in)       B (out, r)       dy (N, out)

Write both lines.

>>> op = LowRank()
>>> op.s = 2.0
>>> y = op.forward(np.array([[1.0, 0.0, 2.0], [-1.0, 1.0, 1.0]]),
...                np.array([[1.0, 2.0, 1.0]]), np.array([[1.0], [-2.0]]))
>>> _, dA, dB = op.backward(np.array([[1.0, 2.0], [3.0, -1.0]]))
>>> dA.tolist(), dB.tolist()
([[-16.0, 10.0, -2.0]], [[18.0], [8.0]])
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class LowRank(Op):
    """y = (s x A^T) B^T"""

    def forward(self, x, A, B):
        z = self.s * x @ A.T
        self.save(x, z, B)
        return z @ B.T

    def backward(self, dy):
        x, z, B = self.saved
        u = dy @ B
        <blank>
        return None, dA, dB
'''


def points(draw: Draw) -> dict[str, Any]:
    return points_of_dB(draw)


puzzle = Operation(
    name="once", teaches="where s goes, and what happens if it goes twice", task=TASK, find="LowRank", code=CODE,
    answer="dB = dy.T @ z\ndA = self.s * u.T @ x",
    mistakes=(
        Mistake("dB = self.s * dy.T @ z\ndA = self.s * u.T @ x",
                "dB holds s twice: the z that forward kept has s inside. With lora_alpha = 2 r each step of B would be twice "
                "as long as the gradient says."),
        Mistake("dB = dy.T @ z\ndA = u.T @ x",
                "dA holds no s: u = dy B is dL/dz, and z = s x A^T brings an s on the way to A."),
        Mistake("dB = dy.T @ z / self.s\ndA = self.s * u.T @ x", "dB holds no s: the division takes out the one in z."),
        Mistake("dB = self.s * dy.T @ z\ndA = u.T @ x", "The two are the wrong way round: z holds s already, and x does not."),
    ),
    hints=("Read forward again. B meets z, and A meets x. Which of these two holds s?",
           "From y = z B^T alone, dB is dW of a linear layer with input z. From z = s x A^T, dA has the factor s.",
           "dB is dy.T @ z with no factor. dA is u.T @ x with the factor self.s."),
    see="docs/lora_gradients.md, section 10", points=points, wanted=("A", "B"), settings=("s",))
