"""Updates: what one is the gradient of, in which order the batches come, and what the loop does around them."""

import numpy as np
import pytest
from conftest import fetch
from hypothesis import given
from hypothesis import strategies as st
from rows_of_numbers import IGNORED, Net, Numbers, WithAccuracy, drawn, loss_of
from standin import counting

import minilora
from minilora import lora, nn, ops, optim
from minilora.errors import ConfigError, StateError
from minilora.train import Batch, Settings, fit
from minilora.train.beside import Beside
from minilora.train.distributed.comm import Serial
from minilora.train.run import Run


def run_of(model, data, loss=loss_of, optimizer=None, **settings):
    return Run(model, data, Settings(**{"threads": 1, **settings}), loss, Serial(), optimizer)


class Split(Numbers):
    """Rows in the given batches, whatever is asked for."""

    def __init__(self, x, labels, batches):
        super().__init__(x, labels)
        self.batches = batches

    def order(self, seed, epoch, batch_size):
        return self.batches


def gradients(model, data, batches, loss=loss_of, **settings):
    """Those that a run's first update leaves, unclipped."""
    run = run_of(model, Split(data.x, data.labels, batches), loss, steps=1, accumulation=len(batches), max_grad_norm=None,
                 **settings)
    made = run.update()
    return made, {name: fetch(p.grad) for name, p in model.named_parameters()}


@st.composite
def splits(draw, rows):
    """A batch cut into micro-batches, empty ones and ones without targets among them."""
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return [list(range(a, b)) for a, b in zip([0, *cuts], [*cuts, rows])]


@given(splits(8), st.integers(0, 3), st.sampled_from([1, 2]))
def test_any_split_of_a_batch_gives_the_gradient_of_the_whole(batches, seed, threads):
    data = drawn(8, seed=seed, dtype="float64", counted=0.3)
    data.labels[2:4] = IGNORED  # rows without a target
    whole = gradients(Net(dtype="float64"), data, [list(range(8))])
    parts = gradients(Net(dtype="float64"), data, batches, threads=threads)
    assert parts[0].targets == whole[0].targets and parts[0].tokens == whole[0].tokens == 24
    np.testing.assert_allclose(parts[0].loss, whole[0].loss, rtol=1e-12)
    for name, dx in whole[1].items():
        np.testing.assert_allclose(parts[1][name], dx, rtol=1e-11, atol=1e-14, err_msg=name)


def whole_numbers(model, inputs):
    """The mean over targets of a product of whole numbers: gradients are sums of whole numbers, divided once."""
    labels = inputs["labels"]
    counted = (labels != IGNORED)[..., None]
    y = model(minilora.tensor(inputs["x"])) * minilora.tensor((counted * labels[..., None]).astype("float32"))
    return ops.sum(y) / float(counted.sum())


@given(splits(8), st.integers(0, 3))
def test_whole_numbers_give_the_same_bits_however_they_are_split(batches, seed):
    rng = np.random.default_rng(seed)
    data = drawn(8, seed=seed)
    data.x[...] = rng.integers(-8, 9, data.x.shape)

    def model():
        layer = nn.Linear(4, 5, rng=0)
        layer.weight.data[...] = np.random.default_rng(1).integers(-8, 9, (5, 4))
        return layer

    whole, parts = (gradients(model(), data, each, whole_numbers)[1] for each in ([list(range(8))], batches))
    assert {name: dx.tobytes() for name, dx in parts.items()} == {name: dx.tobytes() for name, dx in whole.items()}


def test_a_mean_of_means_is_something_else():
    """The planted fault: if every micro-batch weighed the same, the property above would not hold."""
    data = drawn(8, dtype="float64", counted=0.3)
    data.labels[0] = IGNORED
    data.labels[0, 0] = 1
    whole = gradients(Net(dtype="float64"), data, [list(range(8))])[1]
    model = Net(dtype="float64")
    for rows in ([0], list(range(1, 8))):
        (loss_of(model, data.batch(rows).inputs) * 0.5).backward()
    assert any(abs(fetch(p.grad) - whole[name]).max() > 1e-3 for name, p in model.named_parameters())


def plain(model, data, settings):
    """The loop written out: one epoch after another, batches in order, AdamW, clipping, cosine."""
    optimizer = optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = round(settings.warmup * settings.steps)
    schedule = optim.Scheduler(optimizer, optim.cosine(settings.steps, warmup))
    losses, epoch, queue = [], 0, []
    for _ in range(settings.steps):
        batches = []
        while len(batches) < settings.accumulation:
            if not queue:
                queue, epoch = list(data.order(settings.seed, epoch, settings.batch_size)), epoch + 1
            batches.append(data.batch(queue.pop(0)))
        total = sum(b.targets for b in batches)
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches:
            loss = loss_of(model, batch.inputs) * (batch.targets / total)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.clip_grad_norm(settings.max_grad_norm)
        optimizer.step()
        schedule.step()
    return losses


def test_against_the_loop_written_out():
    settings = Settings(steps=9, batch_size=5, accumulation=2, learning_rate=0.02, weight_decay=0.1, warmup=0.25, threads=1,
                        steps_per_report=1, max_grad_norm=0.5)
    data, ours, theirs = drawn(dtype="float64"), Net(dtype="float64"), Net(dtype="float64")
    made = fit(ours, data, settings, loss=loss_of, quiet=True)
    np.testing.assert_allclose([loss for _, loss in made.losses], plain(theirs, data, settings), rtol=1e-12)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-9, atol=1e-12, err_msg=name)
    assert not ours.training and made.step == 9 and made.best is None and made.folder is None


def test_a_report_is_a_mean_over_the_targets_since_the_last():
    data, model = drawn(11), Net()
    run = run_of(model, data, steps=7, batch_size=3, steps_per_report=3)
    made = [run.update() for _ in range(7)]
    assert [bool(each.mean) for each in made] == [False, False, True, True, False, True, True]  # step 4: the end of an epoch
    for step, since in ((3, made[:3]), (4, made[3:4]), (6, made[4:6]), (7, made[6:])):
        mean = sum(each.loss * each.targets for each in since) / sum(each.targets for each in since)
        assert dict(run.losses)[step] == pytest.approx(mean, rel=1e-12)
    assert run.tokens == sum(each.tokens for each in made) and run.over and not run.finished


def test_when_things_are_due():
    run = run_of(Net(), drawn(12), steps=10, batch_size=3, accumulation=2)  # 4 batches an epoch: 2 steps
    due = {None: [], 3: []}
    for run.step in range(1, 11):
        for every, steps in due.items():
            steps += [run.step] * run.due(every)
    assert due == {None: [2, 4, 6, 8, 10], 3: [3, 6, 9, 10]}
    assert run_of(Net(), drawn(12), batch_size=5).total == 3 and run_of(Net(), drawn(12), batch_size=5, epochs=0.1).total == 1
    assert run_of(Net(), drawn(12), batch_size=5, epochs=3, accumulation=2).total == 4  # 4.5, to the even


def test_rows_are_a_function_of_their_number():
    data = drawn(12)
    run = run_of(Net(), data, steps=4, batch_size=5, seed=3)
    forward = [list(run.rows(n)) for n in range(9)]
    assert forward == [list(rows) for epoch in range(3) for rows in data.order(3, epoch, 5)]
    assert [list(run.rows(n)) for n in reversed(range(9))] == forward[::-1]


class Worse(Beside):
    """Spoils the weights after each step, so that every evaluation after the first is worse."""

    def after_step(self, run, made):
        run.model.outer.bias.data[0] += 50.0


@pytest.mark.parametrize("patience", [None, 2])
def test_the_best_weights_are_given_back_and_patience_ends(patience):
    data, valid, model = drawn(), drawn(seed=1), Net()
    seen = []

    class Look(Beside):
        def after_step(self, run, made):
            seen.append({name: fetch(p).tobytes() for name, p in run.model.named_parameters()})

    settings = Settings(steps=10, batch_size=4, steps_per_eval=2, patience=patience, threads=1)
    made = fit(model, data, settings, loss=WithAccuracy(), valid=valid, beside=[Look(), Worse()], quiet=True)
    assert made.step == (10 if patience is None else 6) and made.best is made.evaluations[0] and made.best.step == 2
    assert {name: fetch(p).tobytes() for name, p in model.named_parameters()} == seen[1]
    assert made.best.accuracy is not None and made.best.targets == valid.targets({"labels": valid.labels})


def test_nothing_to_train_or_to_learn_from_is_refused_before_anything():
    model, data = Net(), drawn()
    with pytest.raises(ConfigError, match=r"all 65 numbers of the model are frozen.*lora.inject"):
        fit(model.requires_grad(False), data, loss=loss_of)
    model.requires_grad()
    empty = Numbers(data.x[:0], data.labels[:0])
    with pytest.raises(ConfigError, match="make no batch: 0 rows"):
        fit(model, empty, loss=loss_of)
    silent = Numbers(data.x, np.full_like(data.labels, IGNORED))
    for valid in (empty, silent):
        with pytest.raises(ConfigError, match="evaluation data have no target"):
            fit(model, data, loss=loss_of, valid=valid)
    with pytest.raises(ConfigError, match="an optimizer of your own"):
        fit(model, data, Settings(loraplus_ratio=4.0), loss=loss_of, optimizer=lambda named: optim.SGD(named, lr=1.0))


def test_epochs_of_different_lengths_are_refused():
    class Odd(Numbers):
        def order(self, seed, epoch, batch_size):
            return super().order(seed, epoch, batch_size)[:3 - epoch]

    data = drawn()
    with pytest.raises(StateError, match="3 batches for epoch 0 and 2 for epoch 1"):
        fit(Net(), Odd(data.x, data.labels), Settings(steps=9, batch_size=4), loss=loss_of, quiet=True)


def test_groups_of_rates_and_dtypes():
    model = Net()
    lora.inject(model, lora.Config(r=2, target_modules=["inner", "outer"]), rng=0)
    run = run_of(model, drawn(), steps=2, batch_size=4, loraplus_ratio=8.0, learning_rate=1e-3)
    run.update()
    rates = {name: group.settings["lr"] for group in run.optimizer.groups for name in group.names}
    assert {rate for name, rate in rates.items() if name.endswith("lora_A")} == {5e-4}  # halfway down the cosine
    assert {rate for name, rate in rates.items() if name.endswith("lora_B")} == {4e-3}
    model = Net()
    model.outer.to(dtype="float16")
    run = run_of(model, drawn(), steps=1)
    assert [group.data.dtype for group in run.optimizer.groups] == ["float32", "float16"]
    assert [group.names for group in run.optimizer.groups] == [["inner.weight", "inner.bias"], ["outer.weight", "outer.bias"]]


def test_half_precision_sums_do_not_overflow():
    """4,000 targets of a loss of 20 make 80,000: more than float16 holds."""
    class Big(Numbers):
        def batch(self, rows):
            inputs = {"x": np.repeat(self.x[list(rows)], 1000, 1), "labels": np.repeat(self.labels[list(rows)], 1000, 1)}
            return Batch(inputs, self.targets(inputs), 1)

    data, model = drawn(4, T=1, dtype="float16"), Net(dtype="float16")
    model.outer.bias.data[0] = 20.0
    data.labels[...] = 1
    made = run_of(model, Big(data.x, data.labels), steps=1, batch_size=4).update()
    assert made.targets == 4000 and 15 < made.loss < 25


def test_one_synchronisation_a_step(device):
    data, model = drawn(), Net(p=0.2)
    lora.inject(model, lora.Config(r=2, target_modules=["inner", "outer"], lora_dropout=0.1), rng=0)
    run = run_of(model, data, steps=4, batch_size=4, accumulation=3)
    run.update()
    if device == "standin":
        with counting() as counts:
            run.update()
        assert counts.syncs == 1 and counts.calls["get"] == 1, counts  # the read of loss and norm
    else:
        run.update()
    made = fit(model, data, Settings(steps=3, batch_size=4, steps_per_eval=2), loss=loss_of, valid=drawn(seed=1), quiet=True)
    assert len(made.evaluations) == 2


class Falls(Beside):
    """An object whose end fails."""

    def __init__(self, begun, words):
        self.begun, self.words = begun, words

    def end(self, run):
        self.begun.append(self.words)
        raise OSError(self.words)


@pytest.mark.parametrize("stops", [False, True])
def test_an_end_that_fails_keeps_none_from_theirs_and_hides_nothing(stops):
    class Stops(Beside):
        def after_step(self, run, made):
            if stops:
                raise StateError("what ended it")

    ended = []
    beside = [Falls(ended, "one"), Stops(), Falls(ended, "two")]
    with pytest.raises(StateError if stops else OSError, match="what ended it" if stops else "one") as caught:
        fit(Net(), drawn(), Settings(steps=2, threads=1), loss=loss_of, beside=beside, quiet=True)
    assert ended == ["one", "two"]
    assert caught.value.__notes__ == [f"and then Falls: {words}" for words in ended[not stops:]]
