"""What a module is found to hold: at any depth, under one path each, as state or as parameter, in copies and in files."""
import copy
import pickle
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import example, given

import minilora
from minilora import lora, nn
from minilora.errors import DTypeError, MiniloraError, StateDictError, StateError


def parameter(n=1):
    return minilora.Parameter(place(np.arange(n, dtype="float32")))


def names(module):
    return [name for name, _ in module.named_parameters()]


class Holder(nn.Module):
    """Holds whatever it is given."""

    def __init__(self, /, **contents):
        for name, value in contents.items():
            setattr(self, name, value)


# -- places -------------------------------------------------------------------------------------------------


def test_sequential_subclass_with_a_head():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4, rng=0), nn.ReLU())
            self.head = nn.Linear(4, 2, rng=1)
            self.scale = parameter()

        def forward(self, x):
            return self.head(super().forward(x)) * self.scale

    net = Net()
    assert names(net) == ["scale", "0.weight", "0.bias", "head.weight", "head.bias"]
    assert list(net.state_dict()) == names(net)
    assert len(net) == 2 and list(net) == [net[0], net[1]] and "(head): Linear" in repr(net)
    net(minilora.tensor(np.ones((5, 3), "float32"))).sum().backward()
    assert net.head.weight.grad is not None and net.scale.grad is not None


def test_containers_in_containers():
    a, b, c, d = (nn.Linear(1, 1, bias=False) for _ in range(4))
    model = Holder(blocks=[[a], [b, "text", 3, None]], named={"left": ({"deep": c}, [parameter()]), 5: d})
    assert names(model) == ["named.left.1.0", "blocks.0.0.weight", "blocks.1.0.weight", "named.left.0.deep.weight",
                            "named.5.weight"]
    assert [path for path, _ in model.named_modules()] == ["", "blocks.0.0", "blocks.1.0", "named.left.0.deep", "named.5"]
    assert not model.eval().named["left"][0]["deep"].training


def test_sets_and_plain_objects_are_not_looked_into():
    """Documented: what cannot be named in a fixed order has no path."""
    plain = type("Plain", (), {})()
    plain.layer = nn.Linear(1, 1)
    assert names(Holder(some={nn.Linear(1, 1)}, plain=plain)) == []


AMBIGUOUS = {
    "0 and '0'": (lambda: Holder(parts={0: parameter(), "0": parameter()}), ["Holder.parts[0]", "Holder.parts['0']"]),
    "modules 0 and '0'": (lambda: Holder(parts={0: nn.Linear(1, 1), "0": nn.ReLU()}), ["parts[0]", "parts['0']"]),
    "a dot": (lambda: Holder(d={"a.b": parameter(), "a": {"b": parameter()}}), ["d['a.b']", "d['a']['b']"]),
    "a dot in a module": (lambda: Holder(d={"a.own": parameter(), "a": Holder(own=parameter())}), ["d['a.own']", "d['a'].own"]),
    "two depths": (lambda: Holder(d={"a.0": nn.ReLU(), "a": [nn.ReLU()]}), ["d['a.0']", "d['a'][0]"]),
    "further in": (lambda: nn.Sequential(Holder(d={1: parameter(), "1": parameter()})), ["Sequential.0.d[1]", "d['1']"]),
}


@pytest.mark.parametrize(("make", "places"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_two_places_with_one_path_are_refused(make, places):
    model = make()
    with pytest.raises(StateError) as caught:
        model.state_dict()
    assert all(place in str(caught.value) for place in places), caught.value
    with pytest.raises(StateError):
        model.load_state_dict({})


def test_state_and_parameter_with_one_path_are_refused():
    with pytest.raises(StateError, match=r"d\['m.step'\] and Holder\.d\['m'\]\.step|d\['m'\]\.step and Holder\.d\['m.step'\]"):
        Holder(d={"m.step": parameter(), "m": nn.Dropout(0.5)}).state_dict()


def test_keys_with_dots_are_fine_alone():
    assert names(Holder(d={"a.b": parameter()})) == ["d.a.b"]


def circle():
    child = Holder(weight=parameter())
    model = Holder(first=nn.ReLU(), parts=[child])
    child.parent = model
    return model, child


def long_circle():
    model, child = circle()
    child.parent = Holder(deep={"in": (child,)})
    return model, child


@pytest.mark.parametrize("make, path", [(circle, "parts.0.parent is the model itself"),
                                        (long_circle, r"parts\.0\.parent\.deep\.in\.0 is parts\.0 again")])
def test_a_module_inside_itself_is_refused_and_the_advice_works(make, path):
    model, child = make()
    for ask in (nn.Module.state_dict, lambda m: list(m.named_modules()), lambda m: list(m.parameters()), nn.Module.train,
                nn.summary, nn.Module.to, lora.lora_state_dict, lambda m: lora.inject(m, lora.Config(target_modules=["x"]))):
        with pytest.raises(StateError, match=path):
            ask(model)
    assert "..." in repr(model)
    parent = child.parent
    del child.parent
    child.parent = weakref.ref(parent)  # what the message says
    assert names(model) == ["parts.0.weight"]


def test_a_list_inside_itself_is_refused():
    items = [nn.ReLU()]
    items.append(items)
    with pytest.raises(StateError, match=r"\.items\[1\] is a list that holds itself"):
        list(Holder(items=items).named_modules())


def test_adapters_find_and_replace_at_any_depth():
    """lora.inject exchanges layers wherever the walk finds them."""
    model = Holder(blocks=[[nn.Linear(2, 2)], ({"fc": nn.Linear(2, 2)},)])
    first, second = model.blocks[0][0], model.blocks[1][0]["fc"]
    lora.inject(model, lora.Config(r=1, target_modules=["0", "fc"]), rng=0)
    assert isinstance(model.blocks[0][0], lora.Linear) and isinstance(model.blocks[1][0]["fc"], lora.Linear)
    assert model.blocks[0][0].weight is first.weight and model.blocks[1][0]["fc"].weight is second.weight
    lora.remove(model, "default")
    assert type(model.blocks[0][0]) is nn.Linear and type(model.blocks[1][0]["fc"]) is nn.Linear


# -- state --------------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """State of every kind that is allowed."""

    state_names = ("count", "rate", "on", "mask", "mean", "table", "scalar", "later")

    def __init__(self, start=0, dtype="float32"):
        self.count, self.rate, self.on = start, 0.5 + start, bool(start)
        self.mask = place(np.arange(3) == start)
        self.mean = place(np.full((2, 2), 1.5 + start, dtype))
        self.table = minilora.Tensor(place(np.arange(4) + start, "int32"))
        self.scalar = np.float32(start)
        self.later = None
        self.weight = parameter(2)


class More(Kept):
    state_names = ("extra",)  # besides those of Kept

    def __init__(self, start=0):
        super().__init__(start)
        self.extra = start


def content(module):
    return {name: (type(value), fetch(value).dtype, fetch(value).tobytes())
            for name, value in [*module.named_state(), *module.named_parameters()]
            for value in [np.asarray(value) if isinstance(value, (bool, int, float)) else value]} | {
            f"type of {name}": type(value) for name, value in module.named_state()}


def test_state_is_part_of_the_state_dict(device):
    model = nn.Sequential(More(1), nn.Dropout(0.5, rng=3))
    state = model.state_dict()
    own = ["count", "rate", "on", "mask", "mean", "table", "scalar", "extra"]
    assert list(state) == ["0.weight", *(f"0.{name}" for name in own), "1.seed", "1.step"]
    assert all(type(value) is np.ndarray for value in state.values())
    assert [name for name, _ in model.named_state()] == [name for name in state if name != "0.weight"]
    other = nn.Sequential(More(0), nn.Dropout(0.5, rng=4))
    assert content(other) != content(model)
    assert other.load_state_dict(state) == []
    assert content(other) == content(model)
    state["0.mask"][...] = False
    assert content(other) == content(model)  # copied


def test_state_keeps_its_type_and_its_device(device):
    model = Kept(1)
    model.load_state_dict(Kept(0).state_dict())
    assert (type(model.count), type(model.rate), type(model.on), type(model.scalar)) == (int, float, bool, np.float32)
    assert isinstance(model.table, minilora.Tensor) and model.table.device.name == device
    assert minilora.backend.device_of(model.mask).name == device
    assert model.later is None


@pytest.mark.parametrize("strict", [True, False])
def test_all_or_nothing_with_state(device, strict):
    model = Kept(1)
    before = content(model)
    state = Kept(0).state_dict()
    state |= {"count": np.float64(2.0), "on": np.int64(1), "mask": np.zeros(4, bool), "mean": np.zeros((2, 2), "float64"),
              "rate": np.zeros(2)}
    with pytest.raises(StateDictError) as caught:
        model.load_state_dict(state, strict=strict)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert lines[1:] == ["misfit count: expected int (), got float64 ()", "misfit rate: expected float (), got float64 (2,)",
                         "misfit on: expected bool (), got int64 ()", "misfit mask: expected bool (3,), got bool (4,)",
                         "misfit mean: expected float32 (2, 2), got float64 (2, 2)"]
    assert content(model) == before


def test_missing_and_unexpected_state_is_listed():
    with pytest.raises(StateDictError) as caught:
        nn.Dropout(0.5).load_state_dict({"seed": 3, "stop": 4})
    assert "missing    step ()" in str(caught.value) and "unexpected stop ()" in str(caught.value)
    layer = nn.Dropout(0.5)
    assert layer.load_state_dict({"seed": 2 ** 63 + 1}, strict=False) == ["step"]
    assert layer.seed == 2 ** 63 + 1  # of 64 bits without a sign


def test_a_failing_upload_changes_nothing(monkeypatch):
    """Everything is on the device before the first parameter changes."""
    model = nn.Sequential(nn.Linear(2, 2, rng=0), Kept(0))
    before, state = content(model), nn.Sequential(nn.Linear(2, 2, rng=1), Kept(1)).state_dict()
    calls, real = [], minilora.backend.to_device

    def full(array, device=None):
        calls.append(array)
        if len(calls) == 5:
            raise MemoryError
        return real(array, device)

    monkeypatch.setattr(minilora.backend, "to_device", full)
    with pytest.raises(MemoryError):
        model.load_state_dict(state)
    monkeypatch.undo()
    assert content(model) == before


def test_to_moves_and_converts_state(device):
    with minilora.use("cpu"):
        model = Kept(1)
    model.to(device, dtype="float64")
    assert minilora.backend.device_of(model.mask).name == minilora.backend.device_of(model.mean).name == device
    assert model.table.device.name == device and type(model.table) is minilora.Tensor
    assert (model.mean.dtype, model.mask.dtype, model.table.dtype) == ("float64", "bool", "int32")
    assert (type(model.count), type(model.rate)) == (int, float)


def test_a_dropout_of_nothing_has_no_state():
    assert nn.Dropout(0.0).state_dict() == {} and list(nn.Dropout(0.0).named_state()) == []

    class Counting(nn.Dropout):
        state_names = ("calls",)
        calls = 3

    assert list(Counting(0.0).state_dict()) == ["calls"]
    assert list(Counting(0.5).state_dict()) == ["seed", "step", "calls"]


def test_state_of_a_shared_module_comes_once():
    drop = nn.Dropout(0.5)
    assert list(nn.Sequential(drop, nn.ReLU(), drop).state_dict()) == ["0.seed", "0.step"]


def test_an_adapted_layer_keeps_the_state_of_its_base():
    class Counted(nn.Linear):
        state_names = ("calls",)

        def __init__(self):
            super().__init__(2, 2, rng=0)
            self.calls = 5

    model = nn.Sequential(Counted())
    lora.inject(model, lora.Config(r=1, target_modules=["0"]), rng=0)
    assert "0.calls" in model.state_dict()
    lora.remove(model, "default")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.calls"] and "state_names" not in vars(model[0])


WRONG_STATE = {
    "no attribute": ({"state_names": ("mask",)}, {}, StateError, "mask.*no such attribute: assign it in __init__"),
    "a string": ({"state_names": ("mask")}, {"mask": 1}, DTypeError, r"write \('mask',\)"),
    "a list": ({"state_names": ("mask",)}, {"mask": [1]}, DTypeError, "is a list: keep it as one or several arrays"),
    "a parameter": ({"state_names": ("mask",)}, {"mask": minilora.Parameter(np.ones(1))}, DTypeError, "take the name out"),
    "a huge int": ({"state_names": ("mask",)}, {"mask": 2 ** 64}, DTypeError, "at most 64 bits"),
}


@pytest.mark.parametrize(("names", "values", "error", "message"), WRONG_STATE.values(), ids=WRONG_STATE)
def test_what_cannot_be_state(names, values, error, message):
    module = type("Mine", (Holder,), names)(**values)
    with pytest.raises(error, match=message):
        module.state_dict()


def test_copies_keep_counters_and_draw_the_same_masks(device):
    x = minilora.tensor(np.ones((8, 8), "float32"))
    layer = nn.Dropout(0.5, rng=0)
    layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = fetch(layer(x))
    for other in copies:
        assert (other.seed, other.step) == (layer.seed, 1)
        assert np.array_equal(fetch(other(x)), expected)


# -- random modules -----------------------------------------------------------------------------------------

KINDS = ("linear", "dropout", "kept", "parameter", "shared", "number")
contents = st.recursive(
    st.sampled_from(KINDS),
    lambda inner: st.one_of(
        st.tuples(st.just("list"), st.lists(inner, max_size=3)),
        st.tuples(st.just("tuple"), st.lists(inner, max_size=3)),
        st.tuples(st.just("dict"), st.dictionaries(st.sampled_from(["a", "b", 0, 1, "c"]), inner, max_size=3)),
        st.tuples(st.just("module"), st.dictionaries(st.sampled_from(["p", "q", "r"]), inner, max_size=3)),
        st.tuples(st.just("sequential"), st.lists(inner, max_size=2))),
    max_leaves=8)


def build(plan, rng, shared):
    """What a plan says; one parameter is shared by all places that ask for it."""
    if plan == "linear":
        return nn.Linear(2, 1, rng=rng)
    if plan == "dropout":
        return nn.Dropout(0.5, rng=rng)
    if plan == "kept":
        return More(int(rng.integers(1, 100)))
    if plan == "parameter":
        return minilora.Parameter(place(rng.standard_normal(2).astype("float32")))
    if plan == "shared":
        return shared
    if plan == "number":
        return 7
    kind, inside = plan
    if kind in ("list", "tuple"):
        made = [build(one, rng, shared) for one in inside]
        return made if kind == "list" else tuple(made)
    if kind == "sequential":
        made = [build(one, rng, shared) for one in inside]
        model = nn.Sequential(*[one for one in made if isinstance(one, nn.Module)])
        for i, one in enumerate(made):
            setattr(model, f"more{i}", one)  # each module at two places
        return model
    made = {key: build(one, rng, shared) for key, one in inside.items()}
    return made if kind == "dict" else Holder(**made)


def model_of(plan, seed):
    rng = np.random.default_rng(seed)
    shared = minilora.Parameter(place(rng.standard_normal(3).astype("float32")))
    return Holder(first=build(plan, rng, shared), last=nn.Linear(1, 1, rng=rng))


def reached(value, found):
    """The identities of parameters and the state of modules under a value, by following every reference; independent code."""
    if isinstance(value, minilora.Parameter):
        found.setdefault(id(value), "parameter")
    elif isinstance(value, nn.Module):
        for key, item in value.__dict__.items():
            if isinstance(value, nn.Dropout) and key in ("seed", "step"):
                found[id(value), key] = "state"
            elif isinstance(value, Kept) and key in ("count", "rate", "on", "mask", "mean", "table", "scalar", "extra"):
                found[id(value), key] = "state"
            else:
                reached(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            reached(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            reached(item, found)
    return found


def equal(one, other):
    return {n: (a.dtype, a.tobytes()) for n, a in one.items()} == {n: (a.dtype, a.tobytes()) for n, a in other.items()}


@given(plan=contents)
@example(plan=("list", [("list", ["linear"]), ("tuple", ["dropout"])]))
@example(plan=("sequential", ["linear", "parameter"]))
@example(plan=("module", {"p": "shared", "q": ("dict", {0: "shared", "a": "kept"})}))
def test_random_modules(plan):
    model, twin = model_of(plan, 1), model_of(plan, 2)
    state = model.state_dict()
    paths = [*(path for path, _ in model.named_parameters()), *(path for path, _ in model.named_state())]
    assert len(set(paths)) == len(paths) and set(paths) == set(state)
    found = reached(model, {})
    assert len(state) == len(found)
    assert {id(p) for p in model.parameters()} == {key for key, kind in found.items() if kind == "parameter"}

    assert twin.load_state_dict(state) == [] and equal(twin.state_dict(), state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == list(state) and equal(other.state_dict(), state)
        for p in other.parameters():
            p.data += 1.0
        assert equal(model.state_dict(), state)

    model.to(dtype="float64")
    for path, value in model.named_state():
        own = np.asarray(state[path])
        assert type(value) in (int, float, bool) or isinstance(value, np.generic) or \
            value.dtype == ("float64" if own.dtype.kind == "f" else own.dtype)
    assert {p.dtype.name for p in model.parameters()} <= {"float64"}
    assert not model.eval().training and not any(module.training for _, module in model.named_modules())


# -- assignments --------------------------------------------------------------------------------------------


REFUSED = {
    "an array": ("weight", lambda m: np.zeros((2, 3), "float32"),
                 r"Linear\.weight is a Parameter.*\.weight\.data\[\.\.\.\] -= x"),
    "a tensor": ("weight", lambda m: m.weight - m.weight, "lost to a Tensor"),
    "a number": ("bias", lambda m: 0, r"\.bias\.data\[\.\.\.\]"),
    "a list": ("bias", lambda m: [m.bias], "lost to a list"),
    "a flag": ("requires_grad", lambda m: False, r"\.requires_grad\(False\)"),
    "another flag": ("trainable", lambda m: True, r"\.requires_grad\(True\)"),
    "a method": ("parameters", lambda m: [m.weight], "is a method of every module"),
    "a module as method": ("train", lambda m: nn.ReLU(), "is a method of every module"),
}


@pytest.mark.parametrize(("name", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_assignments_that_would_lose_something_are_refused(name, value, message):
    layer = nn.Linear(3, 2, rng=0)
    before = dict(vars(layer))
    with pytest.raises(DTypeError, match=message) as caught:
        setattr(layer, name, value(layer))
    assert isinstance(caught.value, (MiniloraError, TypeError)) and vars(layer) == before


def test_a_module_is_not_replaced_by_something_else():
    model = Holder(head=nn.Linear(1, 1))
    with pytest.raises(DTypeError, match=r"Holder\.head is a module, Linear, .*del \.head first"):
        model.head = 3
    del model.head  # what the message says
    model.head = 3
    assert model.head == 3


def test_in_place_arithmetic_is_refused_and_the_advice_works(device):
    layer = nn.Linear(3, 2, rng=0)
    layer(minilora.tensor(np.ones((4, 3), "float32"))).sum().backward()
    kept, before, x = layer.weight, fetch(layer.weight), layer.weight.grad * 0.1
    with pytest.raises(TypeError):
        layer.weight -= x
    assert layer.weight is kept
    layer.weight.data[...] -= x
    assert layer.weight is kept and np.array_equal(fetch(kept), before - fetch(x))
    layer.weight.data[...] = minilora.backend.asarray(before)
    assert np.array_equal(fetch(layer.weight), before)


def test_parameters_and_modules_are_replaced_by_their_like():
    layer = nn.Linear(3, 2, rng=0)
    new = minilora.Parameter(np.zeros((2, 3), "float32"))
    layer.weight, layer.bias = new, None
    assert names(layer) == ["weight"] and layer.weight is new
    del layer.weight
    layer.weight = 3
    assert names(layer) == []
    model = Holder(head=layer)
    model.head = nn.ReLU()
    model.head = None
    assert [path for path, _ in model.named_modules()] == [""]


def test_the_advice_for_flags_works():
    layer = nn.Linear(3, 2, rng=0)
    layer.requires_grad(False)
    assert not any(p.trainable for p in layer.parameters())
    for p in layer.parameters():
        p.trainable = True
    layer.forward = lambda x: 3  # a function may stand in for a method
    assert layer(1) == 3

    class Own(nn.Module):
        trainable = False

    own = Own()
    own.trainable = True
    assert own.trainable


OURS = ["add_module", "append", "apply", "bfloat16", "buffers", "cpu", "cuda", "double", "float", "get_parameter",
        "get_submodule", "half", "modules", "named_buffers", "named_children", "register_buffer", "register_module",
        "register_forward_hook", "register_parameter", "requires_grad_", "zero_grad"]
PEFTS = ["active_adapters", "add_adapter", "add_weighted_adapter", "delete_adapter", "disable_adapter", "generate",
         "get_base_model", "get_layer_status", "get_model_status", "load_adapter", "merge_adapter", "merge_and_unload",
         "print_trainable_parameters", "save_pretrained", "set_adapter", "unload", "unmerge_adapter"]


@pytest.mark.parametrize("name", OURS + PEFTS)
def test_names_of_pytorch_lead_to_ours(name):
    for model in (nn.Linear(1, 1), nn.Sequential(nn.ReLU())):
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"no attribute {name!r}: minilora has ") as caught:
            getattr(model, name)
        advice = str(caught.value).partition("minilora has ")[2]
        if advice.startswith("model."):
            assert hasattr(model, advice[len("model."):].partition("(")[0])


def test_the_advice_for_pytorch_s_names_works():
    model = nn.Sequential(nn.Linear(2, 2, rng=0))
    assert dict(model.named_modules())["0"] is model[0] and dict(model.named_parameters())["0.bias"] is model[0].bias
    for dtype in ("float64", "float16", "float32"):
        assert {p.dtype.name for p in model.to(dtype=dtype).to("cpu").parameters()} == {dtype}
    with pytest.raises(minilora.errors.ConfigError, match="'cuda'.*gpu"):
        model.to("cuda")
    with pytest.raises(DTypeError, match=r"to\(dtype=\.\.\.\)"):
        model.to(np.float32)
    setattr(model, "1", nn.ReLU())
    assert len(model) == 2


@pytest.mark.parametrize("name", PEFTS)
def test_the_advice_for_pefts_names_works(name, tmp_path):
    from minilora import formats, lora, models

    def adapted(adapter="default"):
        config = models.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=2)
        model = models.GPT2(config, rng=0)
        lora.inject(model, lora.Config(r=1, target_modules=["c_attn"]), adapter, rng=0)
        return model

    formats.save_adapter(adapted(), tmp_path / "saved")
    model = adapted("old" if name in ("add_adapter", "load_adapter") else "default")
    if name == "unmerge_adapter":
        lora.merge(model)
    given = dict(minilora=minilora, model=model, name="default", ids=[[1, 2]], max_new_tokens=1, config=lora.Config(
        r=1, target_modules=["c_fc"]), folder=tmp_path / "saved", updates=[lora.low_rank_updates(adapted())], weights=[2.0])
    with pytest.raises(AttributeError) as caught:
        getattr(model, name)
    advice = str(caught.value).partition("minilora has ")[2]
    lines = advice.split(", and for whole models ")
    if name == "save_pretrained":
        exec(lines[0], {**given, "folder": tmp_path / "adapter"})
        lora.bake(model)
        exec(lines[1], {**given, "folder": tmp_path / "model"})
        assert (tmp_path / "adapter" / "adapter_config.json").exists() and (tmp_path / "model" / "config.json").exists()
    elif name != "get_base_model":
        exec(advice, given)


def test_other_names_are_simply_missing():
    with pytest.raises(AttributeError, match="^'Linear' object has no attribute 'wieght'$") as caught:
        nn.Linear(1, 1).wieght
    assert caught.value.name == "wieght"  # from which Python makes its suggestion


def test_an_attribute_error_inside_a_property_comes_out():
    class Faulty(nn.Module):
        @property
        def total(self):
            return self.missing + 1

    with pytest.raises(AttributeError, match="'missing'"):
        Faulty().total


def test_the_advice_of_layers_works():
    """What a message of nn says to type is typed, and works."""
    x = minilora.tensor(np.ones((2, 5, 8), "float32"))
    rotary = nn.RotaryEmbedding(4)
    with pytest.raises(minilora.errors.ConfigError, match="with it take packed=False"):
        nn.MultiheadAttention(8, 2, packed=True, rotary=rotary)
    assert nn.MultiheadAttention(8, 2, packed=False, rotary=rotary)(x).shape == (2, 5, 8)
    with pytest.raises(minilora.errors.ConfigError, match="for other keys take packed=False"):
        nn.MultiheadAttention(8, 2, packed=True)(x, x)
    assert nn.MultiheadAttention(8, 2, packed=False)(x, x).shape == (2, 5, 8)
    with pytest.raises(minilora.errors.ConfigError, match="reshape them into one"):
        nn.LayerNorm((5, 8))
    assert nn.LayerNorm(40)(x.reshape(2, 40)).reshape(2, 5, 8).shape == (2, 5, 8)
    with pytest.raises(DTypeError, match=r"Take to\(dtype='float32'\)"):
        nn.Linear(1, 1).to(dtype="int32")
    assert nn.Linear(1, 1).to(dtype="float32").weight.dtype == "float32"
    with pytest.raises(DTypeError, match=r"write \('mask',\)"):
        type("Mine", (Holder,), {"state_names": ("mask")})(mask=1).state_dict()
    assert list(type("Mine", (Holder,), {"state_names": ("mask",)})(mask=1).state_dict()) == ["mask"]
    with pytest.raises(StateError, match="None if it comes later"):
        type("Mine", (Holder,), {"state_names": ("mask",)})().state_dict()
    assert type("Mine", (Holder,), {"state_names": ("mask",)})(mask=None).state_dict() == {}
    parts = {0: parameter(), "0": parameter()}
    with pytest.raises(StateError, match="rename a key"):
        names(Holder(parts=parts))
    assert names(Holder(parts={0: parts[0], "other": parts["0"]})) == ["parts.0", "parts.other"]


# -- Sequential ---------------------------------------------------------------------------------------------


def test_sequential_of_a_list():
    a, b = nn.ReLU(), nn.Tanh()
    for model in (nn.Sequential([a, b]), nn.Sequential((a, b)), nn.Sequential(a, b)):
        assert list(model) == [a, b] and [path for path, _ in model.named_modules()] == ["", "0", "1"]
    assert len(nn.Sequential([])) == 0


@pytest.mark.parametrize(("given", "message"), [
    ((nn.ReLU(), nn.Tanh), r"expected a module at 1, got type: Tanh is the class, Tanh\(\) makes a layer"),
    ((nn.ReLU(), np.tanh), "expected a module at 1, got ufunc"), ((3,), "expected a module at 0, got int"),
    (([nn.ReLU()], [nn.ReLU()]), "expected a module at 0, got list"),
    (({"a": nn.ReLU()},), "expected a module at 0, got dict"),
])
def test_sequential_says_what_is_no_module(given, message):
    with pytest.raises(DTypeError, match=message):
        nn.Sequential(*given)


def test_sequential_items():
    model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.SiLU())
    model[-1] = new = nn.GELU()
    assert model[2] is new and len(model) == 3
    with pytest.raises(DTypeError, match="expected a module at 1"):
        model[1] = 3
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            model[wrong] = nn.ReLU()
    assert list(vars(model)) == ["0", "1", "2"]


# -- seeds --------------------------------------------------------------------------------------------------


def test_layers_of_one_model_differ_and_equal_seeds_give_equal_layers():
    """An int makes a fresh Generator in each layer, a Generator moves on; models pass one Generator to all their layers."""
    assert np.array_equal(fetch(nn.Linear(3, 3, rng=5).weight), fetch(nn.Linear(3, 3, rng=5).weight))
    rng = np.random.default_rng(5)
    assert not np.array_equal(fetch(nn.Linear(3, 3, rng=rng).weight), fetch(nn.Linear(3, 3, rng=rng).weight))
    layer = nn.MultiheadAttention(4, 2, rng=5)
    assert not np.array_equal(fetch(layer.q_proj.weight), fetch(layer.k_proj.weight))
    gpt2 = nn.GPT2(nn.GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=2, n_head=2, resid_pdrop=0.5), rng=5)
    assert not np.array_equal(fetch(gpt2.h[0].mlp.c_fc.weight), fetch(gpt2.h[1].mlp.c_fc.weight))
    seeds = [value for path, value in gpt2.named_state() if path.endswith("seed")]
    assert len(set(seeds)) == len(seeds) == 2
