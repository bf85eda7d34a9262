"""Recorded steps give the bits of steps that are called: emulated, where a stream records as on a card, and on a GPU."""
import types

import numpy as np
import pytest
import standin
from conftest import fetch, place

import minilora
from minilora import backend, lora, nn, ops, optim, quant
from minilora.errors import ConfigError, StateError


def plain(step):
    return step


def batches(n, shape=(8, 5), out=4, seed=1):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape).astype("float32"), rng.standard_normal((*shape[:-1], out)).astype("float32"))
            for _ in range(n)]


def adapted(rng, **settings):
    return adapted_from(5, rng, **settings)


def adapted_from(n_in, rng, **settings):
    layer = lora.adapt(nn.Linear(n_in, 4, rng=rng), r=2, lora_alpha=3, rng=rng, **settings)
    layer.lora_B.data[...] = place(np.random.default_rng(4).standard_normal((4, 2)), "float32")
    return layer


def below_another(rng):
    """Both factors of the upper layer, and dx to the lower one."""
    return nn.Sequential(lora.adapt(nn.Linear(5, 3, rng=rng), r=1, lora_alpha=1, rng=rng), adapted_from(3, rng))


def in_16_bits(rng):
    layer = adapted(rng)
    quant.quantize(layer, "float16")
    return layer


def again(model):
    model.grad_checkpoint = True
    return model


def with_dropout(rng):
    return nn.Sequential(nn.Linear(5, 6, rng=rng), nn.Dropout(0.3, rng=rng), nn.GELU(), nn.LayerNorm(6),
                         nn.Linear(6, 4, rng=rng))


def train(record, model, optimizer, data, change=lambda i, optimizer, model: None, clip=False):
    """Losses and all that training leaves, as bytes."""
    rng = np.random.default_rng(0)
    model = model(rng)
    optimizer = optimizer([p for p in model.parameters() if p.trainable])

    @record
    def step(x, y):
        loss = ops.mse(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            optimizer.clip_grad_norm(0.5)
        optimizer.step()
        return loss

    losses = []
    for i, (x, y) in enumerate(data):
        change(i, optimizer, model)
        losses.append(step(place(x), place(y)))  # kept: no replay may write into it
    state = optimizer.state_dict()["groups"]
    return ([fetch(loss).tobytes() for loss in losses], [fetch(p).tobytes() for p in model.parameters()],
            [group["steps"] for group in state], [{k: a.tobytes() for k, a in group["state"].items()} for group in state],
            [fetch(p.grad).tobytes() for p in model.parameters() if p.grad is not None])


def slower(i, optimizer, model):
    optimizer.groups[0].settings["lr"] = 0.1 / (1 + i)


def read_gradients(i, optimizer, model):
    assert i == 0 or all(p.grad is not None for p in model.parameters() if p.trainable)


def load_steps(i, optimizer, model):
    if i == 4:
        state = optimizer.state_dict()
        state["groups"][0]["steps"] = [1, *state["groups"][0]["steps"][1:]]
        optimizer.load_state_dict(state)


def other_betas(i, optimizer, model):
    if i == 4:
        optimizer.groups[0].settings["betas"] = (0.5, 0.9)


def unseen(i, optimizer, model):
    """Whoever forgets gradients between two steps: the step that is then run forgets them, too."""
    optimizer.zero_grad()


ADAM = lambda parameters: optim.Adam(parameters, lr=0.1)  # noqa: E731
JOBS = {
    "LoRA": (adapted, ADAM, batches(5)),
    "two LoRAs": (below_another, ADAM, batches(5)),
    "16 bits": (in_16_bits, ADAM, batches(5)),
    "rates": (adapted, ADAM, batches(5), slower),
    "weight decay": (adapted, lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1), batches(5), slower),
    "coupled decay": (adapted, lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1), batches(4)),
    "dropout": (with_dropout, ADAM, batches(5)),
    "computed again": (lambda rng: again(with_dropout(rng)), ADAM, batches(5)),
    "dropout of an adapter": (lambda rng: adapted(rng, lora_dropout=0.4), ADAM, batches(5)),
    "momentum": (adapted, lambda p: optim.SGD(p, lr=0.1, momentum=0.9), batches(4)),
    "momentum and rates": (adapted, lambda p: optim.SGD(p, lr=0.1, momentum=0.9), batches(6), slower),
    "last batch": (adapted, ADAM, [*batches(3), *batches(1, (3, 5)), *batches(2, seed=3), *batches(1, (3, 5), seed=4)]),
    "small batch first": (adapted, ADAM, [*batches(1, (3, 5)), *batches(3), *batches(3, (3, 5), seed=4)]),
    "gradients read": (adapted, ADAM, batches(5), read_gradients),
    "steps loaded": (adapted, ADAM, batches(8), load_steps),
    "betas": (adapted, ADAM, batches(8), other_betas),
    "forgotten outside": (adapted, ADAM, batches(5), unseen),
    "clipped": (adapted, ADAM, batches(4), slower, True),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_same_bits(job, card):
    assert train(minilora.record, *JOBS[job]) == train(plain, *JOBS[job])


@pytest.mark.parametrize("factor", [None, 0.5, 4096.0])
def test_a_loss_and_a_scaled_loss(factor, card):
    """Backward begins with the number 1 that is kept, or with a cotangent that the step computes: either way the same bits."""
    results = []
    for record in (minilora.record, plain):
        layer = nn.Linear(5, 4, rng=0)
        optimizer = ADAM(list(layer.parameters()))

        @record
        def step(x, y):
            loss = ops.mse(layer(x), y)
            optimizer.zero_grad()
            (loss if factor is None else loss * factor).backward()
            optimizer.step()
            return loss

        losses = [fetch(step(place(x), place(y))).tobytes() for x, y in batches(4, (300, 5))]
        results.append((losses, [fetch(p).tobytes() for p in layer.parameters()]))
    assert results[0] == results[1]
    assert all(fetch(one) == 1.0 for one in backend.current_device()._ones.values())


def test_rates_of_sgd_come_from_memory(card):
    """Another learning rate is no other graph."""
    layer = adapted(np.random.default_rng(0))
    optimizer = optim.SGD([p for p in layer.parameters() if p.trainable], lr=0.1, momentum=0.9)

    @minilora.record
    def step(x, y):
        loss = ops.mse(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    graphs = []
    for i, (x, y) in enumerate(batches(6)):
        slower(i, optimizer, layer)
        step(place(x), place(y))
        graphs.append([take.graph for play in step._plays.values() for takes in play.takes.values() for take in takes])
    assert graphs[1][0] is not None and all(made == graphs[1] for made in graphs[1:])


def test_gradients_that_add_up(card):
    """Two backward passes for a step: the first recorded step starts with gradients, and so must every replay."""
    results = []
    for record in (minilora.record, plain):
        layer = adapted(np.random.default_rng(0))
        optimizer = ADAM([p for p in layer.parameters() if p.trainable])
        add = record(lambda x, y: (ops.mse(layer(x), y).backward(), None)[1])
        gradients = []
        for i, (x, y) in enumerate(batches(9)):
            add(place(x), place(y))
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            gradients.append([fetch(p.gathered).tobytes() for p in layer.parameters() if p.gathered is not None])
        results.append((gradients, fetch(layer.lora_A).tobytes()))
    assert results[0] == results[1]


def test_gpt2_takes_ids_from_the_host(card):
    results = []
    for record in (minilora.record, plain):
        config = nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        model = nn.GPT2(config, rng=0).requires_grad(False)
        model.h[0].attn.c_attn = lora.adapt(model.h[0].attn.c_attn, r=2, lora_alpha=4, rng=0)
        optimizer = ADAM([p for p in model.parameters() if p.trainable])

        @record
        def step(ids):
            loss = model.loss(ids, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss, "twice": (loss.data, 2)}

        rng = np.random.default_rng(0)
        seen = [step(rng.integers(0, 11, (2, 6))) for _ in range(4)]
        results.append(([fetch(s["loss"]).tobytes() for s in seen], [fetch(s["twice"][0]).tobytes() for s in seen],
                        fetch(model.h[0].attn.c_attn.lora_B).tobytes()))
    assert results[0] == results[1]


def test_a_replay_is_one_launch_and_waits_for_nothing():
    with standin.card():
        layer = adapted(np.random.default_rng(0))
        optimizer = ADAM([p for p in layer.parameters() if p.trainable])

        @minilora.record
        def step(x, y):
            loss = ops.mse(layer(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        x, y = batches(1)[0]
        step(x, y), step(x, y)
        with standin.counting() as counts:
            step(x, y)
        assert (counts.launches, counts.h2d, counts.syncs, counts.d2h) == (1, 1, 0, 0)
        with standin.counting() as counts:
            step(x[:3], y[:3])
        assert counts.launches > 5


FORBIDDEN = {
    "item": lambda loss: loss.item(), "numpy": lambda loss: loss.numpy(), "float": float, "print": str,
    "to_device": lambda loss: minilora.to_device(np.ones(1)), "tensor": lambda loss: minilora.tensor([1.0]),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_crosses_to_the_host_is_named(name, card):
    layer = adapted(np.random.default_rng(0))

    @minilora.record
    def step(x, y):
        loss = ops.mse(layer(x), y)
        FORBIDDEN[name](loss)
        return loss

    x, y = batches(1)[0]
    with pytest.raises(StateError, match="the step calls .* outside of it"):
        step(place(x), place(y))
    assert ops.mse(layer(place(x)), place(y)).item() > 0.0  # and the device works on


def test_what_cannot_be_recorded_changes_nothing(card):
    """A wait that minilora does not see: the device refuses it while it records."""
    model = with_dropout(np.random.default_rng(0))
    optimizer = ADAM(list(model.parameters()))

    @minilora.record
    def step(x, y):
        loss = ops.mse(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.data)

    x, y = (place(a) for a in batches(1)[0])
    step(x, y)

    def state():
        return ([fetch(p).tobytes() for p in model.parameters()], optimizer.groups[0].steps[:], model[1].step,
                [p.gathered is p.room for p in model.parameters()], [a.tobytes() for a in optimizer.state_dict()["groups"][0]
                                                                     ["state"].values()])
    before = state()
    with pytest.raises(StateError, match="cannot be recorded.*without record"):
        step(x, y)
    assert state() == before
    step(x, y)  # runs, as the first call did
    assert optimizer.groups[0].steps[0] == 2


def test_an_error_of_the_step_itself_comes_through(card):
    layer = adapted(np.random.default_rng(0))
    step = minilora.record(lambda x, y: ops.mse(layer(x), y))
    x, y = batches(1)[0]
    with pytest.raises(minilora.errors.ShapeError):
        step(place(x), place(y[:2]))
    with pytest.raises(minilora.errors.ShapeError):
        step(place(x), place(y[:2]))


def test_forget(card):
    """What nobody sees, a name that is computed, is seen after `forget`, and not before."""
    settings, name, x = types.SimpleNamespace(sign=1.0), "sign", place(np.ones(3, "float32"))
    step = minilora.record(lambda x: minilora.Tensor(x) * getattr(settings, name))
    assert [fetch(step(x))[0] for _ in range(3)] == [1.0] * 3
    settings.sign = -1.0
    assert fetch(step(x))[0] == 1.0
    step.forget()
    assert [fetch(step(x))[0] for _ in range(3)] == [-1.0] * 3


def test_an_argument_that_is_no_array_is_part_of_the_step(card):
    step = minilora.record(lambda x, factor, tensor: tensor * factor + minilora.Tensor(x))
    x, t = place(np.ones(3, "float32")), minilora.tensor(np.ones(3, "float32"))
    assert [fetch(step(x, f, t))[0] for f in (1.0, 1.0, 1.0, 2.0, 1.0)] == [2.0, 2.0, 2.0, 3.0, 2.0]


def test_on_the_cpu_the_step_is_called():
    seen = []
    step = minilora.record(lambda *given: seen.append(given) or 5)
    assert [step(1), step([2]), step()] == [5] * 3 and seen == [(1,), ([2],), ()]
    with pytest.raises(ConfigError, match="got int"):
        minilora.record(3)
