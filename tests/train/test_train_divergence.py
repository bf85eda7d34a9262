"""Numbers that are not finite end a run: the error names the first such array, and the model is as it was before."""

import re

import numpy as np
import pytest
from rows_of_numbers import Net, drawn, loss_of

import minilora
from minilora import blas, lora, nn, ops, optim
from minilora.errors import DivergedError
from minilora.recording import watcher
from minilora.train import Settings, fit
from minilora.train.evaluation import evaluate

FEW = Settings(steps=6, batch_size=4, accumulation=2, learning_rate=0.05, threads=1)


def state(model):
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def refused(model, data, settings=FEW, loss=loss_of, **more):
    before = state(model)
    with pytest.raises(DivergedError) as caught:
        fit(model, data, settings, loss=loss, quiet=True, **more)
    assert watcher.get() is None and all("forward" not in vars(m) for _, m in model.named_modules())
    return str(caught.value), {name for name, value in state(model).items() if value != before[name]}


def test_a_number_of_the_data():
    data = drawn()
    data.x[7, 1, 2] = np.nan
    text, changed = refused(Net(p=0.5), data)
    assert "diverged in step 1: the loss is nan" in text and "row 7 of the data, x[1, 2] is nan" in text
    assert "Mend that row" in text and "No loss was finite before" in text and not changed


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_came_so(frozen):
    model = Net()
    model.inner.weight.data[1, 2], model.inner.weight.trainable = np.inf, not frozen
    text, changed = refused(model, drawn())
    assert "the weight inner.weight (6, 4), 1 of 24 infinite" in text and "load it again" in text and not changed


def test_the_output_of_an_operation():
    model = Net()
    model.outer.weight.data[...] = 3e38
    text, changed = refused(model, drawn())
    assert re.search(r"the output of Linear in outer, float32 \(\d, 3, 5\), \d+ of \d+ infinite", text) and not changed
    assert "the largest number in them is 3e+38" in text and "learning_rate=0.005 (--learning-rate 0.005)" in text


@pytest.mark.skipif(not blas.can_hold(), reason="needs an OpenBLAS whose threads can be set")
def test_it_is_found_in_the_threads_that_computed_it():
    model = Net(p=0.3)
    model.outer.weight.data[...] = 3e38
    assert "Linear in outer" in refused(model, drawn(), Settings(steps=2, batch_size=8, threads=2))[0]


class Root(nn.Module):
    """sqrt at 0: finite forward, infinite backward."""

    def __init__(self):
        self.scale, self.weight = minilora.Parameter([1.0] * 4), minilora.Parameter([0.0] * 4)

    def forward(self, x):
        return ops.sqrt(ops.abs(x * self.weight)) * self.scale


def test_a_gradient():
    def loss(model, inputs):
        return ops.sum(model(minilora.tensor(inputs["x"]))) / float((inputs["labels"] != -100).sum())

    model = Root()
    text, changed = refused(model, drawn(), loss=loss)
    assert "the gradient of weight (4,)" in text and "its forward pass is finite" in text and not changed


def test_a_weight_that_a_step_made():
    def loss(model, inputs):
        return ops.mean(model(minilora.tensor(inputs["x"]))) * 1e15

    model = Root()
    model.weight.data[...] = 1.0
    text, changed = refused(model, drawn(), Settings(steps=5, batch_size=4, max_grad_norm=None, learning_rate=1e30),
                            loss, optimizer=lambda named: optim.SGD(named, lr=1e30))
    assert "a weight is not finite" in text and "after a step of the optimizer from finite gradients" in text
    assert "max_grad_norm=1.0 (--max-grad-norm 1)" in text and not changed


def test_squares_that_overflow():
    def loss(model, inputs):
        return ops.mean(model(minilora.tensor(inputs["x"]))) * 1e30

    model = Root()
    model.weight.data[...] = 1.0
    text, _ = refused(model, drawn(), loss=loss, settings=Settings(steps=5, batch_size=4))
    assert "the norm of the gradients is inf" in text and "the sum of their squares is not" in text


class Running(nn.Module):
    """Keeps a running mean of what it is given, in an array and in a tensor: state that a bad batch spoils."""

    state_names = ("mean", "count", "kept")

    def __init__(self):
        self.layer = nn.Linear(4, 5, rng=0)
        self.mean, self.count, self.kept = np.zeros(4, "float32"), 0, minilora.tensor([0.0] * 4)

    def forward(self, x):
        self.count += 1
        self.mean *= 0.9
        self.mean += x.data.mean((0, 1))
        self.kept.data[...] = self.mean
        return self.layer(x)


def test_the_state_of_modules_too():
    data, model = drawn(), Running()
    data.x[3] = np.inf
    text, changed = refused(model, data, Settings(steps=1, batch_size=12))
    assert "row 3 of the data, x[0, 0] is inf" in text and not changed


def test_the_last_good_loss_and_the_checkpoint_are_named(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    data, model = drawn(), Net()
    rows = data.order(0, 0, 4)[1]  # the second batch

    def loss(model, inputs):
        factor = np.inf if inputs["x"].tobytes() == data.x[rows].tobytes() else 1.0
        return loss_of(model, inputs) * factor

    from minilora.train.distributed.comm import Serial
    from minilora.train.run import Run

    run = Run(model, data, Settings(steps=3, batch_size=4, threads=1), loss, Serial())
    run.folder = tmp_path / "run"
    first, weights = run.update(), state(model)
    with pytest.raises(DivergedError) as caught:
        run.update()
    text = str(caught.value)
    assert f"The last finite loss was {first.loss:.4g} in step 1; the model is as it was after step 1" in text
    assert f"the last checkpoint stays: {run.folder}/checkpoints/step-000003" in text and "step 2" in text
    assert f"Rows {', '.join(map(str, rows))} of the data" in text and state(model) == weights and run.step == 1


def test_masks_of_minus_infinity_do_no_harm_and_are_not_named():
    class Masked(Net):
        def forward(self, x):
            y = super().forward(x)
            mask = minilora.tensor(np.array([0, 0, 0, 0, -np.inf], "float32"))
            return ops.log(ops.softmax(y + mask, -1) + 1e-6)

    data, model = drawn(classes=4), Masked()
    fit(model, data, FEW, loss=loss_of, quiet=True)
    model.outer.weight.data[...] = 3e38
    assert "the output of Linear in outer" in refused(model, data)[0]


def test_half_precision_says_where_it_ends():
    model = Net(dtype="float16")
    model.inner.weight.data[...] = 60000.0
    text, _ = refused(model, drawn(dtype="float16"))
    assert "Linear in inner, float16" in text and "float16 ends at 65504" in text


def test_an_evaluation_stops_a_run_too():
    valid = drawn(seed=1)
    valid.x[2, 0, 1] = np.nan
    text, _ = refused(Net(), drawn(), Settings(steps=4, batch_size=4, steps_per_eval=2), valid=valid)
    assert "evaluation after step 2 is not finite" in text and "row 2 of the data, x[0, 1] is nan" in text
    model = Net()
    model.outer.weight.data[...] = 3e38
    with pytest.raises(DivergedError, match="output of Linear in outer"):
        evaluate(model, drawn(), loss=loss_of)


def test_an_adapter_goes_back_and_the_base_was_never_touched():
    data, model = drawn(), Net()
    lora.inject(model, lora.Config(r=2, target_modules=["inner", "outer"]), rng=0)
    data.x[7, 0, 0] = -np.inf
    text, changed = refused(model, data)
    assert "x[0, 0] is -inf" in text and not changed
