"""Random lives of a model with adapters: whatever is done to it in whatever order, it computes what plain NumPy computes."""
import copy
import pickle
import threading

import numpy as np
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interrupts import Interrupt
from lora_oracle import IDS, Given, Net, State

import minilora
from minilora import lora, optim
from minilora.errors import MiniloraError
from minilora.nn import by_row as context

NAMES = ("a", "b", "c")
KINDS = {
    "plain": dict(target_modules=["embed", "fc", "out"]),
    "rslora": dict(target_modules=["fc", "embed"], use_rslora=True, r=2),
    "dora": dict(target_modules=["embed", "out"], use_dora=True, r=2),
    "bias": dict(target_modules=["fc", "out"], lora_bias=True),
    "pissa": dict(target_modules=["fc"], init_lora_weights="pissa", r=2),
    "orthogonal": dict(target_modules=["out"], init_lora_weights="orthogonal", r=2),
    "saved": dict(target_modules=["fc"], modules_to_save=["head"]),
}
kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 99)
names = st.sampled_from(NAMES)
mixes = st.lists(st.sampled_from((*NAMES, "__base__")), min_size=3, max_size=3)
factors = st.sampled_from([1.0, 1.0, -0.5, 0.0, 2.0])


def run(model):
    with minilora.no_grad():
        return model(IDS).data.copy()


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.model = Net().eval()
        self.state = State({path: p.data.copy() for path, p in self.model.named_parameters()})

    # -- what the library says ----------------------------------------------------------------------------------------

    def parameters(self, name):
        """The adapter's arrays by layer, and its copy of the head: the very Parameters."""
        layers = {path: dict(module.adapters[name].own_parameters()) for path, module in self.model.named_modules()
                  if name in getattr(module, "adapters", ())}
        head = getattr(self.model.head, "copies", {}).get(name)
        return layers, dict(head.own_parameters()) if head else None

    def note(self, name, trained=True):
        """Take the numbers of a new adapter over."""
        layers, head = self.parameters(name)
        scaling = {path: module.adapters[name].scaling for path, module in self.model.named_modules() if path in layers}
        return Given({path: {**{key: p.data.copy() for key, p in own.items()}, "s": scaling[path]}
                      for path, own in layers.items()}, head and {key: p.data.copy() for key, p in head.items()}, trained)

    def scatter(self, name, seed):
        rng = np.random.default_rng(seed)
        layers, head = self.parameters(name)
        for own in (*layers.values(), head or {}):
            for key, p in own.items():
                if not key.startswith("start"):
                    p.data += 0.4 * rng.standard_normal(p.shape)

    def allowed(self, call, allowed):
        """Whether it was; what is not is refused by an error of ours."""
        try:
            call()
        except MiniloraError:
            assert not allowed
            return False
        assert allowed
        return True

    def free(self):
        return not self.state.merged

    # -- rules --------------------------------------------------------------------------------------------------------

    @initialize(first=kinds, second=kinds, weights=st.tuples(factors, factors))
    def begin(self, first, second, weights):
        self.inject("a", first, 1)
        self.inject("b", second, 2)
        self.activate([("a", weights[0]), ("b", weights[1])], True, False)

    @rule(name=names, kind=kinds, seed=seeds)
    def inject(self, name, kind, seed):
        config = lora.Config(**{"r": 1, "lora_alpha": 3, **KINDS[kind]})
        if self.allowed(lambda: lora.inject(self.model, config, name, rng=seed, exact=kind == "dora"),
                        self.free() and name not in self.state.adapters):
            y, base = run(self.model), self.state.row(IDS, {})
            np.testing.assert_allclose(y, base, rtol=0, atol=1e-12)  # an adapter starts as the base
            self.scatter(name, seed)
            self.state.adapters[name], self.state.active = self.note(name), {name: 1.0}

    @rule(name=names, seed=seeds, s=st.sampled_from([1.0, -0.5, 2.0]))
    def inject_updates(self, name, seed, s):
        rng = np.random.default_rng(seed)
        updates = {path: lora.LowRank(rng.standard_normal((1, n)), rng.standard_normal((out, 1)), s)
                   for path, n, out in (("embed", 5, 3), ("out", 4, 3))}
        if self.allowed(lambda: lora.inject_updates(self.model, updates, name),
                        self.free() and name not in self.state.adapters):
            self.state.adapters[name] = Given({path: dict(lora_A=D.A, lora_B=D.B, s=s) for path, D in updates.items()})
            self.state.active = {name: 1.0}

    @rule(chosen=st.lists(st.tuples(names, factors), max_size=3, unique_by=lambda pair: pair[0]), trained=st.booleans(),
          unknown=st.booleans())
    def activate(self, chosen, trained, unknown):
        there = self.state.adapters
        chosen = [pair for pair in chosen if unknown or pair[0] in there]
        heads = [name for name, _ in chosen if name in there and there[name].head]
        fits = all(name in there for name, _ in chosen) and len(heads) < 2
        if self.allowed(lambda: lora.activate(self.model, *[name for name, _ in chosen], trainable=trained,
                                              weights=[weight for _, weight in chosen]), self.free() and there and fits):
            self.state.active = dict(chosen)
            for name, _ in chosen:
                there[name].trained = trained

    @rule(name=names)
    def remove(self, name):
        given = self.state.adapters.get(name)
        held = given and name in self.state.active and self.state.merged & given.layers.keys()
        if self.allowed(lambda: lora.remove(self.model, name), given and not held):
            del self.state.adapters[name]
            self.state.active.pop(name, None)

    def updating(self):
        return {path for name in self.state.active for path in self.state.adapters[name].layers}

    @rule()
    def merge(self):
        if self.allowed(lambda: lora.merge(self.model, allow_lossy=True), self.free() and self.updating()):
            self.state.merged = self.updating()

    @precondition(lambda self: self.updating() - self.state.merged)
    @rule(seed=seeds)
    def merge_one_layer(self, seed):
        path = sorted(self.updating() - self.state.merged)[seed % len(self.updating() - self.state.merged)]
        getattr(self.model, path).merge(allow_lossy=True)
        self.state.merged = self.state.merged | {path}

    @rule()
    def unmerge(self):
        if self.allowed(lambda: lora.unmerge(self.model), self.state.merged):
            self.state.merged = set()

    @rule()
    def bake(self):
        """The composed weights are the base from now on, and no adapter is left."""
        if self.allowed(lambda: lora.bake(self.model, allow_lossy=True), self.updating() or self.state.merged):
            whole = self.state.baked()
            self.state = State({path: p.data.copy() for path, p in self.model.named_parameters()})
            assert self.state.base.keys() == whole.keys()
            for path, array in whole.items():
                np.testing.assert_allclose(self.state.base[path], array, rtol=0, atol=1e-12 * max(1.0, np.abs(array).max()))

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]), inside=mixes)
    def copied(self, how, inside):
        if self.free() and set(inside) <= self.state.adapters.keys() | {"__base__"} and self.state.adapters:
            with lora.mixed(self.model, inside):
                twin = how(self.model)
        else:
            twin = how(self.model)
        self.check()  # the model itself is as it was
        self.model = twin

    @precondition(lambda self: self.free() and any(True for _ in self.state.trained()))
    @rule(adam=st.booleans())
    def train(self, adam):
        """One step; the gradients by the complex step through the composed weights."""
        places = [(place, key, path, self.state.gradient(place, key)) for place, key, path in self.state.trained()]
        moving = [p for p in self.model.parameters() if p.trainable]
        optimizer = optim.Adam(moving, lr=0.1, eps=0.1) if adam else optim.SGD(moving, lr=0.01)
        optimizer.zero_grad()
        self.model.train().loss().backward()
        optimizer.step()
        self.model.eval()
        there = dict(self.model.named_parameters())
        for place, key, path, g in places:
            step = 0.1 * g / (np.abs(g) + 0.1) if adam else 0.01 * g
            np.testing.assert_allclose(there[path].data, place[key] - step, rtol=1e-7, atol=1e-9, err_msg=path)
            place[key] = there[path].data.copy()

    @precondition(lambda self: self.state.adapters)
    @rule(name=names, seed=seeds, s=st.sampled_from([1.0, -0.5, 2.0]))
    def hotswap(self, name, seed, s):
        given, rng = self.state.adapters.get(name), np.random.default_rng(seed)
        if given is None or given.head:
            return
        simple = all(part.keys() == {"lora_A", "lora_B", "s"} for part in given.layers.values())
        new = {path: (rng.standard_normal(part["lora_A"].shape), rng.standard_normal(part["lora_B"].shape))
               for path, part in given.layers.items()}
        held = name in self.state.active and self.state.merged & given.layers.keys()
        if self.allowed(lambda: lora.hotswap(self.model, {path: lora.LowRank(A, B, s) for path, (A, B) in new.items()}, name),
                        simple and not held):
            for path, (A, B) in new.items():
                given.layers[path].update(lora_A=A, lora_B=B, s=s)

    @rule(seed=seeds)
    def load(self, seed):
        """loralib's state: where each layer has one adapter."""
        owners = {path: [name for name, given in self.state.adapters.items() if path in given.layers]
                  for path in ("embed", "fc", "out")}
        owners["head"] = [name for name, given in self.state.adapters.items() if given.head]
        owners = {path: found for path, found in owners.items() if found}
        if not owners or max(map(len, owners.values())) > 1:
            return
        rng, values = np.random.default_rng(seed), lora.lora_state_dict(self.model)
        values = {key: array + 0.1 * rng.standard_normal(array.shape) for key, array in values.items()}
        if self.allowed(lambda: lora.load_lora_state_dict(self.model, values), self.free()):
            for key, array in values.items():
                path, _, part = key.rpartition(".")
                given = self.state.adapters[owners[path][0]]
                (given.head if path == "head" else given.layers[path])[part] = array

    # -- contexts -----------------------------------------------------------------------------------------------------

    def known(self, mix):
        """The mix with __base__ for what is no adapter at present."""
        return [name if name in self.state.adapters else "__base__" for name in mix]

    @precondition(lambda self: self.free() and self.state.adapters)
    @rule(mix=mixes, other=mixes)
    def within(self, mix, other):
        mix, other = self.known(mix), self.known(other)
        with lora.mixed(self.model, mix):
            self.same(run(self.model), mix)
            with lora.disabled(self.model):
                self.same(run(self.model), ["__base__"] * 3)
                with lora.mixed(self.model, other):
                    self.same(run(self.model), other)
            for call in (lora.merge, lambda model: lora.remove(model, next(iter(self.state.adapters)))):
                assert not self.allowed(lambda: call(self.model), False)
            self.same(run(self.model), mix)

    @precondition(lambda self: self.free() and self.state.adapters)
    @rule(first=mixes, second=mixes)
    def two_threads(self, first, second):
        """One goes in, then the other; both compute; one leaves, and the other computes again."""
        found, gate = [], threading.Barrier(2, timeout=20)

        def serve(mix, early):
            try:
                if not early:
                    gate.wait()
                with lora.mixed(self.model, mix):
                    if early:
                        gate.wait()
                    gate.wait()
                    found.append((run(self.model), mix))
                    gate.wait()
                    if not early:
                        gate.wait()
                        found.append((run(self.model), mix))
                found.append((run(self.model), None))
                if early:
                    gate.wait()
            except BaseException as error:
                found.append(error)
                gate.abort()

        first, second = self.known(first), self.known(second)
        threads = [threading.Thread(target=serve, args=args) for args in ((first, True), (second, False))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in found:
            if isinstance(result, BaseException):
                raise result
            self.same(*result)

    # -- interruptions ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state.adapters)
    @rule(data=st.data(), n=st.integers(0, 119).map(lambda i: 37 * i % 120 + 1))  # small numbers are drawn most: spread them
    def interrupted(self, data, n):
        """Ctrl-C in the middle: as before, or as after."""
        there = sorted(self.state.adapters)
        name = data.draw(st.sampled_from(there))
        calls = {"activate": (lora.activate, dict(active={name: 1.0})),
                 "none": (lambda m, name: lora.activate(m), dict(active={})),
                 "merge": (lambda m, name: lora.merge(m, allow_lossy=True), dict(merged=self.updating())),
                 "unmerge": (lambda m, name: lora.unmerge(m), dict(merged=set()))}
        possible = (["activate", "none", *["merge"] * bool(self.updating())]) if self.free() else ["unmerge"]
        call, change = calls[data.draw(st.sampled_from(possible))]
        happened = not Interrupt(n).during(call, self.model, name)
        before, after = self.state, copy.copy(self.state)
        for key, value in change.items():
            setattr(after, key, value)
        if "active" in change:
            trained = self.trainable()
            happened = happened or self.actives() == after.active and bool(trained) == bool(after.active)
            if happened and after.active:
                self.state.adapters[name].trained = True
        else:
            happened = happened or self.merged() == after.merged
        self.state = after if happened else before

    # -- what holds at all times --------------------------------------------------------------------------------------

    def same(self, y, mix):
        expected = self.state.output(mix)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10 * max(1.0, np.abs(expected).max()))

    def trainable(self):
        return {path for path, p in self.model.named_parameters() if p.trainable}

    def actives(self):
        rows = lora.status(self.model).rows
        return {name: weight for row in rows for name, weight in row.active.items()} if rows else {}

    def merged(self):
        return {path for path, module in self.model.named_modules() if getattr(module, "merged", False)}

    @invariant()
    def check(self):
        assert context._open.get() == ()
        self.same(run(self.model), None)
        assert self.merged() == self.state.merged and self.trainable() == {path for _, _, path in self.state.trained()}
        assert self.actives().keys() == self.state.active.keys()
        for path, array in self.state.base.items():
            layer, _, name = path.rpartition(".")
            module = getattr(self.model, layer)
            p = getattr(getattr(module, "original", module), name)
            assert layer in self.state.merged or p.data.tobytes() == array.tobytes(), path
        for name, given in self.state.adapters.items():
            layers, head = self.parameters(name)
            assert {path: own.keys() for path, own in layers.items()} == \
                {path: part.keys() - {"s"} for path, part in given.layers.items()}
            for path, own in layers.items():
                assert all(np.array_equal(p.data, given.layers[path][key]) for key, p in own.items())
            assert (head is None) == (given.head is None)

    def teardown(self):
        if self.state.merged:
            lora.unmerge(self.model)
            self.state.merged = set()
            self.check()


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=20)
