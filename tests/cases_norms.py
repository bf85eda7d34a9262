"""Rows of the table of operations (cases.py): normalisation, embedding, cross-entropy, and the exact GELU."""
from __future__ import annotations

import math

import numpy as np
from cases import ANY, FILLED, Case, each
from hypothesis import strategies as st

from minilora import ops

CASES: list[Case] = []


def case(name, op, call, formula, *shapes, **settings):
    CASES.append(Case(name, op, call, formula, shapes, **settings))


# -- normalisation ----------------------------------------------------------------------------------------------------


def normal_rows(eps, centred=True):
    """Rows of x times the centring matrix, over the length of the result."""
    def formula(x, w=1, b=0):
        d = x.shape[-1]
        centring = np.eye(d) - np.full((d, d), 1 / d) * centred
        c = np.einsum("...i,ij->...j", x, centring)
        return c / np.sqrt(np.einsum("...i,...i->...", c, c)[..., None] / d + eps) * w + b
    return formula


def normal_groups(groups, eps):
    """One sample and one group after the other."""
    def formula(x, w=None, b=None):
        y = np.empty(x.shape, x.dtype)
        size = x.shape[1] // groups
        for n in range(len(x)):
            for g in range(groups):
                part = x[n, g * size:(g + 1) * size]
                variance = sum((a - part.mean()) ** 2 for a in part.flat) / part.size
                y[n, g * size:(g + 1) * size] = (part - part.mean()) * (variance + eps) ** -0.5
        for c in range(x.shape[1]):
            y[:, c] = y[:, c] * (1 if w is None else w[c]) + (0 if b is None else b[c])
        return y
    return formula


def statistics_kept(each_row, each_array=True, rows=lambda x: math.prod(x.shape[:-1])):
    """x and so many numbers a row if x or w wants a gradient, and w if x does."""
    def kept(needs, x, *rest):
        w = rest[0].size if len(rest) > 1 else 0
        wanted = needs[0] or len(needs) > 1 and needs[1] or each_array
        return wanted * (x.size + each_row * rows(x)) + needs[0] * w
    return kept


WIDTH = FILLED.map(lambda shapes: (*shapes, shapes[0][-1:]))
WIDTHS = FILLED.map(lambda shapes: (*shapes, shapes[0][-1:], shapes[0][-1:]))
SHAPES = {"matrix": (3, 4), "3-D": (2, 3, 4), "vector": (5,), "one wide": (3, 1), "no rows": (2, 0, 4)}
for name, shape in SHAPES.items():
    d = shape[-1:]
    layer = dict(kept=statistics_kept(2, each_array=False))
    root = dict(kept=statistics_kept(1))
    case(f"layer_norm {name}", ops.LayerNorm, ops.layer_norm, normal_rows(1e-5), shape, d, d,
         drawn=WIDTHS if name == "matrix" else None, **layer)
    case(f"layer_norm {name} without bias", ops.LayerNorm, ops.layer_norm, normal_rows(1e-5), shape, d, **layer)
    case(f"layer_norm {name} plain", ops.LayerNorm, lambda x: ops.layer_norm(x, eps=0.25), normal_rows(0.25), shape, **layer)
    case(f"rms_norm {name}", ops.RMSNorm, ops.rms_norm, normal_rows(1e-6, False), shape, d,
         drawn=WIDTH if name == "matrix" else None, **root)
    case(f"rms_norm {name} plain", ops.RMSNorm, lambda x: ops.rms_norm(x, eps=0.5), normal_rows(0.5, False), shape, **root)

CHANNELS = st.tuples(st.integers(0, 3), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2)).map(
    lambda d: ((d[0], 2 * d[1], *d[2]), (2 * d[1],), (2 * d[1],)))
for groups, shape in [(2, (2, 4, 3)), (3, (2, 6, 2, 2)), (1, (3, 4)), (4, (2, 4, 3)), (2, (0, 4, 3))]:
    layer = dict(kept=statistics_kept(2, each_array=False, rows=lambda x, g=groups: x.shape[0] * g))
    case(f"group_norm {groups} {shape}", ops.GroupNorm, lambda x, w, b, g=groups: ops.group_norm(x, g, w, b, eps=1e-3),
         normal_groups(groups, 1e-3), shape, shape[1:2], shape[1:2], drawn=CHANNELS if shape == (2, 4, 3) and groups == 2 else
         None, **layer)
    case(f"group_norm {groups} {shape} plain", ops.GroupNorm, lambda x, g=groups: ops.group_norm(x, g, eps=0.25),
         normal_groups(groups, 0.25), shape, **layer)


# -- embedding --------------------------------------------------------------------------------------------------------


def looked_up(ids):
    """One-hot rows times the table."""
    def formula(W):
        return np.einsum("...v,vd->...d", np.eye(len(W), dtype=W.dtype)[np.asarray(ids, int)], W)
    return formula


def plan_kept(ids):
    """Integers of 8 bytes, counted as numbers of 4: the order, an addition for all but one of each id, two for each id."""
    ids = np.asarray(ids)
    return lambda needs, W, y: 2 * (2 * ids.size + np.unique(ids).size)


def embedding_kept(ids):
    """As `plan_kept`; of ids that count up, nothing."""
    up = np.size(ids) and (np.diff(np.reshape(ids, -1)) == 1).all()
    return (lambda needs, W, y: 0) if up else plan_kept(ids)


IDS = {
    "list": [2, 0, 2, 1, 2], "2-D": [[1, 1, 3], [0, 1, 1]], "one number": 3, "one id": [4], "once each": [3, 1, 0],
    "all equal": [1] * 13, "none": np.zeros((2, 0), "int64"), "small integers": np.array([4, 4, 0], "uint8"),
    "strided": np.arange(20)[::-4] // 4, "counting up": [2, 3, 4], "all": np.arange(5)[None],
}
for name, ids in IDS.items():
    case(f"embedding {name}", ops.Embedding, lambda W, i=ids: ops.embedding(i, W), looked_up(ids), (5, 3), affine=True,
         kept=embedding_kept(ids))
case("embedding drawn", ops.Embedding, lambda W: ops.embedding(np.arange(19) ** 2 % len(W), W),
     lambda W: looked_up(np.arange(19) ** 2 % len(W))(W), (7, 2), affine=True, kept=plan_kept(np.arange(19) ** 2 % 7),
     drawn=st.tuples(st.integers(1, 9), st.integers(1, 3)).map(lambda shape: (shape,)))


# -- cross-entropy ----------------------------------------------------------------------------------------------------


def labels_for(shape, ignored):
    """Labels for logits of this shape, every third of them `ignored` if that is a number."""
    n = math.prod(shape[:-1])
    labels = (2 * np.arange(n) + 1) % shape[-1]
    if ignored is not None:
        labels[2::3] = ignored
    return labels.reshape(shape[:-1])


def negative_logarithms(smoothing, ignored):
    """-log p_k = log sum_j e^(x_j - x_k), row by row and for every k."""
    def formula(x):
        rows, losses = x.reshape(-1, x.shape[-1]), []
        for row, k in zip(rows, labels_for(x.shape, ignored).ravel()):
            each_class = [math.log(sum(math.exp(a - b) for a in row)) for b in row]
            if k != ignored:
                losses.append((1 - smoothing) * each_class[k] + smoothing * sum(each_class) / len(each_class))
        return np.array(sum(losses) / len(losses))
    return formula


def kept_rows(needs, x, y):
    return x.size + 2 * math.prod(x.shape[:-1])


TARGETS = {"": (0.0, None), " ignoring": (0.0, -100), " ignoring 1": (0.0, 1), " smooth": (0.1, None),
           " smooth and ignoring": (0.3, -1), " smooth only": (1.0, None)}
for name, (e, ignored) in TARGETS.items():
    settings = dict(label_smoothing=e, **({} if ignored is None else {"ignore_index": ignored}))
    # One class with smoothing: the gradient is 0 but for rounding, which gradcheck does not forgive.
    for shape in [(5, 4), (2, 3, 5), (3,), *([(3, 1)] if e == 0.0 else [])] if ignored != 1 else [(5, 4)]:
        case(f"cross_entropy{name} {shape}", ops.CrossEntropy,
             lambda x, i=ignored, s=settings: ops.cross_entropy(x, labels_for(x.shape, i), **s),
             negative_logarithms(e, ignored), shape, high=9.0, kept=kept_rows,
             drawn=FILLED if shape == (5, 4) and ignored != 1 else None)


def fused(chunk_rows, settings, ignored):
    def call(h, W, b=None):
        labels = labels_for((*h.shape[:-1], len(W)), ignored)
        return ops.linear_cross_entropy(h, W, labels, b, chunk_rows=chunk_rows, **settings)
    return call


def unfused(smoothing, ignored):
    loss = negative_logarithms(smoothing, ignored)
    return lambda h, W, b=0: loss(np.einsum("...i,ki->...k", h, W) + b)


LAYERS = st.tuples(st.lists(st.integers(1, 3), max_size=2), *[st.integers(1, 4)] * 2).map(
    lambda d: ((*d[0], d[1]), (d[2], d[1]), (d[2],)))
for name, (e, ignored) in TARGETS.items():
    settings = dict(label_smoothing=e, **({} if ignored is None else {"ignore_index": ignored}))
    for h, chunk_rows in [((5, 3), 2), ((2, 3, 3), None), ((3,), 1), ((4, 3), 4)] if ignored != 1 else [((5, 3), 2)]:
        more = dict(products=True, drawn=LAYERS if h == (5, 3) and ignored != 1 else None)
        case(f"linear_cross_entropy{name} {h} {chunk_rows}", ops.LinearCrossEntropy, fused(chunk_rows, settings, ignored),
             unfused(e, ignored), h, (4, 3), (4,),
             kept=lambda n, h, W, b, y: n[0] * h.size + n[1] * W.size + n[2] * b.size, **more)
case("linear_cross_entropy without bias", ops.LinearCrossEntropy, fused(2, {}, None), unfused(0.0, None), (5, 3), (4, 3),
     kept=lambda n, h, W, y: n[0] * h.size + n[1] * W.size, products=True)


# -- the exact GELU ---------------------------------------------------------------------------------------------------

for name, shape, more in [("", (3, 4), dict(drawn=ANY)), (" wide", (50,), dict(high=9.0))]:
    case(f"gelu exact{name}", ops.ExactGELU, lambda x: ops.gelu(x, approximate="none"),
         each(lambda a: a * math.erfc(-a / math.sqrt(2)) / 2), shape, kept=lambda n, x, y: x.size, **more)
