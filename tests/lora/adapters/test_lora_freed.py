"""A model is freed the moment its last name goes: no call of lora leaves a reference cycle that would keep its arrays."""
import contextlib
import gc
import weakref

import pytest

from minilora import lora, nn
from minilora.errors import MiniloraError

CONFIG = dict(r=1, target_modules=["0", "1"])


def make():
    model = nn.Sequential(nn.Embedding(5, 3, rng=0), nn.Linear(3, 4, rng=1), nn.Linear(4, 2, rng=2))
    lora.inject(model, lora.Config(modules_to_save=["2"], **CONFIG), "one", rng=0)
    lora.inject(model, lora.Config(**CONFIG), "two", rng=0)
    return model


def alone():
    return nn.Sequential(lora.Embedding(5, 3, r=1, rng=0), lora.Linear(3, 4, r=1, rng=0))


def within(context):
    def enter(model):
        with context(model):
            model([[1, 2], [0, 3]])
    return enter


def refused(call):
    def run(model):
        with contextlib.suppress(MiniloraError):
            call(model)
    return run


def suspended(model):
    """A generator that is left inside, and goes."""
    def serve():
        with lora.mixed(model, ["two"]):
            yield
    next(serve())


def merge_and_back(model):
    lora.activate(model, "two")
    lora.merge(model)
    lora.unmerge(model)


def spoil(model):
    for i in (0, 1):
        model[i].adapters["two"].lora_B.data[...] = float("nan")


def merge(model):
    lora.activate(model, "two")
    lora.merge(model)


CALLS = {
    "inject": (make, lambda m: None),
    "inject dora": (make, lambda m: lora.inject(m, lora.Config(use_dora=True, **CONFIG), "three")),
    "inject refused": (make, refused(lambda m: lora.inject(m, lora.Config(**CONFIG), "one"))),
    "match": (make, lambda m: lora.match(m, lora.Config(**CONFIG))),
    "match refused": (make, refused(lambda m: lora.match(m, lora.Config(target_modules=["zero"])))),
    "plan": (make, lambda m: lora.plan(m, lora.Config(**CONFIG))),
    "activate": (make, lambda m: lora.activate(m, "one", weights=[2.0])),
    "activate refused": (make, refused(lambda m: lora.activate(m, "on"))),
    "freeze_A": (make, lora.freeze_A),
    "status": (make, lambda m: str(lora.status(m))),
    "remove": (make, lambda m: lora.remove(m, "one")),
    "remove all": (make, lambda m: [lora.remove(m, name) for name in ("one", "two")]),
    "disabled": (make, within(lora.disabled)),
    "mixed": (make, within(lambda m: lora.mixed(m, ["one", "two"]))),
    "mixed refused": (make, refused(within(lambda m: lora.mixed(m, ["one"] * 3)))),
    "mixed, suspended": (make, suspended),
    "merge": (make, merge),
    "merge and unmerge": (make, merge_and_back),
    "merge refused": (make, refused(lambda m: (lora.activate(m, "two"), m[1].merge(), lora.merge(m)))),
    "merge refused twice": (make, refused(lambda m: (merge(m), lora.merge(m)))),
    "merge of NaN": (make, refused(lambda m: (spoil(m), merge(m)))),
    "low_rank_updates": (make, lambda m: lora.low_rank_updates(m, "two")),
    "inject_updates": (make, lambda m: lora.inject_updates(m, lora.low_rank_updates(m, "two"), "three")),
    "hotswap": (make, lambda m: lora.hotswap(m, lora.low_rank_updates(m, "two"), "two")),
    "hotswap refused": (make, refused(lambda m: lora.hotswap(m, {}, "two"))),
    "lora_plus_groups": (make, lambda m: lora.lora_plus_groups(m, 0.1)),
    "mark_only_lora_as_trainable": (alone, lora.mark_only_lora_as_trainable),
    "load_lora_state_dict": (alone, lambda m: lora.load_lora_state_dict(m, lora.lora_state_dict(m))),
    "load refused": (alone, refused(lambda m: lora.load_lora_state_dict(m, {}))),
    "adapt": (alone, lambda m: lora.adapt(nn.Linear(3, 3, rng=0), r=1)),
    "training": (make, lambda m: m([[1, 2]]).sum().backward()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_goes_with_its_last_name(name):
    start, call = CALLS[name]
    call(start())  # what is read when first used may leave cycles of its own
    gc.disable()
    try:
        model = start()
        call(model)
        parts = [weakref.ref(module) for _, module in model.named_modules()]
        parts += [weakref.ref(p) for p in model.parameters()] + [weakref.ref(p.data) for p in model.parameters()]
        del model
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()
    assert len(parts) > 10
