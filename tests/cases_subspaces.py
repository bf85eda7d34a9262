"""Rows of the table of operations (cases.py): a network in few numbers. P is written out as a matrix here."""
from __future__ import annotations

import math

import numpy as np
from cases import Case

from minilora import Parameter, backend, ops
from minilora.ops.weights import COMPUTED, put_weights

CASES: list[Case] = []


def hadamard_matrix(n):
    """H[i, j] = (-1)^(bits that i and j share)."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])


def drawn(d, size, length, seed=0):
    """signs, order, gauss."""
    rng = np.random.default_rng(seed)
    blocks = math.ceil(size / length)
    order = np.array([k * length + rng.permutation(length) for k in range(blocks)])
    gauss = rng.standard_normal((blocks, length))
    return rng.choice([-1, 1], (blocks, length)).astype("int8"), order, gauss / np.sqrt((gauss ** 2).sum(1) * size)[:, None]


def as_matrix(d, size, signs, order, gauss):
    """P (D, d), block by block: H G Π H B."""
    H, blocks = hadamard_matrix(signs.shape[1]), []
    for k, (b, pi, g) in enumerate(zip(signs, order, gauss)):
        permutation = np.eye(len(b))[pi - k * len(b)]
        blocks.append(H @ np.diag(g) @ permutation @ H @ np.diag(b))
    return np.concatenate(blocks)[:size, :d]


def fastfood_row(name, d, size, length):
    draws = drawn(d, size, length)
    P = as_matrix(d, size, *draws)

    def call(v):
        kind = "float32" if v.dtype in ("float16", "float32", "complex64") else "float64"
        with backend.use(v.device.name):
            signs, order, gauss = (backend.asarray(np.ascontiguousarray(draw)) for draw in draws)
        return ops.fastfood(v, signs, order, gauss.astype(kind), size)

    CASES.append(Case(f"fastfood {name}", ops.Fastfood, call, lambda v: P @ v, ((d,),), products=True))


fastfood_row("of one block", 3, 11, 16)
fastfood_row("of blocks", 3, 10, 4)
fastfood_row("that fills its blocks", 4, 8, 4)
fastfood_row("of one number", 1, 5, 1)
fastfood_row("longer than a factor", 40, 100, 64)
fastfood_row("of one number to one", 1, 1, 1)


def displaced(scaled):
    def formula(z, *rest):
        scales, start = (rest[0], rest[1:]) if scaled else (np.ones(len(rest), z.dtype), rest)
        parts, at = [], 0
        for scale, array in zip(scales, start):
            parts.append(array.ravel() + scale * z[at:at + array.size])
            at += array.size
        return np.concatenate(parts)
    return formula


CASES.append(Case("displace", ops.Displace, lambda z, *start: ops.displace(z, None, start), displaced(False),
                  ((9,), (2, 3), (), (2,)), affine=True))
CASES.append(Case("displace with scales", ops.Displace, lambda z, scales, *start: ops.displace(z, scales, start),
                  displaced(True), ((9,), (4,), (2, 3), (), (0, 2), (2,)), affine=True,
                  kept=lambda n, z, scales, *rest: n[0] * scales.size + n[1] * z.size))


def one_layer(theta, x):
    """A layer that uses its weight once, and its bias twice."""
    kind = {"complex64": "float32", "complex128": "float64"}.get(theta.dtype.name, theta.dtype)
    W, b = (Parameter(theta.device.xp.zeros(shape, dtype=kind), trainable=COMPUTED) for shape in ((2, 3), (2,)))
    put_weights(theta.data, [W, b], [kind] * 2)
    return ops.with_weights(lambda x: ops.linear(x, W, b) + b, [W, b], theta, [], x)


CASES.append(Case("with_weights", ops.WithWeights, one_layer, lambda theta, x: x @ theta[:6].reshape(2, 3).T + 2 * theta[6:],
                  ((8,), (4, 3)), affine=True, products=True, once=True))
