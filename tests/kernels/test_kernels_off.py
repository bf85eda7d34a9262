"""Kernels on and off on a GPU: emulated, as the stand-in shows it, and on a real one (-m gpu)."""
import functools
import re

import emulator
import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu

import minilora
from minilora import backend, lora, nn, ops, optim, versions
from minilora.optim.adam import adam_update


def trained(switch, steps=3):
    """The losses of a few steps; before each half of each, `switch` is called."""
    rng = np.random.default_rng(0)
    x, y = (minilora.tensor(rng.standard_normal((7, n)).astype("float32")) for n in (6, 4))
    model = nn.Sequential(nn.Linear(6, 8, rng=rng), nn.GELU(), nn.LayerNorm(8),
                          lora.Linear(8, 4, r=2, rng=rng, lora_dropout=0.3))
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=1e-2)
    losses = []
    for i in range(steps):
        switch(2 * i)
        loss = ops.mse(model(x), y)
        switch(2 * i + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    if request.param == "emulated":
        with emulator.emulated_device() as machine:
            yield machine
    else:
        need_gpu()
        with backend.use("gpu"):
            yield backend.current_device()


def test_on_a_gpu_operations_and_products_follow(card):
    device, before = backend.current_device(), backend.current_device().xp
    overrides = versions.load("gpu")
    assert hasattr(before, "products")
    with backend.use(device.name, kernels=False):
        assert not hasattr(device.xp, "products") and device.xp is not before
        assert all(device.resolve(reference) is reference for reference in overrides)
    assert device.xp is before and device.resolve(adam_update) is overrides[adam_update]


def test_a_gpu_that_is_found_with_kernels_off_tries_none():
    with backend.use("cpu", kernels=False), standin.card() as device:
        assert device.xp is standin.xp
        with backend.use("card"):
            assert device.xp is standin.xp


def test_training_on_a_gpu_while_it_is_switched(card):
    name = backend.current_device().name
    with backend.use("cpu"):
        expected = trained(lambda i: None)
    with backend.use(name):
        losses = trained(lambda i: backend.use(name, kernels=i in (0, 1, 3, 4)))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


def whole_steps(steps=3):
    """What a few steps of a small GPT-2 with adapters and dropout leave: losses, norms and what is trained."""
    rng = np.random.default_rng(0)
    config = nn.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.1, resid_pdrop=0.1)
    model = nn.GPT2(config, rng=0)
    lora.inject(model, lora.Config(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["c_attn", "c_fc"]), rng=1)
    optimizer = optim.AdamW([p for p in model.parameters() if p.trainable], lr=1e-2, weight_decay=0.1)
    found = []
    for _ in range(steps):
        ids = rng.integers(0, 13, (3, 7))
        loss = model.loss(ids, np.where(ids % 5 == 0, -100, ids))
        optimizer.zero_grad()
        loss.backward()
        found += [loss, optimizer.clip_grad_norm(0.5)]
        optimizer.step()
    return [fetch(each) for each in (*found, *(p.data for p in optimizer.groups[0].parameters))]


def test_a_whole_step_without_kernels(card):
    name = backend.current_device().name
    with backend.use(name, kernels=True):
        fast = whole_steps()
    with backend.use(name, kernels=False):
        plain = whole_steps()
    for one, other in zip(fast, plain):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)  # Adam divides gradients by their size: small ones turn


def test_values_in_the_middle_of_a_step(card):
    """A drawing, and the gradient of a value in the middle, on the card, without kernels, and from a recorded step."""
    name = backend.current_device().name
    layer = nn.Linear(4, 3, rng=0)
    x = minilora.tensor(np.random.default_rng(1).standard_normal((5, 4)).astype("float32"))

    def step(x):
        layer.weight.grad = None
        layer.bias.grad = None
        y = layer(x).retain_grad()
        loss = (y * y).sum()
        loss.backward()
        return {"y": y, "grad": y.grad}

    expected = 2.0 * fetch(layer(x))
    recorded = minilora.record(step)
    for _ in range(4):
        np.testing.assert_allclose(fetch(recorded(x)["grad"]), expected, rtol=1e-5)
    texts = []
    for kernels in (True, False):
        with backend.use(name, kernels=kernels):
            np.testing.assert_allclose(fetch(step(x)["grad"]), expected, rtol=1e-5)
            text = str(minilora.draw(ops.mse(layer(x), x.data[:, :3]), layer))
            assert ("by Fused" in text) is kernels
            texts.append(re.sub(r"by Fused\w+|\d\.\d+|\s+", " ", text).split())  # all but who computes, and rounding
    assert len(texts[0]) > 20 and texts[0] == texts[1]


HEARD = {}


def heard(number, value):
    globals()["HEARD"][number].append(value)


def learner(record, told):
    """A step that says when Python runs it: of a replay, nothing is heard."""
    rng = np.random.default_rng(0)
    layer = nn.Sequential(nn.Linear(4, 6, rng=rng), nn.GELU(), nn.Linear(6, 2, rng=rng))
    optimizer = optim.Adam(layer.parameters(), lr=0.1)
    tell = functools.partial(heard, id(told))  # a step must not change what it reads itself, and so does nobody see it
    HEARD[id(told)] = told

    @record
    def step(x, y):
        tell(backend.kernels())
        loss = ops.mse(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss
    return step


def test_a_recorded_step_is_recorded_for_what_runs(card):
    name, told = backend.current_device().name, []
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((5, 4)).astype("float32"), np.ones((5, 2), "float32")
    with backend.use("cpu"):
        step = learner(lambda step: step, [])
        expected = [step(x, y).item() for _ in range(11)]
    x, y = backend.to_device(x), backend.to_device(y)
    step, losses = learner(minilora.record, told), []
    for kernels, calls, seen in ((True, 4, 2), (False, 3, 3), (True, 4, 0)):
        with backend.use(name, kernels=kernels):
            del told[:]
            losses += [fetch(step(x, y)).item() for _ in range(calls)]
            assert told == [kernels] * seen  # called, recorded, replayed, and kept; the reference is always called
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
