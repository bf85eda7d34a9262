"""Rows of the table of operations (cases.py): the factor of each output under DoRA."""
from __future__ import annotations

import math

import numpy as np
from cases import Case, on_device
from hypothesis import strategies as st

from minilora.lora.gradients import dora

CASES: list[Case] = []


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, **settings))


def lengths_and_factors(s, groups=1):
    """Row by row: one row of the merged weight, its length, and the factor."""
    def formula(W, A, B, m):
        parts = np.split(A, groups)
        rho = []
        for k, row in enumerate(W):
            update = sum(b * a for b, a in zip(B[k], parts[k * groups // len(W)]))
            rho.append(m[k] / math.hypot(*(row + s * update)))
        return np.array(rho, W.dtype)
    return formula


def kept(needs, W, A, B, m, rho):
    return rho.size + any(needs[:3]) * (W.size + A.size + B.size + rho.size)


SETTINGS = [  # name, out, n, r, groups
    ("", 3, 4, 2, 1), ("r=1", 3, 4, 1, 1), ("one output", 1, 5, 2, 1), ("one input", 4, 1, 1, 1), ("r > n", 4, 2, 3, 1),
    ("groups", 4, 3, 4, 2), ("groups r=1", 6, 4, 3, 3), ("groups of one row", 3, 2, 6, 3), ("no outputs", 0, 3, 2, 1),
]
# |s B A| <= 0.03 * 4 * 2 * 2 < 0.5 <= |W|: no row comes near to 0, where rounding would be all there is.
DRAWN = st.tuples(*[st.integers(1, 4)] * 3).map(lambda d: ((d[0], d[1]), (d[2], d[1]), (d[0], d[2]), (d[0],)))
more = dict(kept=kept, products=True, low=0.5)

for name, out, n, r, groups in SETTINGS:
    shapes = (out, n), (r, n), (out, r // groups), (out,)
    s = 0.03 if name in ("", "one input") else 0.4
    case(f"dora_scale exact {name}".rstrip(), dora.DoRAScale,
         lambda W, A, B, m, s=s, g=groups: dora.dora_scale(W, A, B, m, s, g, exact=True),
         lengths_and_factors(s, groups), *shapes, drawn=DRAWN if name == "" else None, **more)


def detached(name, out, n, r, groups, s):
    """A row of which m is the only input: under the detached reading the others are constants."""
    rng = np.random.default_rng(out + n + r)
    W, A, B = (rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 2.0, shape)
               for shape in ((out, n), (r, n), (out, r // groups)))
    case(f"dora_scale {name}".rstrip(), dora.DoRAScale,
         lambda m: dora.dora_scale(*(on_device(a.astype(m.dtype)) for a in (W, A, B)), m, s, groups),
         lambda m: lengths_and_factors(s, groups)(*(a.astype(m.dtype) for a in (W, A, B)), m), (out,),
         kept=lambda needs, m, rho: m.size, products=True)


for row in (SETTINGS[0], SETTINGS[5]):
    detached(*row, s=0.4)
