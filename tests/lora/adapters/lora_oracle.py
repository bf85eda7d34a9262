"""What a model with adapters must compute, in plain NumPy: dense weights, put together anew from numbers of its own.

Nothing here knows how the library does it. A state is: the base's arrays, adapters by name, which take part and how much, and
which layers are merged, which changes no output.
"""
from dataclasses import dataclass, field

import numpy as np

import minilora
from minilora import nn, ops

IDS = np.array([[0, 4], [2, 2], [3, 1]])
WEIGHING = np.random.default_rng(3).standard_normal((3, 2, 2))
LAYERS = ("embed", "fc", "out")


class Net(nn.Module):
    def __init__(self):
        made = dict(dtype="float64", rng=np.random.default_rng(0))
        self.embed, self.fc = nn.Embedding(5, 3, **made), nn.Linear(3, 4, **made)
        self.out, self.head = nn.Linear(4, 3, bias=True, **made), nn.Linear(3, 2, **made)
        self.requires_grad(False)

    def forward(self, ids):
        return self.head(self.out(ops.tanh(self.fc(self.embed(ids)))))

    def loss(self):
        y = self(IDS)
        return (y * y * minilora.tensor(WEIGHING)).sum()


@dataclass
class Given:
    """An adapter: by layer the arrays of that name and s; and the copy of the head, if it has one."""

    layers: dict
    head: dict | None = None
    trained: bool = True  # while it takes part


@dataclass
class State:
    base: dict
    adapters: dict = field(default_factory=dict)
    active: dict = field(default_factory=dict)
    merged: set = field(default_factory=set)

    def weight(self, path, active):
        """(out, n) and the bias, with the updates of `active`, name to factor."""
        W, b = self.base[f"{path}.weight"], self.base.get(f"{path}.bias", 0.0)
        W = W.T if path == "embed" else W
        whole, bias = W, b
        for name, factor in active.items():
            part = self.adapters[name].layers.get(path)
            if part is None:
                continue
            s, D = part["s"], part["s"] * part["lora_B"] @ part["lora_A"]
            if "start_A" in part:
                D = D + s * part["start_B"] @ part["start_A"]
            if "magnitude" in part:
                V = W + D
                D = (part["magnitude"] / np.sqrt((V * V).sum(1)))[:, None] * V - W
            whole = whole + factor * D
            bias = bias + factor * s * part.get("lora_bias", 0.0)
        return whole, bias

    def row(self, ids, active):
        """The output for ids (..., 2) with these adapters."""
        (E, _), (F, f), (G, g) = (self.weight(path, active) for path in LAYERS)
        heads = [self.adapters[name].head for name in active if self.adapters[name].head]
        H, h = (heads[0]["weight"], heads[0]["bias"]) if heads else (self.base["head.weight"], self.base["head.bias"])
        return (np.tanh(E.T[ids] @ F.T + f) @ G.T + g) @ H.T + h

    def output(self, names=None):
        """The whole batch: with what is active; or, of names, with the adapter of each row."""
        if names is None:
            return self.row(IDS, self.active)
        return np.stack([self.row(ids, {name: 1.0} if name in self.adapters else {}) for ids, name in zip(IDS, names)])

    def trained(self):
        """(array, path of it in the model) of all that an optimizer moves."""
        for name in self.active:
            given = self.adapters[name]
            if given.trained:
                for path, part in given.layers.items():
                    yield from ((part, key, f"{path}.adapters.{name}.{key}") for key in part if key[:4] in ("lora", "magn"))
                yield from ((given.head, key, f"head.copies.{name}.{key}") for key in given.head or ())

    def gradient(self, place, key):
        """dL/d place[key] by the complex step."""
        array, h = place[key], 1e-30
        found = np.empty(array.shape)
        for i in np.ndindex(array.shape):
            place[key] = array.astype(complex)
            place[key][i] += 1j * h
            y = self.output()
            found[i] = (y * y * WEIGHING).sum().imag / h
        place[key] = array
        return found
