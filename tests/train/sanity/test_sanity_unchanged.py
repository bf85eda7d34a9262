"""Nothing is changed by a check: not by one that ends, not by one that fails, not by one that is interrupted anywhere."""

import random

import numpy as np
import pytest
from conftest import fetch
from interrupts import Interrupt
from rows_of_numbers import Net, drawn, loss_of
from test_sanity_faults import adapted, bert, classes, entropy, gpt2, labelled, mlp, texts

from minilora import lora, nn, ops, optim
from minilora.train import Settings, sanity
from minilora.train.data import Arrays

FAST = Settings(learning_rate=0.02, threads=1)


def bits(model, optimizer=None):
    """All that a model and an optimizer hold, arrays by their bits and by which they are."""
    held = {}
    for path, p in model.named_parameters():
        held[path] = (id(p), id(p.data), fetch(p).tobytes(), p.trainable, p.version, id(p.gathered),
                      None if p.gathered is None else fetch(p.gathered).tobytes(), id(p.room))
    for path, value in model.named_state():
        held["state", path] = np.asarray(fetch(value) if hasattr(value, "shape") else value).tobytes()
    for path, module in model.named_modules():
        held["module", path] = id(module), module.training, {name: id(value) for name, value in vars(module).items()
                                                             if not isinstance(value, (int, float))}
        for name, value in vars(module).items():
            if isinstance(value, np.random.Generator):
                held["generator", path, name] = str(value.bit_generator.state)
    if optimizer is not None:
        state = optimizer.state_dict()
        held["optimizer"] = [(group["settings"], group["steps"],
                              {name: array.tobytes() for name, array in group["state"].items()}) for group in state["groups"]]
        held["flat"] = [(id(group), id(group.data), fetch(group.data).tobytes(), fetch(group.grad).tobytes())
                        for group in optimizer.groups]
    held["globals"] = random.getstate(), str(np.random.get_state())
    return held


class Noisy(Net):
    """With dropout, a generator of its own, a running mean and a counter that is no state."""

    state_names = ("mean",)

    def __init__(self):
        super().__init__(p=0.3)
        self.noise, self.mean, self.calls = np.random.default_rng(3), np.zeros(6, "float32"), []

    def forward(self, x):
        h = self.inner(x)
        if self.training:
            self.mean *= 0.5
            self.mean += h.data.reshape(-1, 6).mean(axis=0) + self.noise.normal() + random.random()
        self.calls.append(len(self.calls))
        return self.outer(self.drop(ops.gelu(h, "tanh")))


def begun(model, data, loss):
    """An optimizer in the middle of a training: moments, gradients, counters."""
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
    model.train()
    for rows in data.in_order(4)[:2]:
        optimizer.zero_grad()
        loss(model, data.batch(rows).inputs).backward()
        optimizer.step()
    return optimizer


CASES = {
    "dropout": lambda: (Noisy(), drawn(), loss_of),
    "adapters": lambda: (adapted(Noisy(), ["inner", "outer"], lora_dropout=0.2), drawn(), loss_of),
    "decoder": lambda: (gpt2(), texts(), lambda model, inputs: model(**inputs)),
    "classifier": lambda: (adapted(bert(), "all-linear", modules_to_save=["classifier"]), labelled(),
                           lambda model, inputs: model(**inputs)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("trained", [False, True])
def test_everything_is_as_it_was(name, trained):
    model, data, loss = CASES[name]()
    optimizer = begun(model, data, loss) if trained else None
    if trained:
        list(model.children())[-1][1].eval()  # a part of it in the other mode
    before = bits(model, optimizer)
    first = sanity.check(model, data, FAST, loss=loss, optimizer=optimizer, rows=2, steps=4)
    assert bits(model, optimizer) == before
    again = sanity.check(model, data, FAST, loss=loss, optimizer=optimizer, rows=2, steps=4)
    assert bits(model, optimizer) == before and str(again) == str(first)  # nothing has been used up either
    if trained:
        begun_with = fetch(optimizer.groups[0].data)
        loss(model, data.batch([0, 1]).inputs).backward()
        optimizer.step()  # it still fits its parameters
        assert (fetch(optimizer.groups[0].data) != begun_with).any()


@pytest.mark.parametrize("device", ["standin", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_on_another_device(device):
    model, data = adapted(Net(p=0.2), ["inner", "outer"]), drawn()
    before = bits(model)
    report = sanity.check(model, data, Settings(learning_rate=0.1, threads=1), loss=loss_of, rows=2, steps=30)
    assert report and bits(model) == before
    writes = Writes()
    before = bits(writes)
    found = sanity.movement(writes, classes(), FAST, loss=entropy)
    assert not found and "frozen, and moves" in str(found) and bits(writes) == before


class Writes(nn.Module):
    def __init__(self):
        self.inner, self.outer = nn.Linear(8, 8, rng=0), nn.Linear(8, 3, rng=1)
        self.inner.requires_grad(False)

    def forward(self, x):
        self.inner.weight.data[...] *= 0.5
        self.inner.bias.data = self.inner.bias.data + 1.0
        return self.outer(self.inner(x))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes(dtype):
    data = classes()
    cast = Arrays(x=data.arrays["x"].astype(dtype), y=data.arrays["y"])
    for model in (mlp().to(dtype=dtype), adapted(mlp().to(dtype=dtype), ["0", "2"])):
        before = bits(model)
        report = sanity.check(model, cast, FAST, loss=entropy, fresh=True)
        assert report, str(report)
        assert bits(model) == before


def test_mixed_precision():
    model = adapted(mlp(), ["0", "2"])
    before = bits(model)
    settings = Settings(learning_rate=0.02, threads=1, precision="mixed")
    report = sanity.check(model, classes(), settings, loss=entropy, fresh=True)
    assert report and bits(model) == before, str(report)


def test_a_base_in_four_bits():
    from minilora import quant

    model = nn.Sequential(nn.Linear(64, 64, rng=0), nn.GELU(), nn.Linear(64, 3, rng=1)).requires_grad(False)
    quant.quantize(model, "nf4", exclude=["2"])
    adapted(model, ["0", "2"])
    before = bits(model)
    report = sanity.check(model, classes(d=64), FAST, loss=entropy)
    assert report and bits(model) == before, str(report)


class Fails:
    """A loss that fails in its n-th call, and holds a generator."""

    def __init__(self, n, error):
        self.n, self.error, self.rng = n, error, np.random.default_rng(0)

    def __call__(self, model, inputs):
        self.n -= 1
        self.rng.normal()
        if not self.n:
            raise self.error
        return loss_of(model, inputs)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("n", [1, 6, 30])
def test_after_an_error_or_an_interrupt_in_the_loss(error, n):
    model, data = adapted(Noisy(), ["inner", "outer"]), drawn()
    optimizer = begun(model, data, loss_of)
    before, loss = bits(model, optimizer), Fails(n, error)
    state = str(loss.rng.bit_generator.state)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            sanity.check(model, data, FAST, loss=loss, optimizer=optimizer)
    else:
        assert not sanity.check(model, data, FAST, loss=loss, optimizer=optimizer, rows=2, steps=10)
    assert bits(model, optimizer) == before and str(loss.rng.bit_generator.state) == state


def test_an_interrupt_at_any_line():
    model, data = adapted(Net(p=0.1), ["inner"]), drawn()
    optimizer = begun(model, data, loss_of)
    before = bits(model, optimizer)

    def checks():
        sanity.overfit(model, data, FAST, loss=loss_of, optimizer=optimizer, steps=1, share=0.99)
        sanity.movement(model, data, FAST, loss=loss_of, optimizer=optimizer, steps=1)

    whole = Interrupt(every=True)
    assert not whole.during(checks)
    for n in np.linspace(1, len(whole.lines), 30).astype(int):
        assert Interrupt(int(n), every=True).during(checks)
        assert bits(model, optimizer) == before, whole.lines[n - 1]


def test_adapters_that_are_merged_stay_merged():
    model = adapted(mlp(), ["0", "2"])
    lora.merge(model)
    before = bits(model)
    assert not sanity.check(model, classes(), FAST, loss=entropy)
    assert bits(model) == before
    lora.unmerge(model)
