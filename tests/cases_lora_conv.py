"""Rows of the table of operations (cases.py): convolutions with a low-rank update. The formula merges the update first."""
from __future__ import annotations

import numpy as np
from cases import Case
from cases_conv import convolved, pairs
from hypothesis import strategies as st

from minilora.lora.gradients.convolution import LoRAConv, lora_conv1d, lora_conv2d

CASES: list[Case] = []


def merged(s, bias, groups=1, **settings):
    """W + D and then one convolution, D element by element as the sum over the ranks of its group."""
    def formula(x, W, *rest):
        *b, A, B = rest
        D = np.zeros(W.shape, W.dtype)
        for o, j in np.ndindex(B.shape[:2]):
            D[o] += A[o // (len(W) // groups) * B.shape[1] + j] * B[o, j].item()
        return convolved(groups=groups, **settings)(x, W + (D * s).astype(W.dtype), *b)
    return formula


def applied(s, bias, **settings):
    def call(x, W, *rest):
        b, A, B = rest if bias else (None, *rest)
        return (lora_conv1d if len(W.shape) == 3 else lora_conv2d)(x, W, b, A, B, float(s), **settings)
    return call


def kept(needs, x, W, *rest):
    *_, A, B, y = rest
    needs_x, needs_W, *_, needs_A, needs_B = needs
    Z = len(A) * y.size // len(W)
    return (needs_A or needs_W) * x.size + needs_B * Z + needs_x * (W.size + A.size) + (needs_x or needs_A) * B.size


def drawn(axes, groups, **settings):
    """Shapes of x, W, b, A and B for which at least one output fits."""
    dilation = max(pairs(settings.get("dilation", 1), axes))

    def shapes(d):
        n, per_group, outputs, ranks, kernel, more = d
        lengths = (dilation * (k - 1) + extra for k, extra in zip(kernel, more))
        return ((n, groups * per_group, *lengths), (groups * outputs, per_group, *kernel), (groups * outputs,),
                (groups * ranks, per_group, *kernel), (groups * outputs, ranks, *[1] * axes))
    sides = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    return st.tuples(st.integers(0, 3), *[st.integers(1, 3)] * 3, sides, sides).map(shapes)


ROWS = [  # name, x, W, r, s, settings
    ("1-D", (2, 3, 5), (4, 3, 3), 2, 2, {}),
    ("1-D one rank", (2, 2, 4), (3, 2, 2), 1, 0.375, {}),
    ("1-D stride past kernel", (2, 2, 6), (3, 2, 2), 2, 2, dict(stride=4)),
    ("1-D more ranks than outputs", (1, 2, 5), (2, 2, 3), 3, -1, dict(padding=1)),
    ("2-D all", (2, 2, 5, 4), (2, 1, 3, 2), 4, 2, dict(stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2)),
    ("2-D depthwise", (2, 2, 3, 3), (4, 1, 2, 3), 2, 2, dict(groups=2, padding=1)),
    ("2-D pointwise one sample", (1, 3, 2, 2), (2, 3, 1, 1), 2, 2, {}),
    ("2-D no samples groups", (0, 2, 3, 3), (2, 1, 2, 2), 2, 2, dict(groups=2)),
    ("2-D one output", (1, 4, 2, 2), (2, 2, 2, 2), 4, 2, dict(groups=2)),
]
for name, x, W, r, s, settings in ROWS:
    axes, groups = len(x) - 2, settings.get("groups", 1)
    strategy = drawn(axes, **{"groups": 1, **settings}) if name in ("2-D all", "1-D") else None
    for bias in [True, False] if name == "1-D" else [True]:
        shapes = (x, W, *[W[:1]] * bias, (r, *W[1:]), (W[0], r // groups, *[1] * axes))
        CASES.append(Case(f"lora_conv {name}{'' if bias else ' without bias'}", LoRAConv, applied(s, bias, **settings),
                          merged(s, bias, **settings), shapes, kept=kept, affine=s == int(s), products=True,
                          drawn=strategy if bias else None))
