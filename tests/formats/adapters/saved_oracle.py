"""Adapters drawn at random for the tests of dialects, and what they do: D of every module, computed another way than there."""
import dataclasses
from pathlib import Path

import numpy as np

from minilora.formats.adapters.dialect import Source
from minilora.formats.adapters.saved import SavedAdapter, Update
from minilora.formats.adapters.scalings import config_of


def D(update):
    """The update as a matrix (out, in), or as a kernel (out, C_in / groups, *kernel), in float64."""
    A, B = update.A.astype("float64"), update.B.astype("float64")
    if update.kind != "convolution":
        return update.s * np.einsum("oj,ji->oi", B, A)
    groups, per = update.r // B.shape[1], len(B) // (update.r // B.shape[1])
    parts = [np.einsum("oj,j...->o...", B[g * per:(g + 1) * per].reshape(per, -1), A[g * B.shape[1]:(g + 1) * B.shape[1]])
             for g in range(groups)]
    return update.s * np.concatenate(parts)


def assert_rounded(one, two, eps=2.0 ** -24):
    """D is the same but for one rounding of each number of B: |difference| <= eps |s| |B| |A|."""
    size = D(dataclasses.replace(one, s=abs(one.s), A=abs(one.A), B=abs(one.B)))
    assert (abs(D(one) - D(two)) <= 1.01 * eps * size).all()


def whole_numbers(rng, shape, dtype="float32"):
    """Small whole numbers, so that every product and every sum of them is exact."""
    return rng.integers(-8, 9, shape).astype(dtype)


def update(rng, kind="linear", r=2, out=5, into=3, s=0.5, dtype="float32", dora=False, bias=False, kernel=(3, 3)):
    A = whole_numbers(rng, (r, into, *kernel) if kind == "convolution" else (r, into), dtype)
    B = whole_numbers(rng, (out, r) + (1,) * len(kernel) if kind == "convolution" else (out, r), dtype)
    return Update(kind, A, B, s, whole_numbers(rng, out, dtype) if bias else None,
                  1 + abs(whole_numbers(rng, out, dtype)) if dora else None)


def adapter(updates, **fields):
    return SavedAdapter(updates, config_of(updates), **fields)


def source(tensors, config=None, metadata=None, path="file.safetensors"):
    return Source(Path(path), {name: np.asarray(array) for name, array in tensors.items()}, dict(metadata or {}), config)


def as_source(written):
    """What a reader finds after this was written. Read-only, as mapped files are."""
    tensors = {}
    for name, array in written.tensors.items():
        tensors[name] = np.array(array)
        tensors[name].flags.writeable = False
    return Source(Path("written"), tensors, dict(written.metadata), written.config)


def assert_same(one, two):
    """The same factors to the bit, and the same s, in every module."""
    assert one.updates.keys() == two.updates.keys()
    for path, left in one.updates.items():
        right = two.updates[path]
        assert (left.kind, left.s) == (right.kind, right.s), path
        for name in ("A", "B", "bias", "magnitude"):
            a, b = getattr(left, name), getattr(right, name)
            assert (a is None) == (b is None), (path, name)
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), (path, name)
