"""lora.mixed and lora.disabled belong to the thread and the task that opened them, and to nobody else."""
import asyncio
import contextvars
import copy
import pickle
import sys
import threading

import numpy as np
import pytest
from conftest import fetch

import minilora
from minilora import lora, nn
from minilora.errors import StateError
from minilora.nn import by_row as context

X = np.random.default_rng(0).standard_normal((4, 3))
MIXES = {"one": ["one"] * 4, "two": ["two"] * 4, "both": ["two", "one", "__base__", "two"], "none": ["__base__"] * 4}


def make(seed=1):
    """Two adapted layers and a head that "two" trains as a whole."""
    made = dict(dtype="float64", rng=np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(3, 4, **made), nn.Linear(4, 3, **made), nn.Linear(3, 2, **made))
    lora.inject(model, lora.Config(r=1, target_modules=["0", "1"]), "one", rng=0)
    lora.inject(model, lora.Config(r=2, target_modules=["1"], modules_to_save=["2"], use_dora=True), "two", rng=0)
    rng = np.random.default_rng(seed)
    for path, p in model.named_parameters():
        if "adapters" in path or "copies" in path:
            p.data += rng.standard_normal(p.shape)
    lora.activate(model, "two", weights=[0.5])
    return model


def run(model):
    return fetch(model(minilora.tensor(X))).tobytes()


def outputs(model):
    """The outputs in every mix, one after the other; with none; and switched off."""
    found = {"active": run(model)}
    for mix, names in MIXES.items():
        with lora.mixed(model, names):
            found[mix] = run(model)
    with lora.disabled(model):
        found["off"] = run(model)
    assert len(set(found.values())) == 5 and found["off"] == found["none"]
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    assert context._open.get() == ()


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    """Run functions in a thread each, all at once; raise what they raise."""
    errors, gate = [], threading.Barrier(len(functions))

    def guarded(function):
        try:
            gate.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_with_different_mixes_over_one_model(quick_switches):
    model = make()
    expected = outputs(model)

    def serve(mix):
        def requests():
            for _ in range(30):
                with lora.disabled(model) if mix == "off" else lora.mixed(model, MIXES[mix]):
                    assert run(model) == expected[mix], mix
                assert run(model) == expected["active"]
        return requests

    in_threads(*map(serve, ["one", "two", "both", "off"]))
    assert run(model) == expected["active"] and outputs(model) == expected


def test_tasks_with_different_mixes_over_one_model():
    model = make()
    expected = outputs(model)

    async def serve(mix):
        for _ in range(3):
            with lora.mixed(model, MIXES[mix]):
                await asyncio.sleep(0)
                assert run(model) == expected[mix]
                await asyncio.gather(*[inner(other, mix) for other in MIXES])
                assert run(model) == expected[mix]
            await asyncio.sleep(0)
            assert run(model) == expected["active"]

    async def inner(mix, outer):
        assert run(model) == expected[outer]  # a task starts with what is open where it is made
        with lora.mixed(model, MIXES[mix]):
            await asyncio.sleep(0)
            assert run(model) == expected[mix]

    async def serve_all():
        await asyncio.gather(*map(serve, MIXES))

    asyncio.run(serve_all())


def test_a_copy_of_the_context_goes_on_in_it_and_a_bare_thread_does_not():
    model = make()
    expected, found = outputs(model), {}
    with lora.mixed(model, MIXES["both"]):
        inside = contextvars.copy_context()
        in_threads(lambda: found.update(bare=run(model)), lambda: found.update(copied=inside.copy().run(run, model)))
        with lora.disabled(model):
            assert inside.run(run, model) == expected["both"]
    assert found == {"bare": expected["active"], "copied": expected["both"]}
    in_threads(lambda: found.update(later=inside.run(run, model)))  # also when the with block is over
    assert found["later"] == expected["both"] and run(model) == expected["active"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "last in, first out"])
def test_generators_that_end_in_any_order_leave_nothing_open(order):
    model = make()
    expected = outputs(model)

    def serve(mix):
        with lora.mixed(model, MIXES[mix]):
            yield run(model)
            yield run(model)

    generators = [serve("one"), serve("two")]
    assert [next(generator) for generator in generators] == [expected["one"], expected["two"]]
    assert run(model) == expected["two"]  # suspended inside: as with no_grad, the caller is inside too
    generators[order[0]].close()
    assert run(model) == expected[["one", "two"][order[1]]]
    generators[order[1]].close()
    assert run(model) == expected["active"]


def test_a_generator_that_ends_in_another_thread_leaves_nothing_open():
    model = make()
    expected = outputs(model)

    def suspended():
        with lora.mixed(model, MIXES["two"]):
            yield

    generator = suspended()
    next(generator)
    assert run(model) == expected["two"]
    in_threads(generator.close)
    assert run(model) == expected["active"]
    assert [context.rows_of(place) for place in model] == [None] * 3
    context._open.set(())  # it is over, and is taken no notice of; only its own thread could take it out


def test_contexts_over_several_models_and_over_a_part_of_one():
    model, other = make(1), make(2)
    expected, of_other = outputs(model), outputs(other)
    with lora.mixed(model, MIXES["one"]), lora.mixed(other, MIXES["two"]):
        assert (run(model), run(other)) == (expected["one"], of_other["two"])
        with lora.disabled(model):
            assert (run(model), run(other)) == (expected["off"], of_other["two"])
        assert (run(model), run(other)) == (expected["one"], of_other["two"])
    x = minilora.tensor(X)
    parts = [fetch(layer.frozen(x)) for layer in [model[0]]]
    with lora.mixed(model, MIXES["one"]), lora.disabled(model[0]):
        assert fetch(model[0](x)).tobytes() == parts[0].tobytes() and run(model) not in expected.values()
    with lora.disabled(model[0]), lora.mixed(model, MIXES["one"]):
        assert run(model) == expected["one"]


def test_an_error_and_an_interruption_end_a_context(monkeypatch):
    model = make()
    expected = outputs(model)
    with pytest.raises(ZeroDivisionError), lora.mixed(model, MIXES["one"]), lora.disabled(model):
        1 / 0
    assert run(model) == expected["active"]
    close = context._close

    def interrupted(one):
        monkeypatch.setattr(context, "_close", close)
        raise KeyboardInterrupt

    monkeypatch.setattr(context, "_close", interrupted)
    with pytest.raises(KeyboardInterrupt), lora.mixed(model, MIXES["one"]):
        pass
    assert run(model) == expected["active"]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_is_in_no_context(twin):
    model = make()
    expected = outputs(model)
    with lora.mixed(model, MIXES["both"]):
        inside = twin(model)
        assert run(inside) == expected["active"] and run(model) == expected["both"]
        with lora.mixed(inside, MIXES["two"]):
            assert run(inside) == expected["two"] and run(model) == expected["both"]
    assert outputs(inside) == expected


def test_no_attribute_says_that_a_context_is_open():
    model = make()
    before = [dict(vars(module)) for _, module in model.named_modules()]
    with lora.mixed(model, MIXES["both"]), lora.disabled(model):
        assert [dict(vars(module)) for _, module in model.named_modules()] == before


def test_what_the_owner_does_meanwhile_crashes_no_request(quick_switches):
    """Requests with names of their own do not see it, but for merging, which they report."""
    model = make()
    expected, done = outputs(model), threading.Event()

    def serve():
        while not done.is_set():
            with lora.mixed(model, MIXES["both"]):
                assert run(model) == expected["both"]

    def own():
        try:
            for _ in range(10):
                lora.inject(model, lora.Config(r=1, target_modules=["0", "1"], modules_to_save=["2"]), "three", rng=0)
                lora.activate(model, "one")
                lora.activate(model, "two", weights=[0.5])
                with lora.disabled(model):
                    assert run(model) == expected["off"]
                lora.remove(model, "three")
        finally:
            done.set()

    in_threads(serve, serve, own)
    lora.activate(model, "two", weights=[0.5])
    with lora.mixed(model, MIXES["both"]):
        in_threads(lambda: lora.merge(model))  # another thread has no context open
        with pytest.raises(StateError, match="^1: this layer was merged while lora.disabled or lora.mixed is open"):
            run(model)
        in_threads(lambda: lora.unmerge(model))
        assert run(model) == expected["both"]
    assert run(model) == expected["active"]


def test_a_merged_tied_head_is_refused_within_a_context():
    layer = lora.Embedding(5, 3, r=1, dtype="float64", rng=0)
    h = minilora.tensor(X)
    with lora.disabled(layer):
        in_threads(layer.merge)
        with pytest.raises(StateError, match="merged while lora.disabled or lora.mixed is open"):
            layer.logits(h)
