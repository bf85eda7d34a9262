"""Data, models and losses for tests of the loop: small, without files, and with as many targets a row as a test wants."""

import hashlib

import numpy as np

import minilora
from minilora import nn, ops
from minilora.train import Batch

IGNORED = -100


class Numbers:
    """Rows {"x": (T, d) floats, "labels": (T,) ints}, in the order of a seed: what `fit` asks of data."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels
        self.fingerprint = hashlib.sha256(x.tobytes() + labels.tobytes()).hexdigest()

    def __len__(self):
        return len(self.x)

    def order(self, seed, epoch, batch_size):
        rows = np.random.default_rng((seed, epoch)).permutation(len(self))
        return [rows[i:i + batch_size].tolist() for i in range(0, len(self), batch_size)]

    def in_order(self, batch_size):
        return [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]

    def targets(self, inputs):
        return int((inputs["labels"] != IGNORED).sum())

    def batch(self, rows):
        inputs = {"x": self.x[list(rows)], "labels": self.labels[list(rows)]}
        return Batch(inputs, self.targets(inputs), int(np.prod(inputs["labels"].shape)))


def drawn(rows=12, T=3, d=4, classes=5, seed=0, counted=0.6, dtype="float32"):
    """Such data; at least one label of each row counts."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (rows, T))
    labels[rng.random((rows, T)) > counted] = IGNORED
    labels[:, 0] = rng.integers(0, classes, rows)
    return Numbers(rng.standard_normal((rows, T, d)).astype(dtype), labels)


class Net(nn.Module):
    """Two layers with dropout between."""

    def __init__(self, d=4, classes=5, p=0.0, dtype="float32", seed=0):
        rng = np.random.default_rng(seed)
        self.inner, self.drop = nn.Linear(d, 6, dtype=dtype, rng=rng), nn.Dropout(p, rng=rng)
        self.outer = nn.Linear(6, classes, dtype=dtype, rng=rng)

    def forward(self, x):
        return self.outer(self.drop(ops.gelu(self.inner(x), "tanh")))


def loss_of(model, inputs):
    """Mean cross-entropy over the labels that count."""
    return ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["labels"], IGNORED)


class WithAccuracy:
    """The same, and how many the largest logit names."""

    def __call__(self, model, inputs):
        return loss_of(model, inputs)

    def scored(self, model, inputs):
        from minilora.train.evaluation import Scored

        logits = model(minilora.tensor(inputs["x"]))
        right = (logits.numpy().argmax(-1) == inputs["labels"]).sum()
        return Scored(ops.cross_entropy(logits, inputs["labels"], IGNORED), right)
