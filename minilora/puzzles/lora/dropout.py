"""The path that dropout is on."""

from typing import Any

from ..draw import Draw
from ..puzzle import Mistake, Operation

TASK = """
In LoRA, dropout acts on what enters A, and not on what enters W. mask
holds 0 where a number is dropped and 1/(1-p) where it is kept.

    x' = mask x               element by element
    z = x' A^T
    y = x W^T + s z B^T

x, mask    (N, in)      self.mask and self.s are set
dx         (N, in)      dA (r, in)      what is wanted

Which of x and x' did A meet? And what does the path through A do to dx on
its way back, that the path through W does not?

>>> op = Dropped()
>>> op.s, op.mask = 1.0, np.array([[2.0, 0.0]])
>>> y = op.forward(np.array([[1.0, 1.0]]), np.array([[10.0, 10.0]]),
...                np.array([[1.0, 1.0]]), np.array([[1.0]]))
>>> dx, _, dA, _ = op.backward(np.array([[1.0]]))
>>> dx.tolist(), dA.tolist()
([[12.0, 10.0]], [[2.0, 0.0]])
"""

CODE = '''
import numpy as np
from minilora.engine import Op


class Dropped(Op):
    """y = x W^T + s ((mask x) A^T) B^T"""

    def forward(self, x, W, A, B):
        x1 = self.mask * x
        z = x1 @ A.T
        self.save(x, x1, z, W, A, B)
        return x @ W.T + self.s * z @ B.T

    def backward(self, dy):
        x, x1, z, W, A, B = self.saved
        u = dy @ B
        dB = self.s * dy.T @ z
        <blank>
        return dx, None, dA, dB
'''


def points(draw: Draw) -> dict[str, Any]:
    N, n_in, n_out, r = draw.rows(), draw.size(), draw.size(), draw.rank()
    kept = draw.rng.random((N, n_in)) < 0.6
    kept.reshape(-1)[:2] = True, False  # at least one of each
    return {"x": draw.normal(N, n_in), "W": draw.normal(n_out, n_in), "A": draw.normal(r, n_in),
            "B": draw.normal(n_out, r), "s": draw.s, "mask": (kept / 0.6).astype(draw.dtype)}


puzzle = Operation(
    name="dropout", teaches="dropout lies on the adapter's path only", task=TASK, find="Dropped", code=CODE,
    answer="dA = self.s * u.T @ x1\ndx = dy @ W + self.mask * (self.s * u @ A)",
    mistakes=(
        Mistake("dA = self.s * u.T @ x1\ndx = dy @ W + self.s * u @ A",
                "In dx the mask is missing: what was dropped on the way to A brings nothing back on that path."),
        Mistake("dA = self.s * u.T @ x1\ndx = self.mask * (dy @ W + self.s * u @ A)",
                "In dx the mask lies on both paths. W met x itself, all of it."),
        Mistake("dA = self.s * u.T @ x\ndx = dy @ W + self.mask * (self.s * u @ A)",
                "dA was formed with x. A met x', after the mask."),
        Mistake("dA = self.s * u.T @ x\ndx = dy @ W + self.s * u @ A",
                "Both are those of a layer without dropout. A met x', and the mask lies on the path through A on the way "
                "back too."),
        Mistake("dA = self.mask * (self.s * u.T @ x)\ndx = dy @ W + self.mask * (self.s * u @ A)", says="ValueError"),
        Mistake("dA = self.s * u.T @ x1\ndx = dy @ W + (self.mask > 0) * (self.s * u @ A)",
                "The mask's 0s are used and its 1/(1-p) are not: multiply by the mask itself."),
        Mistake("dA = self.s * u.T @ x1\ndx = dy @ W + self.mask * (u @ A)", "s is missing in dx."),
    ),
    hints=("Draw it: x forks into W's path and A's path, and the mask stands on one of the branches.",
           "x' = mask x has the derivative mask. dA is what it was, with x' in the place of x.",
           "dA = s u^T x1. dx is dy @ W, plus mask times what the paths puzzle had for the update."),
    see="docs/lora_gradients.md, section 6", points=points, wanted=("x", "A", "B"), settings=("s", "mask"))
