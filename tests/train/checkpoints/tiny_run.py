"""A small run with every kind of state that a checkpoint must hold, and pictures of it to compare bit by bit."""
import hashlib

import numpy as np

import minilora
from minilora import backend, lora, nn, ops, train
from minilora.train import loop
from minilora.train.beside import Beside
from minilora.train.checkpoints import Keeper
from minilora.train.distributed.comm import Serial
from minilora.train.evaluation import Evaluating
from minilora.train.run import Run

WIDTH, CLASSES, ROWS = 6, 3, 26  # seven batches of 4, the last one short: windows of two lie across the borders of epochs
KINDS = ("lora", "plus", "dora", "full", "mixed")
# A scale that overflows at first and grows into overflows again: a checkpoint lies between two of its changes.
MIXED = dict(precision="mixed", loss_scale=2.0 ** 26, scale_growth=4)


class Running(nn.Module):
    """Keeps a mean of what it has seen, as batch norm does: state that is no parameter, and that training changes."""

    state_names = ("mean", "seen")

    def __init__(self, width):
        self.mean, self.seen = np.zeros(width, "float32"), 0

    def forward(self, x):
        if self.training:
            self.mean = self.mean + 0.25 * (x.data.mean(axis=0) - self.mean)
            self.seen += len(x.data)
        return x - minilora.Tensor(backend.to_device(self.mean))


class Rows:
    """Numbers and classes, as data of `fit`."""

    def __init__(self, seed=1, rows=ROWS):
        rng = np.random.default_rng(seed)
        self.x, self.y = rng.standard_normal((rows, WIDTH)).astype("float32"), rng.integers(0, CLASSES, rows)
        self.fingerprint = hashlib.sha256(self.x.tobytes() + self.y.tobytes()).hexdigest()

    def __len__(self):
        return len(self.x)

    def order(self, seed, epoch, batch_size):
        rows = np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
        return [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]

    def in_order(self, batch_size):
        return [list(range(i, min(i + batch_size, len(self)))) for i in range(0, len(self), batch_size)]

    def targets(self, inputs):
        return len(inputs["y"])

    def batch(self, rows):
        rows = list(rows)
        return train.Batch({"x": self.x[rows], "y": self.y[rows]}, len(rows), len(rows))


def loss(model, inputs):
    return ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["y"])


def model_of(kind="lora", seed=0, dropout=0.3, running=True):
    """With `running` False one that several threads may compute with."""
    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 8, rng=rng), nn.GELU(), Running(8) if running else nn.GELU(),
                          nn.Dropout(dropout, rng=rng),
                          nn.Linear(8, 7, rng=rng), nn.LayerNorm(7), nn.Linear(7, CLASSES, rng=rng))
    if kind != "full":
        lora.inject(model, lora.Config(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["0", "4"], modules_to_save=["6"],
                                       use_dora=kind == "dora"), rng=rng)
    return model


def settings_of(kind="lora", **others):
    given = dict(steps=12, batch_size=4, accumulation=2, learning_rate=0.05, warmup=3, weight_decay=0.01, steps_per_report=2,
                 steps_per_eval=3, save_every=1, keep=2, seed=5, threads=1)
    return train.Settings(**given | ({"loraplus_ratio": 4.0} if kind == "plus" else MIXED if kind == "mixed" else {}) | others)


def valid_rows():
    return Rows(2, 11)


class Watching(Beside):
    """Stops a run after a step, or calls something after each."""

    def __init__(self, stop=None, call=None):
        self.stop, self.call = stop, call

    def after_step(self, run, made):
        if self.call is not None:
            self.call(run)
        run.asked = run.asked or run.step == self.stop


def trained(kind, folder, resume=False, stop=None, call=None, model=None, data=None, valid=valid_rows, permit=(), **settings):
    """A run as `fit` makes it, but for its report and its files for people, to its end or to a step."""
    model = model or model_of(kind, running=settings.get("threads", 1) == 1)
    run = Run(model, data or Rows(), settings_of(kind, **settings), loss, Serial())
    run.folder, run.valid = folder, valid and valid()
    with Keeper(run, resume, permit) as keeper:
        loop.train(run, [*([Evaluating(run.valid)] if valid else []), Watching(stop, call), keeper])
    return run


def run_of(kind="lora", model=None, data=None, optimizer=None, function=loss, evaluated=True, **settings):
    """A run at its beginning, as `fit` makes it."""
    run = Run(model or model_of(kind), data or Rows(), settings_of(kind, **settings), function, Serial(), optimizer)
    run.valid = valid_rows() if evaluated else None
    run.model.train()
    return run


def advanced(run, steps):
    """A run that has made so many steps more, with its evaluations."""
    evaluating = Evaluating(run.valid)
    for _ in range(steps):
        evaluating.after_step(run, run.update())
    return run


def picture(run):
    """All that a run holds, as bytes and plain values."""
    optimizer = run.optimizer.state_dict()
    arrays = {name: array.tobytes() for name, array in run.model.state_dict().items()}
    arrays |= {f"group {i} {name}": array.tobytes() for i, group in enumerate(optimizer["groups"])
               for name, array in group["state"].items()}
    arrays |= {f"best {name}": array.tobytes() for name, array in (run.best_weights or {}).items()}
    return arrays | {
        "steps": [list(group["steps"]) for group in optimizer["groups"]],
        "settings": [dict(group["settings"]) for group in optimizer["groups"]],
        "scheduler": run.scheduler.state_dict(), "step": run.step, "losses": list(run.losses),
        "evaluations": list(run.evaluations), "best": run.best, "tokens": run.tokens, "worse": run.worse,
        "since": dict(run.since), "scaling": None if run.scaling is None else run.scaling.state_dict(),
    }


def different(one, other):
    """The names of what differs in two pictures."""
    missing = object()
    return sorted(name for name in one.keys() | other.keys() if one.get(name, missing) != other.get(name, missing))
