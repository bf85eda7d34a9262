"""dx, with both paths."""

from typing import Any

from ..draw import Draw
from ..puzzle import Mistake, Operation

TASK = """
The whole layer: the frozen weight, and the update beside it.

    z = x A^T
    y = x W^T + s z B^T

x       (N, in)       W (out, in)       A (r, in)       B (out, r)
dy      (N, out)      u = dy B  (N, r)
dx      (N, in)       what is wanted

x_ni reaches L along two paths, through W and through z. Add what comes
back along each. W is frozen: its gradient is None and is never formed.
u is used a second time here, which is why it has a name.

>>> op = LoRALinear()
>>> op.s = 2.0
>>> y = op.forward(np.array([[1.0, 0.0, 2.0]]), np.array([[1.0, 0.0, -1.0]]),
...                np.array([[1.0, 2.0, 1.0]]), np.array([[3.0]]))
>>> op.backward(np.array([[1.0]]))[0].tolist()
[[7.0, 12.0, 5.0]]
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class LoRALinear(Op):
    """y = x W^T + s (x A^T) B^T"""

    def forward(self, x, W, A, B):
        z = x @ A.T
        self.save(x, z, W, A, B)
        return x @ W.T + self.s * z @ B.T

    def backward(self, dy):
        x, z, W, A, B = self.saved
        u = dy @ B
        dB = self.s * dy.T @ z
        dA = self.s * u.T @ x
        <blank>
        return dx, None, dA, dB
'''


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out, r = draw.rows(), draw.size(), draw.size(), draw.rank()
    return {"x": draw.normal(N, n_in), "W": draw.normal(n_out, n_in), "A": draw.normal(r, n_in),
            "B": draw.normal(n_out, r), "s": draw.s}


puzzle = Operation(
    name="paths", teaches="dx of a LoRA layer: two paths, and u once more", task=TASK, find="LoRALinear", code=CODE,
    answer="dx = dy @ W + self.s * u @ A",
    mistakes=(
        Mistake("dx = dy @ W", "The path through A and B is missing. Layers below would train as if there were no update."),
        Mistake("dx = self.s * u @ A", "The path through W is missing. W is frozen, but x still goes through it."),
        Mistake("dx = dy @ W + u @ A", "s is missing in the path through the update."),
        Mistake("dx = self.s * (dy @ W + u @ A)", "s multiplies both paths. In forward it stands before z B^T only."),
        Mistake("dx = dy @ W - self.s * u @ A", says="wrong in"),
        Mistake("dx = dy @ (W + self.s * B @ A)\ndx = dx.T", says="shape"),
        Mistake("dx = dy @ W + self.s * self.s * u @ A",
                "s is there twice in the path through the update: u @ A wants it once."),
    ),
    hints=("Sum where the path forks: dx is what comes back through W plus what comes back through z.",
           "Through W: the puzzle dx. Through z: dL/dz = s u, and from z to x it is dx of the layer with weight A.",
           "dy @ W plus s times u @ A. (dy @ (W + s B A) gives the same numbers, but forms a matrix as large as W.)"),
    see="minilora/lora/gradient.py: LoRALinear", points=points, wanted=("x", "A", "B"), settings=("s",))
