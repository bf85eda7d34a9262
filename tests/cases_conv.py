"""Rows of the table of operations (cases.py): convolutions, pooling, and what changes the size of an image."""
from __future__ import annotations

import functools
import itertools
import math

import numpy as np
from cases import Case
from hypothesis import strategies as st

from minilora import ops

CASES: list[Case] = []


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, **settings))


# -- formulas, written otherwise than the library writes them: window by window, over an input with real zeros around it ----


def pairs(value, axes):
    return (value,) * axes if isinstance(value, int) else value


def windows(x, kernel, stride, padding, dilation, zero=0):
    """Yield (output index, window), the window of shape (N, C, *kernel)."""
    axes = x.ndim - 2
    stride, padding, dilation = (pairs(v, axes) for v in (stride, padding, dilation))
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=zero)
    last = [n - d * (k - 1) for n, k, d in zip(x.shape[2:], kernel, dilation)]
    starts = [range(0, n, s) for n, s in zip(last, stride)]
    for t in itertools.product(*map(enumerate, starts)):
        reads = tuple(slice(start, start + d * (k - 1) + 1, d) for (_, start), k, d in zip(t, kernel, dilation))
        yield tuple(i for i, _ in t), x[(slice(None), slice(None), *reads)]


def gathered(x, kernel, stride, padding, dilation, reduce, zero=0, channels=None):
    found = [(t, reduce(w)) for t, w in windows(x, kernel, stride, padding, dilation, zero)]
    y = np.empty((len(x), channels or x.shape[1], *(i + 1 for i in found[-1][0])), found[0][1].dtype)
    for t, value in found:
        y[(slice(None), slice(None), *t)] = value
    return y


def convolved(stride=1, padding=0, dilation=1, groups=1):
    def formula(x, W, b=None):
        per_group = W.shape[1]

        def outputs(window):
            parts = [np.tensordot(window[:, g * per_group:(g + 1) * per_group], W_part, (range(1, x.ndim), range(1, x.ndim)))
                     for g, W_part in enumerate(np.split(W, groups))]
            return np.concatenate(parts, axis=1) + (0 if b is None else b)
        return gathered(x, W.shape[2:], stride, padding, dilation, outputs, channels=len(W))
    return formula


def pooled(kernel, stride=None, padding=0, largest=False):
    size = pairs(kernel, 2)

    def reduce(window):
        return window.max((2, 3)) if largest else window.sum((2, 3)) / math.prod(size)

    def formula(x):
        return gathered(x, size, stride or size, padding, 1, reduce, zero=-math.inf if largest else 0)
    return formula


# -- convolutions -------------------------------------------------------------------------------------------------------


def conv_kept(needs, x, W, *rest):
    return needs[1] * x.size + needs[0] * W.size


def drawn(axes, groups, **settings):
    """Shapes of x, W and b for which at least one output fits."""
    reach = {name: max(pairs(v, axes)) for name, v in settings.items()}

    def shapes(d):
        n, per_group, outputs, kernel, more = d
        lengths = (reach.get("dilation", 1) * (k - 1) + extra for k, extra in zip(kernel, more))
        return ((n, groups * per_group, *lengths), (groups * outputs, per_group, *kernel), (groups * outputs,))
    sides = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    return st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), sides, sides).map(shapes)


CONVOLUTIONS = [  # name, x, W, settings
    ("1-D", (2, 3, 7), (4, 3, 3), {}),
    ("1-D stride", (2, 3, 8), (2, 3, 3), dict(stride=2)),
    ("1-D stride past kernel", (2, 2, 9), (3, 2, 2), dict(stride=4)),
    ("1-D padding", (2, 2, 4), (3, 2, 3), dict(padding=1)),
    ("1-D padding past kernel", (1, 2, 3), (2, 2, 2), dict(padding=3)),
    ("1-D dilation", (2, 2, 8), (3, 2, 3), dict(dilation=3)),
    ("1-D groups", (2, 4, 5), (6, 2, 3), dict(groups=2)),
    ("1-D all", (2, 4, 9), (2, 2, 3), dict(stride=2, padding=3, dilation=2, groups=2)),
    ("2-D", (2, 3, 4, 5), (2, 3, 3, 3), {}),
    ("2-D stride", (2, 2, 6, 5), (3, 2, 3, 2), dict(stride=(2, 3))),
    ("2-D padding", (2, 2, 3, 4), (2, 2, 3, 3), dict(padding=1)),
    ("2-D padding on one axis", (1, 2, 3, 3), (2, 2, 2, 3), dict(padding=(0, 2))),
    ("2-D dilation", (1, 2, 5, 6), (2, 2, 3, 2), dict(dilation=(2, 3))),
    ("2-D groups", (2, 4, 3, 3), (4, 2, 2, 2), dict(groups=2)),
    ("2-D depthwise", (2, 3, 4, 4), (3, 1, 3, 3), dict(groups=3, padding=1)),
    ("2-D depthwise twice as many", (2, 2, 3, 4), (4, 1, 2, 2), dict(groups=2)),
    ("2-D all", (2, 4, 7, 6), (2, 2, 3, 2), dict(stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2)),
    ("2-D pointwise", (2, 3, 3, 2), (4, 3, 1, 1), {}),
    ("2-D pointwise one sample", (1, 3, 3, 2), (4, 3, 1, 1), {}),
    ("2-D pointwise groups", (2, 4, 2, 2), (4, 2, 1, 1), dict(groups=2)),
    ("2-D pointwise stride", (2, 3, 5, 4), (2, 3, 1, 1), dict(stride=2)),
    ("2-D pointwise padding", (2, 2, 2, 3), (2, 2, 1, 1), dict(padding=1)),
    ("2-D one by one image", (2, 3, 1, 1), (2, 3, 3, 3), dict(padding=1)),
    ("2-D one output", (2, 2, 3, 4), (3, 2, 3, 4), {}),
    ("2-D one channel", (2, 1, 3, 3), (1, 1, 2, 2), {}),
    ("2-D no samples", (0, 2, 3, 3), (2, 2, 2, 2), dict(padding=1)),
    ("2-D no samples groups", (0, 2, 3, 3), (2, 1, 2, 2), dict(groups=2)),
    ("2-D rows left over", (2, 2, 5, 5), (2, 2, 2, 2), dict(stride=3)),
]
DRAWN_CONV = {"1-D all", "2-D", "2-D depthwise", "2-D all", "2-D pointwise"}

for name, x, W, settings in CONVOLUTIONS:
    function = ops.conv1d if len(x) == 3 else ops.conv2d
    groups = settings.get("groups", 1)
    without_groups = {key: value for key, value in settings.items() if key != "groups"}
    strategy = drawn(len(x) - 2, groups, **without_groups) if name in DRAWN_CONV else None
    more = dict(affine=True, products=True, kept=conv_kept)
    case(f"conv {name}", ops.Conv, lambda *arrays, f=function, s=settings: f(*arrays, **s), convolved(**settings),
         x, W, W[:1], drawn=strategy, **more)
for name, x, W, settings in CONVOLUTIONS[::5]:
    function = ops.conv1d if len(x) == 3 else ops.conv2d
    case(f"conv {name} without bias", ops.Conv, lambda x, W, f=function, s=settings: f(x, W, **s), convolved(**settings),
         x, W, **more)


# -- pooling ------------------------------------------------------------------------------------------------------------

IMAGES = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(3, 7)] * 2).map(lambda shape: (shape,))

POOLS = [
    ("halves", (2, 3, 4, 6), dict(kernel=2)),
    ("left over", (2, 2, 5, 3), dict(kernel=2)),
    ("overlap", (2, 2, 5, 4), dict(kernel=3, stride=1)),
    ("padding", (2, 2, 4, 5), dict(kernel=3, stride=2, padding=1)),
    ("unequal", (1, 2, 5, 7), dict(kernel=(2, 3), stride=(3, 2), padding=(1, 0))),
    ("stride past kernel", (2, 1, 7, 7), dict(kernel=2, stride=3)),
    ("whole image", (2, 2, 3, 4), dict(kernel=(3, 4))),
    ("one place", (2, 2, 3, 2), dict(kernel=1)),
    ("more than a byte of places", (1, 1, 18, 17), dict(kernel=(17, 16), stride=1)),
    ("no samples", (0, 2, 4, 4), dict(kernel=2)),
]
for name, shape, settings in POOLS:
    rest = dict(stride=settings.get("stride"), padding=settings.get("padding", 0))
    kernel = settings["kernel"]
    strategy = IMAGES if name in ("padding", "left over") else None
    bytes_each = 1 if math.prod(pairs(kernel, 2)) <= 256 else 4
    case(f"max_pool {name}", ops.MaxPool, lambda x, k=kernel, s=rest: ops.max_pool2d(x, k, **s),
         pooled(**settings, largest=True), shape, drawn=strategy, kept=lambda n, x, y, size=bytes_each: y.size * size / 4)
    case(f"avg_pool {name}", ops.AvgPool, lambda x, k=kernel, s=rest: ops.avg_pool2d(x, k, **s), pooled(**settings), shape,
         drawn=strategy)

for factor, shape in [(2, (2, 3, 2, 3)), ((1, 3), (2, 1, 3, 2)), (1, (1, 2, 2, 2)), (3, (2, 2, 1, 1)), (2, (0, 2, 2, 2))]:
    repeated = functools.partial(lambda x, f: x.repeat(f[0], axis=2).repeat(f[1], axis=3), f=pairs(factor, 2))
    case(f"upsample {factor} {shape}", ops.Upsample, lambda x, f=factor: ops.upsample(x, f), repeated, shape, affine=True,
         drawn=IMAGES if factor == 2 else None)
