"""Adapters drawn at random, and their D computed densely in float64, another way than in the library."""
import dataclasses
import math

import numpy as np
from hypothesis import strategies as st

from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.adapters.scalings import config_of

SHAPES = {"h.0.attn": ("linear", 7, 9), "h.0.mlp": ("linear", 8, 3), "h.1.attn": ("linear", 7, 9),
          "tokens": ("embedding", 5, 12),
          "conv": ("convolution", 6, 4), "grouped": ("convolution", 4, 4)}  # path: kind, out, in
GROUPS, KERNEL = 2, (2, 3)


def D(update):
    """D as a matrix (out, in): a sum of outer products, one at a time."""
    A = update.A.astype("float64").reshape(len(update.A), -1)
    B = update.B.astype("float64").reshape(len(update.B), -1)
    ranks = B.shape[1]
    rows = len(B) // (len(A) // ranks)
    found = np.zeros((len(B), A.shape[1]))
    for j, a in enumerate(A):
        at = slice(j // ranks * rows, (j // ranks + 1) * rows)
        found[at] += update.s * np.multiply.outer(B[at, j % ranks], a)
    return found


def bias(update):
    return 0.0 if update.bias is None else update.s * update.bias.astype("float64")


def deltas(adapter, path):
    return D(adapter.updates[path]) if path in adapter.updates else 0.0


def update(rng, path="h.0.attn", r=2, s=0.5, dtype="float32", with_bias=False, dora=False):
    kind, out, into = SHAPES[path]
    if path == "grouped":
        r = GROUPS * math.ceil(r / GROUPS)
        B = rng.standard_normal((out, r // GROUPS, 1, 1))
        A = np.zeros((r, into, *KERNEL))
        for g in range(GROUPS):  # each group reads its own channels, as PEFT has it
            own, at = slice(g * r // GROUPS, (g + 1) * r // GROUPS), slice(g * into // GROUPS, (g + 1) * into // GROUPS)
            A[own, at] = rng.standard_normal(A[own, at].shape)
    elif kind == "convolution":
        A, B = rng.standard_normal((r, into, *KERNEL)), rng.standard_normal((out, r, 1, 1))
    else:
        A, B = rng.standard_normal((r, into)), rng.standard_normal((out, r))
    more = {"bias": rng.standard_normal(out).astype(dtype)} if with_bias and kind != "embedding" else {}
    if dora:
        more = {"magnitude": 1 + rng.random(out).astype(dtype)}
    return Update(kind, A.astype(dtype), B.astype(dtype), s, **more)


def adapter(rng, paths=("h.0.attn", "h.0.mlp"), **fields):
    return of({path: update(rng, path, **fields) for path in paths})


def of(updates, **fields):
    return SavedAdapter(updates, config_of(updates), **fields)


def with_settings(adapter, **settings):
    return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, **settings))


SCALINGS = st.sampled_from([0.5, 1.0, 2.0, -0.25, 1 / 3, 16 / math.sqrt(8)])
WEIGHTS = st.sampled_from([1.0, -1.0, 0.0, 0.5, 2.0, -0.3, 1e-3])


@st.composite
def adapters(draw, biased=False, dtypes=("float32", "float64", "float16")):
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    paths = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=4, unique=True))
    return of({path: update(rng, path, draw(st.integers(1, 4)), draw(SCALINGS), draw(st.sampled_from(dtypes)), biased)
               for path in paths})
