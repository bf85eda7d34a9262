"""Sanity checks: every planted fault is found and its cause named; what is right passes."""

import json
import math

import numpy as np
import pytest
from rows_of_numbers import IGNORED, Net, Numbers, drawn, loss_of

import minilora
from minilora import lora, models, nn, ops, optim
from minilora.errors import ConfigError
from minilora.train import Settings, sanity
from minilora.train.data import Arrays, Tokens

FAST = Settings(learning_rate=0.02, threads=1)


def classes(rows=64, d=8, n=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)).astype("float32")
    return Arrays(x=x, y=(x @ rng.standard_normal((d, n))).argmax(axis=1))


def entropy(model, inputs):
    return ops.cross_entropy(model(minilora.tensor(inputs["x"])), inputs["y"])


def squares(model, inputs):
    return ops.mse(model(minilora.tensor(inputs["x"])), inputs["y"])


def mlp(out=3, d=8, act=nn.GELU):
    return nn.Sequential(nn.Linear(d, 16, rng=0), act(), nn.Linear(16, out, rng=1))


def adapted(model, targets, r=4, **more):
    lora.inject(model, lora.Config(r=r, lora_alpha=2 * r, target_modules=targets, **more), rng=0)
    return model


def gpt2(dtype="float32"):
    config = models.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                               tie_word_embeddings=False)
    return adapted(models.GPT2(config, rng=0, dtype=dtype), "all-linear", modules_to_save=["lm_head"])


def texts(rows=12, answered=True):
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 50, rng.integers(6, 12)).tolist() for _ in range(rows)]
    return Tokens(made, [[(3, len(row))] if answered else [] for row in made])


def bert():
    config = models.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                               max_position_embeddings=32)
    return models.BertClassifier(config, models.Labels(3), rng=0)


def labelled(rows=16, answers=None):
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 50, 7).tolist() for _ in range(rows)]
    return Tokens(made, answers=np.arange(rows) % 3 if answers is None else answers)


RIGHT = {
    "mlp": lambda: (mlp(), classes(), entropy),
    "mlp with adapters": lambda: (adapted(mlp(), ["0", "2"]), classes(), entropy),
    "regression": lambda: (mlp(1), Arrays(x=classes().arrays["x"], y=classes().arrays["x"][:, :1] * 2.0), squares),
    "decoder": lambda: (gpt2(), texts(), None),
    "classifier": lambda: (adapted(bert(), "all-linear", modules_to_save=["classifier"]), labelled(), None),
    "positions": lambda: (Net(), drawn(), loss_of),
}


def checked(model, data, loss=None, settings=FAST, **more):
    return sanity.check(model, data, settings, **({} if loss is None else {"loss": loss}), **more)


def told(found):
    """Its text on one line: wrapped lines would hide words."""
    return " ".join(str(found).split())


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    model, data, loss = RIGHT[name]()
    report = checked(model, data, loss, fresh=True)
    assert report, str(report)
    assert [one.outcome for one in report.findings if one.outcome not in ("ok", "look")] == []
    lines = [line for text in (report, *report.findings) for line in str(text).splitlines()]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True


def test_chance_is_the_logarithm_of_the_number_of_classes():
    for model, data, loss, n in ((mlp(), classes(), entropy, 3), (gpt2(), texts(), None, 50), (bert(), labelled(), None, 3)):
        found = sanity.loss_at_chance(model, data, FAST, fresh=True, **({} if loss is None else {"loss": loss}))
        assert found.chance == pytest.approx(math.log(n)) and found.outcome == "ok" and f"ln {n} = " in found.expected
        assert 0.5 * found.chance < found.loss < 1.5 * found.chance
    data = RIGHT["regression"]()[1]
    found = sanity.loss_at_chance(mlp(1), data, Settings(batch_size=64), loss=squares)
    assert found.chance == pytest.approx((data.arrays["y"].astype("float64") ** 2).mean()) and "t^2" in found.expected


@pytest.mark.parametrize("factor", [4.0, 0.1])
def test_a_scaled_loss(factor):
    found = sanity.loss_at_chance(mlp(), classes(), FAST, fresh=True, batches=1,
                                  loss=lambda model, inputs: entropy(model, inputs) * factor)
    assert found.outcome == "FAILED" and f"is {factor:g} times the mean cross-entropy" in told(found)
    half = sanity.loss_at_chance(mlp(), classes(), FAST, loss=lambda model, inputs: entropy(model, inputs) * 0.8, batches=1)
    assert half.outcome == "look" and "0.8 times" in told(half)  # seen though it could be a model that knows something


def test_scaled_logits():
    found = sanity.loss_at_chance(mlp(), classes(), FAST, loss=lambda model, inputs: ops.cross_entropy(
        model(minilora.tensor(inputs["x"])) * 100.0, inputs["y"]))
    assert found.outcome == "FAILED" and "The largest logit is" in told(found)


def test_labels_beside_the_range_and_shifted_ones():
    data = classes()
    beside = Arrays(x=data.arrays["x"], y=data.arrays["y"] + 1)
    report = checked(mlp(), beside, entropy)
    assert not report and "OutOfRangeError" in told(report["loss at chance"]) and "3" in told(report)
    trained = mlp(5)
    trained[2].bias.data[:] = [9.0, 0.0, 0.0, 0.0, 0.0]  # it knows one thing, and the labels are those of another numbering
    found = sanity.loss_at_chance(trained, Arrays(x=data.arrays["x"], y=np.ones(64, int)), FAST, loss=entropy)
    assert found.outcome == "FAILED" and "shifted by one" in told(found)


def test_a_model_that_knows_something_may_be_better_than_chance():
    model = mlp()
    data = Arrays(x=classes().arrays["x"], y=np.zeros(64, int))
    model[2].bias.data[0] = 6.0
    found = sanity.loss_at_chance(model, data, FAST, loss=entropy)
    assert found.outcome == "ok" and "better than chance" in found.came
    found = sanity.loss_at_chance(model, data, FAST, loss=entropy, fresh=True)
    assert found.outcome == "FAILED" and "does the input hold the answer" in told(found)


def test_an_answer_among_the_inputs():
    data = classes()
    x = np.concatenate([data.arrays["x"], data.arrays["y"][:, None].astype("float32")], axis=1)
    found = sanity.loss_at_chance(mlp(d=9), Arrays(x=x, y=data.arrays["y"]), FAST, loss=entropy)
    assert found.outcome == "look" and "Column 8 of x is the answer itself" in told(found)


def test_where_the_rule_does_not_apply():
    def distance(model, inputs):
        return (model(minilora.tensor(inputs["x"])) ** 2.0).mean()

    found = sanity.loss_at_chance(mlp(), classes(), FAST, loss=distance)
    assert found.outcome == "-" and bool(found) and "expected=" in told(found)
    found = sanity.loss_at_chance(mlp(), classes(), FAST, loss=distance, expected=found.loss)
    assert found.outcome == "ok"


def test_all_positions_ignored():
    data = drawn()
    for silent in (Numbers(data.x, np.full_like(data.labels, IGNORED)), texts(answered=False)):
        report = sanity.check(Net(), silent, FAST, loss=loss_of)
        assert not report and "every position is ignored" in told(report)
        with pytest.raises(ConfigError, match="every position is ignored"):
            sanity.overfit(Net(), silent, FAST, loss=loss_of)


def test_no_rows_and_one_row():
    data = drawn()
    report = sanity.check(Net(), Numbers(data.x[:0], data.labels[:0]), FAST, loss=loss_of)
    assert not report and "the data have no rows" in told(report)
    report = sanity.check(Net(), Numbers(data.x[:1], data.labels[:1]), FAST, loss=loss_of)
    assert report and report["overfitted"].check == "1 row overfitted"


class OnceOnly(Numbers):
    """Batches come from iterators, and each can be had once."""

    def __init__(self, x, labels):
        super().__init__(x, labels)
        self.given = set()

    def order(self, seed, epoch, batch_size):
        return iter(map(iter, super().order(seed, epoch, batch_size)))

    def batch(self, rows):
        assert not self.given & set(rows), "read twice"
        self.given |= set(rows)
        return super().batch(rows)


def test_batches_that_can_be_read_once():
    data = drawn(24)
    assert sanity.check(Net(), OnceOnly(data.x, data.labels), FAST, loss=loss_of)


# -- what does not move -------------------------------------------------------------------------------------------------


class Cut(nn.Module):
    def __init__(self, how):
        self.inner, self.outer, self.how = nn.Linear(8, 16, rng=0), nn.Linear(16, 3, rng=1), how

    def forward(self, x):
        if self.how == "detach":
            return self.outer(self.inner(x).detach())
        if self.how == "no_grad":
            with minilora.no_grad():
                h = self.inner(x)
            return self.outer(h)
        if self.how == "data":
            return self.outer(minilora.Tensor(x.data @ self.inner.weight.data.T))
        return self.outer(x @ minilora.tensor(np.ones((8, 16), "float32")))


@pytest.mark.parametrize(("how", "words"), [("detach", "the graph is cut"), ("no_grad", "within no_grad() only"),
                                            ("data", "no operation reads it"), ("unused", "no operation reads it")])
def test_a_graph_that_is_cut(how, words):
    found = sanity.movement(Cut(how), classes(), FAST, loss=entropy)
    assert not found and words in told(found) and "inner.weight" in told(found)
    assert {row.path for row in found.rows if row.fault} == {"inner.weight", "inner.bias"}
    assert {row.path for row in found.rows if row.moved} == {"outer.weight", "outer.bias"}


def test_an_optimizer_made_before_the_adapter():
    model = mlp()
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
    adapted(model, ["0", "2"])
    report = checked(model, classes(), entropy, optimizer=optimizer)
    assert not report and "not in the optimizer" in told(report) and "lora.inject" in told(report)
    model = mlp()
    adapted(model, ["0"])
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
    lora.inject(model, lora.Config(r=2, target_modules=["2"]), "second", rng=0)
    lora.activate(model, "default", "second")
    found = sanity.movement(model, classes(), FAST, loss=entropy, optimizer=optimizer)
    assert not found
    assert [row.path for row in found.rows if row.fault] == ["2.adapters.second.lora_A", "2.adapters.second.lora_B"]


def test_a_rate_of_zero():
    for optimizer in (lambda named: optim.SGD(named, lr=0.0), optim.SGD((made := mlp()).named_parameters(), lr=0.0)):
        report = checked(made, classes(), entropy, optimizer=optimizer)
        assert not report and "its learning rate is 0" in told(report["what moves"])
        assert "nothing trains" in told(report["overfitted"])


def test_both_factors_zero():
    model = adapted(mlp(), ["0", "2"])
    for path, p in model.named_parameters():
        if path.endswith("lora_A"):
            p.data[...] = 0.0
    report = checked(model, classes(), entropy)
    assert not report and "A and B are both 0" in told(report["what moves"]) and "lora.remove" in told(report)
    rows = report["what moves"].rows
    assert all(row.zero and row.gradient == 0 for row in rows if "lora" in row.path)


def test_a_dead_relu():
    model = mlp(act=nn.ReLU)
    model[0].bias.data[...] = -100.0
    found = sanity.movement(model, classes(), FAST, loss=entropy)
    assert not found and "a ReLU gives 0 everywhere, (8, 16)" in told(found)
    assert {row.path for row in found.rows if row.fault} == {"0.weight", "0.bias", "2.weight"}


def test_merged_and_idle_adapters():
    model = adapted(mlp(), ["0", "2"])
    lora.merge(model)
    report = checked(model, classes(), entropy)
    assert not report and "unmerge" in told(report["what moves"]) and "unmerge" in told(report["overfitted"])
    model = adapted(mlp(), ["0", "2"])
    lora.activate(model)
    report = checked(model, classes(), entropy)
    assert not report and "lora.activate(model, 'default')" in told(report["what moves"])
    model = adapted(mlp(), ["0", "2"]).requires_grad(False)
    model[2].bias.trainable = True
    found = sanity.movement(model, classes(), FAST, loss=entropy)
    assert not found and "frozen (requires_grad(False) after lora.inject?)" in told(found)


def test_nothing_is_trained():
    report = checked(mlp().requires_grad(False), classes(), entropy)
    assert not report and "all 195 numbers of the model are frozen" in told(report["what moves"])


def test_a_frozen_head():
    found = sanity.movement(adapted(bert(), ["query", "value"]), labelled(), FAST)
    assert found.outcome == "look" and "The head 'classifier' is frozen" in told(found)
    head = bert()
    head.classifier.weight.data[...] = 0.0  # what is behind it gets no gradient
    found = sanity.overfit(adapted(head, ["query", "value"]), labelled(), FAST)
    assert not found and "does not change at all" in told(found)


class Decays(nn.Module):
    """Writes into a frozen weight, one way or another, and keeps a running mean."""

    state_names = ("mean",)

    def __init__(self, how):
        self.inner, self.outer, self.how = nn.Linear(8, 16, rng=0), nn.Linear(16, 3, rng=1), how
        self.inner.requires_grad(False)
        self.mean = np.zeros(16, "float32")

    def forward(self, x):
        if self.how == "writes":
            self.inner.weight.data[...] *= 0.9
        elif self.how == "replaces":
            self.inner.weight.data = self.inner.weight.data * np.float32(0.9)
        elif self.training:
            self.mean *= 0.9
            self.mean += 0.1 * self.inner(x).data.mean(axis=0)
        return self.outer(self.inner(x))


def test_what_should_stand_still_and_moves():
    found = sanity.movement(Decays("writes"), classes(), FAST, loss=entropy)
    assert not found and "writes into a frozen weight" in told(found) and "*= 0.9" in told(found)
    found = sanity.movement(Decays("replaces"), classes(), FAST, loss=entropy)
    assert not found and "inner.weight: frozen, and moves" in told(found)
    model = Decays("averages")
    assert sanity.movement(model, classes(), FAST, loss=entropy).outcome == "ok"  # the outer layer beside it is trained
    whole = nn.Sequential(model, nn.Linear(3, 3, rng=0))
    model.outer.requires_grad(False)
    found = sanity.movement(whole, classes(), FAST, loss=entropy)
    assert found.outcome == "look" and "0.mean moves" in told(found)


def test_steps_lost_in_rounding():
    model = mlp().to(dtype="float16")
    model[0].weight.data[...] += 1000.0
    data = classes()
    half = Arrays(x=data.arrays["x"].astype("float16"), y=data.arrays["y"])
    found = sanity.movement(model, half, Settings(learning_rate=1e-5, threads=1), loss=entropy)
    assert not found and "lost in the rounding of float16" in told(found)


# -- by heart ------------------------------------------------------------------------------------------------------------


def test_contradicting_labels():
    x = np.repeat(classes().arrays["x"][:8], 2, axis=0)
    data = Arrays(x=x, y=np.arange(16) % 2, drawn=False)
    found = sanity.overfit(mlp(), data, FAST, loss=entropy)
    assert found.outcome == "look" and "Rows 0 and 1 of the batch are equal and have different answers" in told(found)
    assert found.floor == pytest.approx(math.log(2)) and "3 more pairs" in told(found)
    numbers = Arrays(x=x, y=np.tile([[1.0], [-1.0]], (8, 1)).astype("float32"), drawn=False)
    found = sanity.overfit(mlp(1), numbers, FAST, loss=squares)
    assert found.outcome == "look" and found.floor == pytest.approx(1.0)


def test_what_a_decoder_cannot_know():
    """Rows that begin alike: their first answers are a matter of chance, whatever is learned."""
    rows = [[1, 7, 20 + i, 30 + i] for i in range(4)]
    found = sanity.overfit(gpt2().requires_grad(), Tokens(rows, [[(1, 4)]] * 4),
                           Settings(learning_rate=0.01, batch_size=4, threads=1))
    assert found.floor == pytest.approx(4 * math.log(4) / 12) and found.outcome in ("ok", "look")
    assert found.losses[-1] >= found.floor


def test_rates_that_are_off():
    slow = sanity.overfit(mlp(), classes(), Settings(learning_rate=1e-4, threads=1), loss=entropy)
    assert slow.outcome == "look" and slow.rate > 1 and f"learning_rate={1e-4 * slow.rate:g}" in told(slow)
    fast = sanity.overfit(mlp(), classes(), Settings(learning_rate=1e20, threads=1), loss=entropy)
    assert not fast and "diverges at every rate" in told(fast)


def test_too_few_numbers():
    model = mlp().requires_grad(False)
    model[2].bias.trainable = True
    found = sanity.overfit(model, classes(), FAST, loss=entropy, steps=60)
    assert not found and "3 of 195 numbers are trained. With all of them the rows are learned" in told(found)


def test_dropout_and_labels_that_nothing_tells_apart():
    data = classes()
    same = Arrays(x=np.ones_like(data.arrays["x"]), y=data.arrays["y"], drawn=False)
    found = sanity.overfit(mlp(), same, FAST, loss=entropy)
    assert found.outcome == "look" and "are equal and have different answers" in told(found)
    blind = sanity.overfit(nn.Sequential(nn.Linear(8, 8, rng=0), nn.Dropout(0.9, rng=0), nn.Linear(8, 3, rng=0)), data, FAST,
                           loss=lambda model, inputs: entropy(model, inputs) + 3.0, steps=20)
    assert not blind and "Dropout is on (p = 0.9)" in told(blind)


def test_the_curve_is_that_of_the_steps():
    found = sanity.overfit(mlp(), classes(), FAST, loss=entropy)
    assert found and found.losses[-1] <= found.goal < found.losses[0] and len(found.lines()) == 2
    exact = sanity.overfit(mlp(), classes(), FAST, loss=entropy, below=found.losses[0] + 1.0)
    assert len(exact.losses) == 1  # it was there before
    for wrong in ({"rows": 0}, {"steps": 0}, {"share": 2.0}, {"below": -1.0}):
        with pytest.raises(ConfigError):
            sanity.overfit(mlp(), classes(), FAST, loss=entropy, **wrong)


# -- ratios --------------------------------------------------------------------------------------------------------------


def test_ratios_against_numbers_of_their_own():
    model = adapted(mlp(), ["0"])
    data = Arrays(x=classes().arrays["x"], y=classes().arrays["y"], drawn=False)
    found = sanity.update_ratios(model, data, Settings(learning_rate=0.01, threads=1), loss=entropy,
                                 optimizer=lambda named: optim.SGD(named, lr=0.01), steps=2)
    layer, W = model[0], model[0].weight.data.copy()
    before = layer.delta()
    optimizer = optim.SGD(model.named_parameters(), lr=0.01)
    for rows in data.in_order(8)[:1] * 2:
        optimizer.zero_grad()
        entropy(model.train(), data.batch(rows).inputs).backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    rows = {(row.path, row.what): row for row in found.rows}
    assert rows["0", "D"].weight == pytest.approx(np.linalg.norm(W), rel=1e-6)
    assert rows["0", "D"].step == pytest.approx(np.linalg.norm(layer.delta() - before) / 2, rel=1e-4)
    assert rows["0.lora_B", "B"].ratio is None and "starts at 0" in str(found)


@pytest.mark.parametrize(("rate", "word"), [(3.0, "large"), (1e-8, "small")])
def test_ratios_that_are_a_hundred_times_off(rate, word):
    for model in (mlp(), adapted(mlp(), ["0", "2"]), adapted(mlp(), ["0", "2"], use_dora=True)):
        found = sanity.update_ratios(model, classes(), Settings(learning_rate=rate, threads=1), loss=entropy)
        assert found.outcome == "look" and f"too {word}" in told(found) and "learning_rate" in told(found)
    usual = sanity.update_ratios(adapted(mlp(), ["0", "2"], use_dora=True), classes(), Settings(learning_rate=1e-3, threads=1),
                                 loss=entropy)
    assert usual.outcome == "ok" and {row.what for row in usual.rows} == {"A", "B", "D"}
