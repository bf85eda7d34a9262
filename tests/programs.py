"""Random programs of public operations, each evaluated by several sides: minilora, plain NumPy, and PyTorch in parity.

A program is a list of steps over a pool of values of many shapes: every step takes values made before, the newest first, so that
results and leaves are shared, and adds one. What a step is called is written once, in terms of a side `f`; what `f.tanh` or
`f.softmax` means is written by each side for itself, so that NumPy's side knows nothing of the engine and follows complex numbers.
"""
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from minilora import ops

SHAPES = [(), (), (1,), (3,), (2, 3), (3, 2), (3, 3), (1, 3), (2, 1), (2, 2, 3), (0,), (0, 3)]  # numbers twice: they were wrong
LARGEST = 30.0  # what grows beyond is squashed, so that rounding stays below the tolerance


def broadcast(a, b):
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        return False
    return True


def always(a, b):
    return True


def rows(a, b):
    """A last axis with something in it, to normalise along."""
    return len(a) > 0 and 0 not in a


def matrices(a, b):
    return len(a) >= 2 and len(b) == 2 and a[-1] == b[0]


def weights(a, b):
    return len(a) >= 1 and len(b) == 2 and a[-1] == b[1]


def along_first(a, b):
    return len(a) == len(b) > 0 and a[1:] == b[1:]


def indexed(a, b):
    return len(a) > 0 and a[0] > 0


# name: (do the shapes of a and b fit, the step)
STEPS = {
    "add": (broadcast, lambda f, a, b: a + b),
    "add again": (broadcast, lambda f, a, b: a + b),
    "sub": (broadcast, lambda f, a, b: a - b),
    "mul": (broadcast, lambda f, a, b: a * b),
    "div": (broadcast, lambda f, a, b: a / (b * b + 1.0)),
    "with itself": (always, lambda f, a, b: a + a),
    "square": (always, lambda f, a, b: a * a),
    "number first": (always, lambda f, a, b: 3 - a),
    "number last": (always, lambda f, a, b: a * 1.0 + 0.5),
    "inverse": (always, lambda f, a, b: 2 / (1.5 + f.sigmoid(a))),
    "neg": (always, lambda f, a, b: -a),
    "power": (always, lambda f, a, b: a ** 3),
    "root": (always, lambda f, a, b: f.sqrt(a * a + 1.0)),
    "log": (always, lambda f, a, b: f.log(2.0 + a * a)),
    "exp": (always, lambda f, a, b: f.exp(0.3 * a)),
    "tanh": (always, lambda f, a, b: f.tanh(a)),
    "silu": (always, lambda f, a, b: f.silu(a)),
    "gelu": (always, lambda f, a, b: f.gelu(a)),
    "relu": (always, lambda f, a, b: f.relu(a)),
    "detached": (broadcast, lambda f, a, b: f.detach(a) * b),
    "sum": (always, lambda f, a, b: f.sum(a, None, False)),
    "sum of two": (always, lambda f, a, b: f.sum(a, None, False) + f.sum(b, None, False)),
    "sum of first axis": (rows, lambda f, a, b: f.sum(a, 0, False)),
    "sum of last axis": (rows, lambda f, a, b: f.sum(a, -1, True)),
    "mean": (lambda a, b: 0 not in a, lambda f, a, b: f.mean(a)),
    "softmax": (rows, lambda f, a, b: f.softmax(a)),
    "log_softmax": (rows, lambda f, a, b: f.log_softmax(a)),
    "layer_norm": (rows, lambda f, a, b: f.layer_norm(a)),
    "mse": (lambda a, b: a == b and 0 not in a, lambda f, a, b: f.mse(a, b)),
    "product": (matrices, lambda f, a, b: a @ b),
    "gram": (lambda a, b: len(a) == 2, lambda f, a, b: a @ f.transpose(a)),
    "linear": (weights, lambda f, a, b: f.linear(a, b)),
    "transpose": (always, lambda f, a, b: f.transpose(a)),
    "flat": (always, lambda f, a, b: a.reshape(-1)),
    "axis in front": (always, lambda f, a, b: a.reshape(1, *a.shape)),
    "first": (indexed, lambda f, a, b: a[0]),
    "slice": (indexed, lambda f, a, b: a[:1]),
    "gather": (indexed, lambda f, a, b: f.gather(a, [0, -1, 0])),
    "nothing of it": (lambda a, b: len(a) > 0, lambda f, a, b: a[:0]),
    "joined": (along_first, lambda f, a, b: f.concatenate([a, b])),
    "joined with itself": (lambda a, b: len(a) > 0, lambda f, a, b: f.concatenate([a, a])),
}
NAMES = list(STEPS)


# -- the sides ---------------------------------------------------------------------------------------------------------


def gelu(a):
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a ** 3)))


def log_softmax(a):
    shifted = a - a.real.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def layer_norm(a):
    centred = a - a.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 0.1)


ARRAYS = SimpleNamespace(
    sigmoid=lambda a: 1 / (1 + np.exp(-a)), silu=lambda a: a / (1 + np.exp(-a)), relu=lambda a: np.where(a.real > 0, a, 0),
    gelu=gelu, sqrt=np.sqrt, log=np.log, exp=np.exp, tanh=np.tanh, detach=lambda a: np.real(a) + 0 * a.real,
    sum=lambda a, axis, keepdims: a.sum(axis=axis, keepdims=keepdims), mean=lambda a: a.mean(),
    softmax=lambda a: np.exp(log_softmax(a)), log_softmax=log_softmax, layer_norm=layer_norm,
    mse=lambda a, b: ((a - b) * (a - b)).mean(), linear=lambda a, b: a @ b.T, transpose=lambda a: a.transpose(),
    gather=lambda a, index: a[np.array(index)], concatenate=np.concatenate)


def tensors(place):
    """minilora's side; `place` puts an index array on the device."""
    return SimpleNamespace(
        sigmoid=ops.sigmoid, silu=ops.silu, relu=ops.relu, gelu=ops.gelu, sqrt=ops.sqrt, log=ops.log, exp=ops.exp, tanh=ops.tanh,
        detach=lambda a: a.detach(), sum=ops.sum, mean=ops.mean, softmax=ops.softmax, log_softmax=ops.log_softmax,
        layer_norm=lambda a: ops.layer_norm(a, eps=0.1), mse=ops.mse, linear=ops.linear, transpose=lambda a: a.T,
        gather=lambda a, index: a[place(index)], concatenate=ops.concatenate)


# -- programs ----------------------------------------------------------------------------------------------------------


def run(program, leaves, f):
    """The last of the values that the program makes."""
    pool = list(leaves)
    for name, i, j in program:
        pool.append(STEPS[name][1](f, pool[i], pool[j]))
    return pool[-1]


def build(choices, leaves):
    """A program from drawn numbers: the first step of the table from a number on that fits, on two values made before."""
    pool, program = list(leaves), []
    for start, i, j in choices:
        i, j = (len(pool) - 1 - n % len(pool) for n in (i, j))
        name = next(name for name in NAMES[start:] + NAMES[:start] if STEPS[name][0](pool[i].shape, pool[j].shape))
        y = np.asarray(STEPS[name][1](ARRAYS, pool[i], pool[j]))
        if y.size and np.abs(y).max() > LARGEST:
            name, y = "tanh", np.tanh(pool[i])
        program.append((name, i, j))
        pool.append(y)
    return program


CHOICES = st.lists(st.tuples(st.integers(0, len(NAMES) - 1), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=10)
LEAVES = st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from([True, True, True, False])), min_size=1, max_size=4)


@st.composite
def programs(draw):
    """(program, the leaves' values, which of them are trained, a cotangent or None for a root of one element)."""
    kinds, choices = draw(LEAVES), draw(CHOICES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves = [rng.uniform(-1, 1, shape) for shape, _ in kinds]
    program = build(choices, leaves)
    y = np.asarray(run(program, leaves, ARRAYS))
    dy = None if y.size == 1 and draw(st.booleans()) else rng.uniform(-1, 1, y.shape)
    return program, leaves, [trained for _, trained in kinds], dy
