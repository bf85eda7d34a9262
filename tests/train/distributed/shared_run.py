"""A small run that several ranks share: rows of which some have no target, adapters, dropout, and state beside the weights."""
import numpy as np

import minilora
from minilora import lora, nn, ops, train
from minilora.train.loop import fit

WIDTH = 6


class Running(nn.Module):
    """A running mean, and a count: state that a rank's own rows would make its own."""

    state_names = ("mean", "seen", "nothing")

    def __init__(self):
        self.mean, self.seen, self.nothing = np.zeros(WIDTH, "float32"), 0, None

    def forward(self, x):
        if self.training:
            self.mean = self.mean + 0.5 * (x.data.mean(axis=0) - self.mean)
            self.seen += len(x.data)
        return x


class Rows:
    """Rows of numbers; every third label counts nothing."""

    fingerprint = "rows"

    def __init__(self, rows=22, bad=None):
        rng = np.random.default_rng(1)
        self.x, self.y = rng.standard_normal((rows, WIDTH)).astype("float32"), rng.integers(0, 3, rows)
        self.y[::3] = -100
        if bad is not None:
            self.x[bad, 2] = np.nan

    def __len__(self):
        return len(self.x)

    def order(self, seed, epoch, batch_size):
        rows = np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
        return [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]

    def in_order(self, batch_size):
        return [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]

    def targets(self, inputs):
        return int((inputs["y"] != -100).sum())

    def batch(self, rows):
        inputs = {"x": self.x[list(rows)], "y": self.y[list(rows)]}
        return train.Batch(inputs, self.targets(inputs), len(rows))


def loss(model, inputs):
    return ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["y"], -100)


def model_of(dropout=0.0, running=False, seed=0):
    rng = np.random.default_rng(seed)
    model = nn.Sequential(Running() if running else nn.ReLU(), nn.Linear(WIDTH, 5, rng=rng), nn.Dropout(dropout, rng=rng),
                          nn.GELU(), nn.Linear(5, 3, rng=rng))
    lora.inject(model, lora.Config(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["1", "4"]), rng=rng)
    return model


def settings(**more):
    return train.Settings(**{"steps": 6, "batch_size": 3, "learning_rate": 0.05, "accumulation": 2, "seed": 3, "threads": 1,
                             **more})


def bits(model):
    return {name: np.asarray(value).tobytes() for name, value in model.state_dict().items()}


def trained(comm, how=settings(), folder=None, resume=False, data=None, valid=None, dropout=0.0, running=False, **more):
    model = model_of(dropout, running)
    result = fit(model, data or Rows(), how, loss=loss, comm=comm, folder=folder, resume=resume, valid=valid, quiet=True,
                 **more)
    return model, result
