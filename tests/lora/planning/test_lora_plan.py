"""lora.plan: counted on paper, in the engine and in memory; and the published figures."""
import dataclasses
import gc
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minilora import backend, engine, lora, nn, ops, optim, summary
from minilora.errors import ConfigError
from minilora.lora import Config, Storage, plan
from minilora.lora.planning.published import gpt3, gpt_shapes, published_figures

EVERY = Config(target_modules="all-linear")


def mlp(*widths, between=None, dtype="float32", bias=True):
    rng = np.random.default_rng(0)
    layers = []
    for n_in, out in zip(widths, widths[1:]):
        layers += [nn.Linear(n_in, out, bias, dtype=dtype, rng=rng)] + ([between()] if between else [])
    return nn.Sequential(*layers)


def adapt(model, planned):
    """Put the adapters in that a plan tells of; freeze all else."""
    model.requires_grad(False)
    for adapter in planned.adapters:
        target = adapter.target
        model[int(target.path)] = lora.adapt(target.module, target.r, target.lora_alpha, rng=np.random.default_rng(1))
    return model


def draw(*shape, dtype="float32"):
    return np.random.default_rng(2).standard_normal(shape).astype(dtype)


# -- numbers ------------------------------------------------------------------------------------------------


def test_the_worked_example_of_document_2():
    planned = plan([("W", (200, 200))], Config(r=20, target_modules=["W"]))
    (adapter,) = planned.adapters
    assert (planned.full.trained, adapter.a, adapter.b, planned.lora.trained) == (40_000, 4_000, 4_000, 8_000)
    assert 1 - planned.lora.trained / planned.full.trained == 0.8


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 9), st.data())
def test_numbers_of_an_mlp(widths, r, data):
    model = mlp(*widths)
    names = [str(i) for i in range(len(widths) - 1)]
    chosen = sorted(data.draw(st.sets(st.sampled_from(names), min_size=1)))
    planned = plan(model, Config(r=r, target_modules=chosen))
    total = sum(p.size for p in model.parameters())
    assert planned.full.total == planned.full.trained == total
    assert planned.lora.trained == sum(r * (widths[int(i)] + widths[int(i) + 1]) for i in chosen)
    assert planned.lora.total == total + planned.lora.trained
    made = summary(adapt(model, planned))
    assert (made.trained, made.frozen, made.nbytes) == (planned.lora.trained, total, planned.lora.weights)


def test_a_plan_changes_nothing():
    model = mlp(4, 3, 2)
    before = {name: (p.data.tobytes(), p.trainable, id(p)) for name, p in model.named_parameters()}
    plan(model, EVERY)
    assert {name: (p.data.tobytes(), p.trainable, id(p)) for name, p in model.named_parameters()} == before
    assert type(model[0]) is nn.Linear


def test_a_plan_is_the_same_on_every_device(device):
    planned = plan(mlp(4, 3, 2, dtype="float64"), EVERY, batch=3)
    shapes = [("0", (3, 4)), ("0.bias", (3,)), ("1", (2, 3)), ("1.bias", (2,))]
    described = plan(shapes, EVERY, batch=3, dtype="float64")
    assert (planned.lora, planned.full) == (described.lora, described.full)
    assert [a[1:] for a in planned.adapters] == [a[1:] for a in described.adapters]


def test_kinds_of_layers():
    model = nn.Module()
    model.embed = nn.Embedding(11, 4)
    model.line = nn.Conv1d(4, 6, 3, bias=False)
    model.image = nn.Conv2d(4, 6, (3, 2), groups=2)
    planned = plan(model, Config(r=2, target_modules=["embed", "line", "image"]))
    assert [(a.target.kind, a.a, a.b) for a in planned.adapters] == [
        ("Embedding", 2 * 11, 4 * 2), ("Conv1d", 2 * 4 * 3, 6 * 2), ("Conv2d", 2 * 2 * 3 * 2, 6 * 1)]
    assert planned.full.total == 44 + 6 * 4 * 3 + 6 * 2 * 6 + 6


def test_biases_dora_and_modules_to_save():
    model = mlp(8, 6, 4, 2)
    base = 8 * 6 + 6 + 6 * 4 + 4 + 4 * 2 + 2

    def trained(**options):
        planned = plan(model, Config(r=2, target_modules=["1"], **options))
        return planned.lora.trained, planned.lora.total

    ab = 2 * (6 + 4)
    assert trained() == (ab, base + ab)
    assert trained(bias="lora_only") == (ab + 4, base + ab)
    assert trained(bias="all") == (ab + 6 + 4 + 2, base + ab)
    assert trained(use_dora=True) == (ab + 4, base + ab + 4)
    assert trained(lora_bias=True) == (ab + 4, base + ab + 4)
    # Trained whole: a copy, because the base keeps its own for other adapters.
    assert trained(modules_to_save=["2"]) == (ab + 4 * 2 + 2, base + ab + 4 * 2 + 2)
    assert trained(modules_to_save=["2"], bias="all") == (ab + 10 + 6 + 4, base + ab + 10)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_biases_are_trained_where_they_are(dtype):
    model = mlp(8, 6, 4, 2)
    for bias, more in (("none", 0), ("lora_only", 4), ("all", 12)):
        costs = plan(model, Config(r=2, target_modules=["1"], bias=bias), dtype=dtype).lora
        assert costs.weights == 4 * (92 + 20) and costs.gradients == costs.checkpoint == 4 * (20 + more)


def test_what_is_shared_counts_once():
    model = nn.Module()
    model.embed = nn.Embedding(11, 4)
    model.head = nn.Linear(4, 11, bias=False)
    model.head.weight = model.embed.weight
    planned = plan(model, Config(r=2, target_modules=["head"]))
    assert planned.full.total == 44 and planned.lora.total == 44 + 2 * 15
    assert planned.full.weights == 44 * 4


def test_patterns_reach_the_plan():
    planned = plan(mlp(8, 6, 4), Config(r=4, lora_alpha=8, target_modules=["0", "1"], rank_pattern={"1": 2}, use_rslora=True))
    assert [(a.target.r, a.target.scaling, a.trained) for a in planned.adapters] == [
        (4, 4.0, 4 * 14), (2, 8 / math.sqrt(2), 2 * 10)]


# -- FLOPs --------------------------------------------------------------------------------------------------


class CountingNumpy:
    """NumPy, with the multiplications and additions of every matrix product added up."""

    def __init__(self):
        self.flops = 0

    def __getattr__(self, name):
        return getattr(np, name)

    def dot(self, a, b, out=None):
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return np.dot(a, b, out=out)


def flops_of(model, batch, monkeypatch):
    counter = CountingNumpy()
    first = next(p for p in model.parameters() if p.ndim > 1).data
    with monkeypatch.context() as patch:
        patch.setattr(backend.device_of(first), "xp", counter)
        y = model(draw(*batch if isinstance(batch, tuple) else (batch, first.shape[1]), dtype=first.dtype))
        loss = ops.mse(y, np.zeros(y.shape, first.dtype))
        forward, counter.flops = counter.flops, 0
        loss.backward()
        return forward, counter.flops


@pytest.mark.parametrize("chosen", [["0"], ["4"], ["8"], ["0", "8"], ["2", "4"], ["0", "2", "4", "6", "8"]], ids=str)
def test_flops_are_those_that_the_engine_spends(chosen, monkeypatch):
    model = mlp(5, 9, 4, 7, 3, 6, between=nn.Tanh)
    planned = plan(model, Config(r=2, target_modules=chosen), batch=11)
    assert flops_of(model, 11, monkeypatch) == (planned.full.forward, planned.full.backward)
    model = adapt(model, planned)
    for adapter in planned.adapters:
        model[int(adapter.target.path)].lora_B.data[...] = 1.0
    assert flops_of(model, 11, monkeypatch) == (planned.lora.forward, planned.lora.backward)
    assert sum(a.adapter for a in planned.adapters) == sum(
        6 * 11 * (a.a + a.b) for a in planned.adapters) - 2 * 11 * planned.adapters[0].a


@pytest.mark.parametrize("chosen, whole", [("0", "4"), ("4", "0"), ("2", "4")])
def test_flops_with_a_module_trained_whole(chosen, whole, monkeypatch):
    model = mlp(5, 9, 4, 7, between=nn.Tanh)
    planned = plan(model, Config(r=2, target_modules=[chosen], modules_to_save=[whole]), batch=3)
    model = adapt(model, planned)
    model[int(whole)].requires_grad(True)
    assert flops_of(model, 3, monkeypatch) == (planned.lora.forward, planned.lora.backward)
    loss = (model(draw(3, 5)) * 1.0).sum()
    kept = sum(math.prod(shape) for row in engine.ledger(loss).rows if "Linear" in row.op for shape, _ in row.kept)
    assert planned.lora.activations == 4 * kept


def test_flops_with_biases_trained_below_the_adapter(monkeypatch):
    model = mlp(5, 9, 4, 7, between=nn.Tanh)
    planned = plan(model, Config(r=2, target_modules=["2"], bias="all"), batch=3)
    model = adapt(model, planned)
    for i in (0, 2, 4):
        model[i].bias.trainable = True
    assert flops_of(model, 3, monkeypatch) == (planned.lora.forward, planned.lora.backward)
    (adapter,) = planned.adapters
    assert (adapter.base, adapter.adapter) == (4 * 3 * 9 * 4, 6 * 3 * 2 * (9 + 4))  # it has a dx, for the bias below


def test_layers_beside_the_first_are_counted_as_if_above_it(monkeypatch):
    model = nn.MultiheadAttention(16, 4, rng=np.random.default_rng(0))
    planned = plan(model, Config(r=2, target_modules=["q_proj", "k_proj", "v_proj"]), batch=5)
    model.requires_grad(False)
    for adapter in planned.adapters:
        setattr(model, adapter.target.path, lora.adapt(adapter.target.module, 2))
    forward, backward = flops_of(model, 5, monkeypatch)
    assert forward == planned.lora.forward
    assert planned.lora.backward - backward == 2 * (2 * 5 * 16 * 16 + 2 * 5 * 2 * 16)  # dx of k_proj and of v_proj


def test_rows_of_a_convolution_are_output_positions(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, rng=0), nn.Conv2d(8, 4, (3, 1), padding=(1, 0), rng=0))
    planned = plan(model, Config(r=2, target_modules=["0"]), batch=2 * 6 * 6)
    assert flops_of(model, (2, 3, 6, 6), monkeypatch) == (planned.full.forward, planned.full.backward)


def test_square_layers_cost_two_thirds():
    """3 n^2 multiplications a row in full training; 2 n^2 and little more with adapters."""
    n = 4096
    planned = plan([("h.*.W", (n, n), 1000)], Config(r=8, target_modules=["W"]), batch=7)
    whole = [costs.forward + costs.backward for costs in (planned.lora, planned.full)]
    assert whole[0] / whole[1] == pytest.approx((2 * n * n + 6 * n * 8) / (3 * n * n), rel=1e-3)


# -- every option, against what inject then makes --------------------------------------------------------------

OPTIONS = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.5}, "bias all": {"bias": "all"}, "bias lora_only": {"bias": "lora_only"},
    "saved": {"modules_to_save": ["head"]}, "saved, bias all": {"modules_to_save": ["head"], "bias": "all"},
    "rank_pattern": {"rank_pattern": {"second": 4}},
    "dora pissa": {"use_dora": True, "init_lora_weights": "pissa"}, "dora dropout": {"use_dora": True, "lora_dropout": 0.5},
    "dora olora dropout": {"use_dora": True, "init_lora_weights": "olora", "lora_dropout": 0.5},
    "pissa, saved, bias all": {"init_lora_weights": "pissa", "modules_to_save": ["head"], "bias": "all"},
}
OTHERS = {
    "alone": None,
    "beside lora_bias and a copy": {"lora_bias": True, "modules_to_save": ["head"]},
    "beside pissa and dora": {"init_lora_weights": "pissa", "use_dora": True},
    "beside bias": {"bias": "all", "modules_to_save": ["head"]},
}


class Net(nn.Module):
    """Layers called first, second and head; the head is tied, or made of two layers, if asked for."""

    def __init__(self, first, second, head):
        self.first, self.second, self.head = first, second, head

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def lines():
    return Net(nn.Linear(8, 6, rng=0), nn.Linear(6, 4, rng=0), nn.Linear(4, 5, rng=0))


def images():
    head = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2, rng=0), nn.Conv2d(4, 4, 1, bias=False, dtype="float64", rng=0))
    return Net(nn.Conv2d(4, 8, 3, rng=0), nn.Conv2d(8, 6, (3, 1), dtype="float16", rng=0), head)


def words():
    model = Net(nn.Embedding(11, 8, rng=0), nn.Linear(8, 8, rng=0), nn.Linear(8, 11, rng=0))
    model.head.weight = model.first.weight  # a copy of the head has one of its own
    return model


def both(make, option, other):
    """A model that has the other adapter, and a config with the option; None where the two cannot be."""
    model = make()
    if OTHERS[other]:
        lora.inject(model, Config(r=2, target_modules=["second"], **OTHERS[other]), "other", rng=0)
    chosen = OPTIONS[option]
    if "bias" in chosen and "bias" in (OTHERS[other] or ()):
        return model, None
    for_lines = chosen.get("lora_bias") or chosen.get("init_lora_weights", "gaussian") != "gaussian"
    return model, Config(r=2, target_modules=["second"] if make is words and for_lines else ["first", "second"], **chosen)


def check_numbers(model, config):
    planned = plan(model, config)
    report = lora.inject(model, config, "new", rng=0)
    trained = [p for p in model.parameters() if p.trainable]
    starts = [p for name, p in model.named_parameters() if ".new.start_" in name]
    nbytes = sum(p.data.nbytes for p in trained)
    costs = planned.lora
    assert (costs.trained, costs.total) == (report.trained, report.total)
    assert costs.trained == sum(p.size for p in trained) and costs.total == sum(p.size for p in model.parameters())
    assert costs.weights == sum(p.data.nbytes for p in model.parameters())
    assert (costs.gradients, costs.moments) == (nbytes, 2 * nbytes)
    assert costs.checkpoint == nbytes + sum(p.data.nbytes for p in starts)
    assert sum(a.start for a in planned.adapters) == sum(p.size for p in starts)
    assert [n for n in planned.notes if n.startswith("large")] == [n for n in report.notes if n.startswith("large")]
    return planned


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("make", [lines, images, words])
def test_a_plan_tells_the_numbers_that_inject_makes(make, other):
    base = sum(p.size for p in make().parameters())
    for option in OPTIONS:
        model, config = both(make, option, other)
        if config is not None:
            planned = check_numbers(model, config)
            assert planned.full.total == base, option  # what other adapters have is no part of it


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_plan_tells_what_the_engine_spends_and_keeps(option, other, monkeypatch):
    full = plan(lines(), EVERY, batch=11).full
    for change in ({}, {"target_modules": ["second"]}, {"target_modules": ["second", "head"], "modules_to_save": None}):
        model, config = both(lines, option, other)
        if config is None:
            return
        config = dataclasses.replace(config, **change)
        planned = plan(model, config, batch=11)
        lora.inject(model, config, "new", rng=0)
        kept = engine.ledger((model(draw(11, 8)) * 1.0).sum()).nbytes
        assert kept == planned.lora.activations
        assert flops_of(model, 11, monkeypatch) == (planned.lora.forward, planned.lora.backward)
        assert sum(a.base + a.adapter for a in planned.adapters) <= planned.lora.forward + planned.lora.backward
        assert planned.full == full


def test_half_numbers_keep_the_lengths_of_dora_in_float32():
    model = mlp(8, 6, dtype="float16")
    config = Config(r=2, target_modules=["0"], use_dora=True)
    planned = plan(model, config, batch=11)
    lora.inject(model, config, rng=0)
    assert engine.ledger(model(draw(11, 8, dtype="float16")).sum()).nbytes == planned.lora.activations


def test_numbers_of_a_model_with_copies_inside():
    for first, then in (("1", "1"), ("1", "0"), ("head", "head")):
        model = Net(nn.Linear(8, 6, rng=0), nn.Linear(6, 4, rng=0), mlp(4, 3, 2))
        lora.inject(model, Config(r=1, target_modules=["first"], modules_to_save=[first]), "other", rng=0)
        check_numbers(model, Config(r=2, target_modules=["second"], modules_to_save=[then], bias="all"))
    model = lines()
    lora.inject(model, Config(r=1, target_modules=["first"], modules_to_save=["head"]), "other", rng=0)
    check_numbers(model, Config(r=2, target_modules=["head"], bias="lora_only"))  # the original, inside its wrapper
    assert model.head.original.adapters.keys() == {"new"}

    head = Net(nn.Linear(4, 3, rng=0), nn.ReLU(), nn.ReLU())
    head.copies, head.bias_free = nn.Linear(4, 3, rng=0), nn.Linear(4, 3, rng=0).weight
    model = Net(nn.Linear(8, 6, rng=0), nn.Linear(6, 4, rng=0), head)
    lora.inject(model, Config(r=1, target_modules=["first"], modules_to_save=["head"]), "other", rng=0)
    check_numbers(model, Config(r=2, target_modules=["second"], bias="all"))  # "copies" is a name like any other


@pytest.mark.parametrize("make, whole", [(images, "head"), (words, "first")])
def test_what_is_inside_a_wrapper_costs_what_it_costs_outside(make, whole):
    model, config = make(), Config(r=2, target_modules=["second"])
    before = plan(model, config, batch=5)
    lora.inject(model, Config(r=2, target_modules=["second"], modules_to_save=[whole]), "other", rng=0)
    after = plan(model, config, batch=5)
    assert (after.full, after.lora[5:]) == (before.full, before.lora[5:])


def test_flops_above_a_copy_of_a_tied_layer(monkeypatch):
    model = Net(*(nn.Linear(4, 4, bias=False, rng=0) for _ in range(3)))
    model.second.weight = model.first.weight
    config = Config(r=2, target_modules=["head"], modules_to_save=["second"])
    planned = check_numbers(model, config)
    assert flops_of(model, 1, monkeypatch) == (planned.lora.forward, planned.lora.backward)


def test_dora_on_a_convolution_with_groups():
    plans, kept = [], []
    for use_dora in (False, True):
        model = Net(nn.Conv2d(4, 6, 3, groups=2, rng=0), nn.ReLU(), nn.ReLU())
        config = Config(r=4, target_modules=["first"], use_dora=use_dora)
        plans.append(plan(model, config, batch=2 * 3 * 3).lora)
        lora.inject(model, config, rng=0)
        kept.append(engine.ledger(model.first(draw(2, 4, 5, 5)).sum()).nbytes)
    assert kept[1] - kept[0] == plans[1].activations - plans[0].activations
    assert plans[1].forward - plans[0].forward == 2 * 2 * (3 * 2 * 18)  # B A in each group: (3, 2) times (2, 18)


def test_a_plan_notes_adapters_as_large_as_the_weight():
    config = Config(r=2, target_modules=["0", "1"])
    planned = check_numbers(mlp(4, 4, 9), config)
    note = "large: 0 has 16 numbers in A and B and 16 in its weight: r=2 saves nothing there"
    assert planned.notes == (note,) and str(planned).endswith(f"note: {note}")


def test_the_printed_plan_tells_what_a_start_and_dora_keep():
    text = str(plan([("W", (20, 10))], Config(r=2, target_modules=["W"], use_dora=True, init_lora_weights="pissa")))
    assert "kept: N (in + 2 r + out) numbers for each" in text
    assert "checkpoint: the trained numbers and the 60 of the frozen start; " in text


# -- bytes, measured ----------------------------------------------------------------------------------------


class Measured:
    """Bytes of array memory that live now beyond those at the start."""

    def __enter__(self):
        gc.collect()
        tracemalloc.start()
        return self

    def bytes(self):
        gc.collect()
        own = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([own]).traces)

    def __exit__(self, *error):
        tracemalloc.stop()


# No array below 1 kB, for which NumPy keeps a cache of its own; trained numbers a multiple of 16.
WIDTHS, BATCH = (256, 384, 256, 512), 40


@pytest.mark.parametrize("chosen, dtype", [(["0", "1", "2"], "float32"), (["1"], "float64"), (["0", "2"], "float32"),
                                           (None, "float32")], ids=str)
def test_bytes_are_those_that_training_takes(chosen, dtype):
    config = Config(r=4, target_modules=chosen or ["0"])
    planned = plan(mlp(*WIDTHS, dtype=dtype), config, batch=BATCH)
    costs = planned.lora if chosen else planned.full
    del planned
    x, target = draw(BATCH, WIDTHS[0], dtype=dtype), draw(BATCH, WIDTHS[-1], dtype=dtype)
    with Measured() as measured:
        model = mlp(*WIDTHS, dtype=dtype)
        if chosen:
            model = adapt(model, plan(model, config))
        optimizer = optim.Adam(model.parameters())
        assert measured.bytes() == costs.memory
        loss = ops.mse(model(x), target)
        kept = engine.ledger(loss)
        scalar = loss.data.nbytes
        d = BATCH * WIDTHS[-1] * x.itemsize  # kept by the loss
        assert kept.nbytes == costs.activations + d
        given = x.nbytes if chosen is None or "0" in chosen else 0  # not made here, so not measured
        assert measured.bytes() - costs.memory == pytest.approx(costs.activations - given + d, abs=scalar)
        loss.backward()
        optimizer.step()
        del loss, kept
        assert measured.bytes() == costs.memory
    assert sum(p.data.nbytes for p in optimizer.groups[0].parameters) == costs.checkpoint


def test_activations_of_adapted_layers_alone():
    model = mlp(6, 5, 4, 3, between=nn.ReLU)
    planned = plan(model, Config(r=2, target_modules=["2", "4"]), batch=7)
    loss = (adapt(model, planned)(draw(7, 6)) * 1.0).sum()
    kept = [row.kept for row in engine.ledger(loss).rows if row.op == "LoRALinear"]
    # x and z; the frozen W, A and B are parameters' own arrays and cost nothing.
    assert kept == [(((7, 5), "float32"), ((7, 2), "float32")), (((7, 4), "float32"), ((7, 2), "float32"))]
    assert planned.lora.activations == 4 * 7 * (5 + 2 + 4 + 2)


def test_dtypes():
    shapes = [("a", (10, 10)), ("b", (10, 10))]
    config = Config(r=1, target_modules=["a"])
    for dtype, size in (("float16", 2), ("float32", 4), ("float64", 8), (None, 4)):
        costs = plan(shapes, config, dtype=dtype).lora
        assert costs[2:5] == (220 * size, 20 * size, 40 * size) and costs.checkpoint == 20 * size
    mixed = Storage(frozen=0.5, trained=6, gradient=2, moment=4, activation=2, saved=2)
    costs = plan(shapes, config, dtype=mixed, batch=3).lora
    assert (costs.weights, costs.gradients, costs.moments, costs.activations, costs.checkpoint) == (
        100 + 20 * 6, 20 * 2, 2 * 20 * 4, 3 * 11 * 2, 20 * 2)
    assert costs.memory == costs.weights + costs.gradients + costs.moments
    assert Storage.of("bfloat16") == Storage.of("float16")  # NumPy has no such type; its size is known
    for wrong in ("int8", "float7", object()):
        with pytest.raises(ConfigError, match="floating-point"):
            plan(shapes, config, dtype=wrong)


# -- lists of shapes ----------------------------------------------------------------------------------------


def test_a_list_of_shapes_plans_like_the_model():
    model = mlp(8, 6, 4)
    described = [("0", (6, 8)), ("0.bias", (6,)), ("1", (4, 6)), ("1.bias", (4,))]
    for options in ({}, {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["0"]}):
        config = Config(r=2, target_modules=["1"], **options)
        ours, theirs = plan(model, config, batch=5), plan(described, config, batch=5)
        assert ours.lora == theirs.lora and ours.full == theirs.full


def test_fan_in_fan_out_swaps_the_axes():
    config = Config(r=2, target_modules=["b"])
    plain = plan([("b", (6, 8))], config, batch=5)
    swapped = plan([("b", (8, 6))], Config(r=2, target_modules=["b"], fan_in_fan_out=True), batch=5)
    assert plain.lora == swapped.lora and (plain.adapters[0].a, plain.adapters[0].b) == (16, 12)


@pytest.mark.parametrize("entry", [
    "W", ("W",), ("W", 3), ("W", ()), ("W", (3, 0)), ("W", (3, 2.0)), ("W", (3, 2), 0), ("W", (3, 2), True), ("", (3, 2)),
    (3, (3, 2)), ("W", (3, 2), 1, None), ("W", (3, 2), 1, "Linear", 4), ("W", (3, 2, 1), 1, "Embedding"),
    ("W", (3, 2), 1, "Conv2d"),
], ids=str)
def test_a_list_with_a_bad_entry(entry):
    with pytest.raises(ConfigError):
        plan([entry], Config(target_modules=["W"]))


def test_a_path_comes_once():
    for twice in ([("W", (3, 2)), ("W", (2, 3))], [("W", (3, 2)), ("W.bias", (3,)), ("W.bias", (3,))]):
        with pytest.raises(ConfigError, match="comes twice"):
            plan(twice, Config(target_modules=["W"]))


@pytest.mark.parametrize("batch", [0, -1, 2.0, True, "8"])
def test_a_bad_batch(batch):
    with pytest.raises(ConfigError, match="batch must be an int >= 1"):
        plan(mlp(3, 2), EVERY, batch=batch)


# -- the published figures ----------------------------------------------------------------------------------


def gpt3_plan(r, *names, **options):
    return plan(gpt3(), Config(r=r, target_modules=names), **{"dtype": "float16", **options})


def test_gpt3_from_its_dimensions():
    d, layers = 12288, 96
    total = layers * (12 * d * d + 13 * d) + 2 * d + (50257 + 2048) * d
    assert total == 174_604_259_328
    planned = gpt3_plan(4, "q_proj", "v_proj")
    assert planned.full.total == total
    assert planned.lora.trained == 96 * 2 * 4 * (d + d) == 18_874_368
    assert len(planned.adapters) == 192
    assert planned.fewer_trained == total / 18_874_368
    assert round(planned.fewer_trained) == 9251  # the paper's 10,000
    assert planned.lora.checkpoint == 37_748_736 == 36 * 2**20  # the paper's 35 MB
    assert planned.full.checkpoint == 2 * total  # 349 GB, the paper's 350 GB


@pytest.mark.parametrize("r, names, millions", [
    (1, ["q_proj", "v_proj"], 4.7), (8, ["q_proj", "v_proj"], 37.7),  # the two LoRA rows of the paper's table of results
    (8, ["q_proj"], 18.9), (4, ["q_proj", "v_proj"], 18.9), (2, ["q_proj", "k_proj", "v_proj", "out_proj"], 18.9),
], ids=str)  # its budget of 18 M over one, two or four types of weight
def test_gpt3_rows_of_the_paper(r, names, millions):
    assert round(gpt3_plan(r, *names).lora.trained / 1e6, 1) == millions


def test_gpt3_memory():
    config = 4, "q_proj", "v_proj"
    half = Storage.of("float16")
    no_gradients = gpt3_plan(*config, dtype=half._replace(gradient=0))
    assert no_gradients.full.memory == 6 * no_gradients.full.total  # 1.05 TB
    assert no_gradients.less_memory == pytest.approx(3, rel=1e-3)
    assert no_gradients.lora.memory == 2 * no_gradients.full.total + 6 * 18_874_368  # 349 GB
    assert gpt3_plan(*config).less_memory == pytest.approx(4, rel=1e-3)
    assert 6 < 1.2e12 / no_gradients.full.total < 8


def test_gpt2_small():
    model = gpt_shapes(layers=12, width=768, vocabulary=50257, context=1024)
    assert plan(model, Config(target_modules=["q_proj"])).full.total == 124_439_808
    with pytest.raises(ConfigError, match="layers must be an int"):
        gpt_shapes(0, 8, 8, 8)


def test_published_figures_are_told_in_one_line_each():
    figures = published_figures()
    values = {figure.says: figure.computed for figure in figures}
    assert values["175 B parameters"] == 174_604_259_328
    assert round(values["10,000 x fewer trained parameters"]) == 9251
    assert round(values["175 B to 17.5 M trained"], 2) == 7.42
    assert values["checkpoint from 350 GB to 35 MB"] == 37_748_736
    assert values["checkpoint from 1 TB to 25 MB"] == 6 * 4_718_592
    assert round(values["3 x less memory, with Adam"], 2) == 3.0
    assert round(values["from 1.2 TB to 350 GB"], 2) == 4.0
    assert round(values["training 25 % faster"], 2) == 1.5
    assert values["80 % saved at n = m = 200, k = 20"] == pytest.approx(0.8)
    assert values["2,001 trained numbers, 1/500 of the base"] == 2001
    assert len(figures) == len(values) == 10
    for figure in figures:
        assert "\n" not in str(figure) and figure.line in str(figure)
    line = next(str(f) for f in figures if f.says.startswith("80 %"))
    assert line.endswith("40,000 numbers in W; 4,000 in A, 4,000 in B: 32,000 saved, 80 %")


# -- the text -----------------------------------------------------------------------------------------------


def test_the_printed_plan():
    shapes = [("h.*.up", (20, 10), 3), ("h.*.up.bias", (20,), 3), ("head", (5, 20))]
    text = str(plan(shapes, Config(r=2, lora_alpha=4, target_modules=["up", "head"], exclude_modules=["1.up"],
                                   rank_pattern={"head": 1}), batch=10, dtype="float32"))
    lines = text.splitlines()
    assert lines[:4] == [
        "layer   type    weight    count  r  lora_alpha  s  trained  of weight",
        "---------------------------------------------------------------------",
        "h.*.up  Linear  (20, 10)      2  2           4  2      120     30.00%",
        "head    Linear  (5, 20)       1  1           4  4       25     25.00%"]
    found = [tuple(re.split(r"  +", line)) for line in lines[5:17]]
    for row in [("trained numbers", "145", "760", "5.24"), ("all numbers", "905", "760", "0.84"),
                ("weights", "3.62 kB", "3.04 kB", "0.84"), ("gradients", "580 bytes", "3.04 kB", "5.24"),
                ("Adam's m and v", "1.16 kB", "6.08 kB", "5.24"), ("kept for backward", "1.80 kB", "2.00 kB", "1.11")]:
        assert row in found
    assert "left out: h.1.up: exclude_modules has '1.up'" in lines
    assert lines[-1] == "note: uneven: h.*.up is adapted in 2 of 3 layers, not in 1"
    assert "bytes a number: frozen 4, trained 4, gradient 4, moment 4, activation 4, saved 4" in lines
