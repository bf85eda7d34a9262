"""What is interrupted has happened wholly or not at all: a KeyboardInterrupt before every line that changes a model."""
import copy

import numpy as np
import pytest
from interrupts import Interrupt

import minilora
from minilora import lora, nn, optim
from minilora.errors import MiniloraError
from minilora.lora import undo

IDS = [[1, 4, 2], [0, 3, 3]]


class Net(nn.Module):
    """Layers as an attribute, in nested lists, a tuple and nested dicts, one at two places; a head to be trained as a whole."""

    def __init__(self):
        made = dict(dtype="float64", rng=np.random.default_rng(0))
        self.embed = nn.Embedding(5, 3, **made)
        self.blocks = [[nn.Linear(3, 3, **made)]]
        self.pair = (nn.Linear(3, 3, **made), nn.Tanh())
        self.named = {"ways": {"up": nn.Linear(3, 3, **made)}}
        self.again = self.blocks[0][0]
        self.head = nn.Linear(3, 2, **made)

    def forward(self, ids):
        x = self.pair[0](self.blocks[0][0](self.embed(ids)))
        return self.head(self.again(self.named["ways"]["up"](self.pair[1](x))))


def inject(model, name="two", seed=2, **settings):
    config = dict(r=1, target_modules=["embed", "blocks.0.0", "pair.0", "up"], modules_to_save=["head"], bias="lora_only")
    lora.inject(model, lora.Config(**{**config, **settings}), name, rng=seed)


def plain(model):
    return model


def with_one(model):
    inject(model, "one", bias="none", use_dora=True, init_lora_weights=True)
    return scatter(model)


def with_two(model):
    inject(with_one(model))
    return scatter(model)


def with_low(model):
    """An adapter of A and B alone, in the hands of an optimizer, with gradients."""
    inject(model, "low", bias="none", modules_to_save=None)
    scatter(model)
    model.optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.1)
    model(IDS).sum().backward()
    return model


def rows(model, name="rows"):
    """An adapter with rows of the table."""
    inject(model, name, bias="none", target_modules=["up"], trainable_token_indices={"embed": [3, 1]})


def with_rows(model):
    rows(model)
    return scatter(model)


def merged_rows(model):
    lora.merge(with_rows(model), allow_lossy=True)
    return model


def merged(model):
    lora.merge(with_two(model), allow_lossy=True)
    return model


def scatter(model):
    rng = np.random.default_rng(5)
    for path, p in model.named_parameters():
        if "adapters" in path or "copies" in path:
            p.data += 0.3 * rng.standard_normal(p.shape)
    return model


def given(model, seed=7):
    rng = np.random.default_rng(seed)
    return {path: lora.LowRank(*(rng.standard_normal(p.shape) for p in (D.A, D.B)), 0.5)
            for path, D in lora.low_rank_updates(model).items()}


UPDATES = given(with_low(Net()))
STATE = {name: np.full_like(p, 0.25) for name, p in lora.lora_state_dict(with_low(Net())).items()}
CALLS = {  # the model that it is called on, and the call
    "inject": (plain, inject),
    "inject beside another": (with_one, inject),
    "activate": (with_two, lambda model: lora.activate(model, "one", weights=[0.5])),
    "activate none": (with_two, lambda model: lora.activate(model)),
    "remove": (with_two, lambda model: lora.remove(model, "two")),
    "remove the last": (with_one, lambda model: lora.remove(model, "one")),
    "merge": (with_two, lambda model: lora.merge(model, allow_lossy=True)),
    "unmerge": (merged, lora.unmerge),
    "inject rows": (with_one, rows),
    "merge rows": (with_rows, lambda model: lora.merge(model, allow_lossy=True)),
    "unmerge rows": (merged_rows, lora.unmerge),
    "remove rows": (with_rows, lambda model: lora.remove(model, "rows")),
    "hotswap": (with_low, lambda model: lora.hotswap(model, UPDATES)),
    "load_lora_state_dict": (with_low, lambda model: lora.load_lora_state_dict(model, STATE)),
    "inject_updates": (with_one, lambda model: lora.inject_updates(model, UPDATES, "new")),
    "freeze_A": (with_two, lora.freeze_A),
    "mark_only_lora_as_trainable": (with_low, lambda model: lora.mark_only_lora_as_trainable(model, "all")),
}


def picture(model):
    """All that can be seen of a model: modules in order, attributes, numbers, what is trained, gradients, the output."""
    modules = [(path, type(module).__name__, list(vars(module)), getattr(module, "active", None),
                getattr(module, "merged", None), list(getattr(module, "adapters", ())))
               for path, module in model.named_modules()]
    numbers = [(path, p.data.tobytes(), p.trainable, p.grad is None or p.grad.tobytes(), p.version)
               for path, p in model.named_parameters()]
    scales = [module.scaling for _, module in model.named_modules() if isinstance(module, lora.Adapter)]
    with minilora.no_grad():
        return modules, numbers, scales, model(IDS).data.tobytes()


def places(call, model, every):
    """The numbers of the lines to interrupt before: all; or of each line of the source the second time that it runs.

    Of one that runs once the first time. In a loop one layer then is changed already, and not the others.
    """
    run = Interrupt(None, every)
    assert not run.during(call, model)
    if every:
        return range(1, len(run.lines) + 1)
    times = {}
    for i, line in enumerate(run.lines, 1):
        times.setdefault(line, []).append(i)
    return sorted(numbers[:2][-1] for numbers in times.values())


def between(name, every=False):
    """The lines at which an interruption left the model neither as before nor as after."""
    start, call = CALLS[name]
    fresh = start(Net())

    def begin():
        return start(Net()) if start is with_low else copy.deepcopy(fresh)  # an optimizer does not know a copy

    call(begin())  # modules that are read when first used are read now
    model = begin()
    before = picture(model)
    numbers = places(call, model, every)
    after, wrong = picture(model), []
    assert before != after and len(numbers) > 2
    model = None
    for n in numbers:
        model = model or begin()
        assert Interrupt(n, every).during(call, model)
        now = picture(model)
        if now == before:
            continue  # the next call works on this very model
        if now != after:
            wrong.append(n)
        model = None
    model = model or begin()
    call(model)
    assert wrong or picture(model) == after
    return wrong


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_has_happened_wholly_or_not_at_all(name):
    assert between(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_same_before_every_line_that_runs(name):
    assert between(name, every=True) == []


@pytest.mark.parametrize("name", ["activate", "remove", "unmerge", "hotswap", "load_lora_state_dict", "inject_updates"])
def test_the_check_finds_a_call_that_is_not_undone(name, monkeypatch):
    monkeypatch.setattr(undo, "_put_back", lambda picture: None)
    assert between(name)


def test_an_error_within_is_undone_too(monkeypatch):
    """As a copy that does not fit into memory."""
    model = with_one(Net())
    before = picture(model)

    def fails(*args):
        raise MemoryError

    monkeypatch.setattr(lora.layers.saved.SavedModule, "add", fails)
    with pytest.raises(MemoryError):
        inject(model)
    assert picture(model) == before
    monkeypatch.undo()
    inject(model)


def test_a_refused_call_changes_nothing():
    model = with_two(Net())
    before = picture(model)
    with pytest.raises(MiniloraError):
        inject(model)
    assert picture(model) == before
