"""Arrays whose rows are made anew each time: what they draw from, resumed runs, the loop."""
import numpy as np
import pytest

from minilora import nn, ops, tensor
from minilora.errors import ConfigError
from minilora.train import Settings, evaluate, fit
from minilora.train.data import Arrays, Redrawn


class Shift:
    def __init__(self, most):
        self.most = most

    def __repr__(self):
        return f"Shift({self.most})"

    def __call__(self, rng, row):
        return {"x": row["x"] + rng.uniform(-self.most, self.most), "y": row["y"]}


def made(n=6, seed=3, most=0.5, drawn=True):
    return Redrawn(Arrays(x=np.arange(2.0 * n).reshape(n, 2), y=np.arange(n), drawn=drawn), Shift(most), seed)


def test_rows_epochs_and_batches():
    data = made()
    epochs = [data.order(0, epoch, 4) for epoch in (0, 1)]
    assert [sorted(sum(epoch, [])) for epoch in epochs] == [list(range(6)), list(range(6, 12))]
    first = data.batch([2, 8, 5])
    assert first.targets == 3 and first.inputs["y"].tolist() == [2, 2, 5] and len(data) == 6
    assert (abs(first.inputs["x"][0] - [4.0, 5.0]) <= 0.5).all() and (first.inputs["x"][0] != first.inputs["x"][1]).all()
    again = made().batch([5, 8])
    assert np.array_equal(again.inputs["x"], first.inputs["x"][[2, 1]])
    assert data.batch([]).inputs["x"].shape == (0, 2) and data.batch([]).targets == 0
    assert data.in_order(4) == [[0, 1, 2, 3], [4, 5]]


def test_what_the_fingerprint_is_of():
    prints = {made().fingerprint, made(seed=4).fingerprint, made(most=0.25).fingerprint, made(5).fingerprint}
    assert len(prints) == 4 and made().fingerprint in prints


def loss(model, batch):
    return ops.mse(model(tensor(batch["x"].astype("float32"))), tensor(batch["x"].astype("float32")))


def trained(folder=None, steps=6, **more):
    model = nn.Linear(2, 2, rng=0)
    result = fit(model, made(), Settings(steps=steps, batch_size=4, learning_rate=0.01, schedule="constant", warmup=0,
                                         steps_per_report=1, save_every=2), loss=loss, folder=folder, quiet=True, **more)
    return model.state_dict(), result


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path):
    whole, _ = trained()
    trained(tmp_path / "run", steps=3)
    resumed, _ = trained(tmp_path / "run", resume=True, permit=["steps"])
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_an_evaluation_draws_the_same_each_time():
    model = nn.Linear(2, 2, rng=0)
    assert evaluate(model, made(), loss=loss).loss == evaluate(model, made(), loss=loss).loss


@pytest.mark.parametrize(("args", "said"), [
    (([1, 2], Shift(1)), "expected train.data.Arrays, got list"),
    ((Arrays(x=np.zeros((2, 1))), "noise"), "expected a function"),
    ((Arrays(x=np.arange(2.0)), Shift(1), -1), "seed must be an int >= 0"),
])
def test_what_is_refused(args, said):
    with pytest.raises(ConfigError, match=said):
        Redrawn(*args)
