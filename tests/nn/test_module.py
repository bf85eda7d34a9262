"""Module: what it contains, in which order, and what it refuses to load."""
import copy

import numpy as np
import pytest
from conftest import fetch, place

import minilora
from minilora import nn
from minilora.errors import DTypeError, MiniloraError, ShapeError, StateDictError


def parameter(*shape, start=0, dtype="float32"):
    values = np.arange(start, start + np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    return minilora.Parameter(minilora.backend.asarray(values))


def names(module):
    return [name for name, _ in module.named_parameters()]


def bytes_of(module):
    return {name: fetch(p).tobytes() for name, p in module.named_parameters()}


class Pair(nn.Module):
    """Two parameters, assigned in the order second, first."""

    def __init__(self, start=0):
        self.second = parameter(2, start=start)
        self.first = parameter(2, 3, start=start + 2)

    def forward(self, x):
        return minilora.ops.linear(x, self.first, self.second)


class Tree(nn.Module):
    """Modules in every kind of container that is looked into."""

    def __init__(self):
        self.scale = parameter(1)
        self.blocks = [Pair(10), Pair(20)]
        self.fixed = (Pair(30),)
        self.named = {"left": Pair(40), "right": Pair(50)}
        self.last = Pair(60)
        self.text, self.numbers = "no module", [1, 2]


TREE = ["scale", "blocks.0.second", "blocks.0.first", "blocks.1.second", "blocks.1.first", "fixed.0.second",
        "fixed.0.first", "named.left.second", "named.left.first", "named.right.second", "named.right.first",
        "last.second", "last.first"]


# -- contents -----------------------------------------------------------------------------------------------


def test_order_of_parameters_is_order_of_assignment():
    assert names(Pair()) == ["second", "first"]


def test_containers_are_looked_into():
    tree = Tree()
    assert names(tree) == TREE
    assert [p.size for p in tree.parameters()] == [1] + 6 * [2, 6]


def test_named_modules():
    paths = [path for path, _ in Tree().named_modules()]
    assert paths == ["", "blocks.0", "blocks.1", "fixed.0", "named.left", "named.right", "last"]


def test_children_are_the_direct_ones():
    outer = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh())
    assert [name for name, _ in outer.children()] == ["0", "1"]


def test_own_parameters_come_before_those_of_children():
    class Late(nn.Module):
        def __init__(self):
            self.child = Pair()
            self.own = parameter(1)

    assert names(Late()) == ["own", "child.second", "child.first"]


def test_shared_parameter_comes_once_under_its_first_path():
    a, b = Pair(), Pair()
    b.first = a.first
    both = nn.Sequential(a, b)
    assert names(both) == ["0.second", "0.first", "1.second"]
    assert list(both.state_dict()) == names(both)


def test_shared_module_comes_once():
    pair = Pair()
    assert names(nn.Sequential(pair, nn.ReLU(), pair)) == ["0.second", "0.first"]


def test_reassignment_keeps_the_place_and_deletion_loses_it():
    pair = Pair()
    pair.second = parameter(5)
    assert [(name, p.shape) for name, p in pair.named_parameters()] == [("second", (5,)), ("first", (2, 3))]
    del pair.second
    assert names(pair) == ["first"]


def test_attribute_set_to_none_is_no_parameter():
    assert names(nn.Linear(2, 3, bias=False)) == ["weight"]


def test_module_without_forward_says_what_to_define():
    with pytest.raises(TypeError, match="Bare has no forward: define forward"):
        type("Bare", (nn.Module,), {})()(1)


# -- modes --------------------------------------------------------------------------------------------------


def test_train_and_eval_reach_every_module_and_return_self():
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5)), Tree())
    assert model.training
    assert model.eval() is model
    assert not any(module.training for _, module in model.named_modules())
    assert model.train() is model
    assert all(module.training for _, module in model.named_modules())
    assert not model.train(False)[0][0].training


def test_modes_of_two_models_are_independent():
    a, b = nn.ReLU(), nn.ReLU()
    a.eval()
    assert b.training and nn.ReLU().training


def test_eval_changes_no_weight():
    tree = Tree()
    before = bytes_of(tree)
    tree.eval()
    tree.train()
    assert bytes_of(tree) == before


def test_requires_grad_freezes_and_thaws():
    tree = Tree()
    assert tree.requires_grad(False) is tree
    assert not any(p.trainable for p in tree.parameters())
    tree.requires_grad()
    assert all(p.trainable for p in tree.parameters())


# -- places -------------------------------------------------------------------------------------------------


def test_to_dtype_converts_every_parameter_and_drops_gradients(device):
    model = Pair()
    before = model.first
    model(minilora.tensor(np.ones((4, 3), "float32"))).mean().backward()
    assert model.to(dtype="float64") is model
    assert model.first is before
    assert {p.dtype.name for p in model.parameters()} == {"float64"}
    assert all(p.grad is None for p in model.parameters())
    assert fetch(model.first).tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]
    model(minilora.tensor(np.ones((4, 3)))).mean().backward()
    assert model.first.grad.dtype == np.float64


def test_to_dtype_moves_a_shared_parameter_once():
    a, b = Pair(), Pair()
    b.first = a.first
    nn.Sequential(a, b).to(dtype="float64")
    assert b.first is a.first and a.first.dtype == np.float64


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", object])
def test_to_refuses_what_has_no_gradient(dtype):
    model = Pair()
    before = bytes_of(model)
    with pytest.raises(DTypeError, match="floating-point"):
        model.to(dtype=dtype)
    assert bytes_of(model) == before and model.first.dtype == np.float32


def test_to_unknown_device_changes_nothing():
    model = Pair()
    with pytest.raises(minilora.errors.ConfigError, match="'nowhere'"):
        model.to(device="nowhere", dtype="float64")
    assert model.first.dtype == np.float32


def test_to_device_and_back_keeps_the_bits(device):
    with minilora.use("cpu"):
        model = Tree()
    before = bytes_of(model)
    model.to(device)
    assert {p.device.name for p in model.parameters()} == {device}
    assert bytes_of(model) == before
    model.to("cpu")
    assert {p.device.name for p in model.parameters()} == {"cpu"}
    assert bytes_of(model) == before


# -- state --------------------------------------------------------------------------------------------------


def test_state_dict_is_a_copy_on_the_host(device):
    model = Pair()
    state = model.state_dict()
    assert list(state) == ["second", "first"]
    assert all(type(value) is np.ndarray for value in state.values())
    state["first"][...] = -1.0
    assert fetch(model.first).tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]


def test_state_dict_of_a_scalar_and_an_empty_parameter():
    class Odd(nn.Module):
        def __init__(self):
            self.scalar, self.empty = parameter(), parameter(0, 3)

    state = Odd().state_dict()
    assert {name: value.shape for name, value in state.items()} == {"scalar": (), "empty": (0, 3)}
    assert Odd().load_state_dict(state) == []


@pytest.mark.parametrize("trained", [False, True], ids=["alone", "with an optimizer"])
def test_load_gives_the_bits_back(device, trained):
    """In new arrays, since others may share the old ones; but in the optimizer's own array where there is one."""
    model, other = Tree(), Tree()
    for p in other.parameters():
        p.data *= -0.3
    if trained:
        minilora.optim.SGD(model.parameters(), lr=0.1)
    arrays = [p.data for p in model.parameters()]
    before = bytes_of(model)
    assert model.load_state_dict(other.state_dict()) == []
    assert bytes_of(model) == bytes_of(other)
    assert all((p.data is array) == trained for p, array in zip(model.parameters(), arrays))
    if not trained:
        assert [fetch(array).tobytes() for array in arrays] == list(before.values())


def test_load_copies_the_values():
    model = Pair()
    state = model.state_dict()
    model.load_state_dict(state)
    state["first"][...] = 9.0
    assert fetch(model.first).max() == 7.0


def test_load_takes_tensors_device_arrays_and_lists(device):
    model = Pair()
    model.load_state_dict({"second": minilora.backend.asarray(np.float32([7, 8])),
                           "first": minilora.tensor(np.zeros((2, 3), "float32"))})
    assert fetch(model.second).tolist() == [7.0, 8.0] and not fetch(model.first).any()
    model.to(dtype="float64")
    model.load_state_dict({"second": [1.0, 2.0], "first": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]})
    assert fetch(model.second).tolist() == [1.0, 2.0]


def test_load_keeps_nan_payloads_and_signed_zeros():
    model = Pair()
    state = model.state_dict()
    state["second"] = np.array([0x7FC12345, 0x80000000], "uint32").view("float32")
    model.load_state_dict(state)
    assert fetch(model.second).tobytes() == state["second"].tobytes()


@pytest.mark.parametrize("strict", [True, False])
def test_load_lists_every_problem_in_one_error_and_changes_nothing(device, strict):
    model = Tree()
    before = bytes_of(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    del state["scale"], state["last.first"]
    state["ghost"] = np.zeros((4, 5), "float32")
    state["blocks.0.first"] = np.zeros((3, 2), "float32")
    state["fixed.0.second"] = np.zeros(2, "float64")
    with pytest.raises(StateDictError) as caught:
        model.load_state_dict(state, strict=strict)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert lines[0] == "state dict does not fit Tree; nothing was loaded:"
    assert lines[1:3] == ["misfit blocks.0.first: expected float32 (2, 3), got float32 (3, 2)",
                          "misfit fixed.0.second: expected float32 (2,), got float64 (2,)"]
    assert lines[3:] == (["missing scale (1,)", "missing last.first (2, 3)", "unexpected ghost (4, 5)"]
                         if strict else [])
    assert bytes_of(model) == before


def test_load_not_strict_returns_the_names_left_over():
    model = Pair()
    left = model.load_state_dict({"second": np.float32([5, 6]), "ghost": np.zeros(1)}, strict=False)
    assert sorted(left) == ["first", "ghost"]
    assert fetch(model.second).tolist() == [5.0, 6.0] and fetch(model.first)[0, 0] == 2.0


def test_load_not_strict_returns_whole_names():
    class Named(nn.Module):
        def __init__(self):
            self.parts = {"two words": Pair()}

    assert Named().load_state_dict({}, strict=False) == ["parts.two words.second", "parts.two words.first"]


def test_load_of_what_is_no_array_changes_nothing():
    model = Pair()
    before = bytes_of(model)
    for value in (None, "text", object()):
        with pytest.raises(MiniloraError):
            model.load_state_dict({"second": np.float32([5, 6]), "first": value})
        assert bytes_of(model) == before


def test_deep_copy_is_equal_and_independent(device):
    model = Tree()
    model.blocks[1].first = model.last.first
    other = copy.deepcopy(model)
    assert names(other) == names(model) and bytes_of(other) == bytes_of(model)
    assert other.blocks[1].first is other.last.first
    other.last.first.data *= -1.0
    assert bytes_of(other) != bytes_of(model)


# -- errors and text ----------------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, *blocks):
        self.head = nn.ReLU()
        self.blocks = list(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(self.head(x))
        return x


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        self.fc = nn.Linear(n_in, n_out, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.fc(x)


WRONG = {
    "a bare layer": (lambda: nn.Linear(5, 2), ""),
    "Sequential": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.Linear(5, 2)), "2"),
    "nested Sequential": (lambda: nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(5, 2))), "0.1"),
    "lists of modules": (lambda: Outer(Block(3, 4), Block(5, 2)), "blocks.1.fc"),
    "Sequential in a list": (lambda: Outer(nn.Sequential(Block(3, 5), Block(4, 2))), "blocks.0.1.fc"),
}


@pytest.mark.parametrize("make, path", WRONG.values(), ids=WRONG)
def test_error_names_the_layer(device, make, path):
    x = minilora.tensor(np.ones((6, 3), "float32"))
    with pytest.raises(ShapeError) as caught:
        make()(x)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: linear: expected" if path else "linear: expected")


def test_error_path_is_of_the_model_that_was_called():
    block = Block(5, 2)
    x = minilora.tensor(np.ones((6, 3), "float32"))
    for model, path in [(nn.Sequential(block), "0.fc"), (Outer(nn.ReLU(), block), "blocks.1.fc"), (block, "fc")]:
        with pytest.raises(ShapeError) as caught:
            model(x)
        assert caught.value.path == path


def test_other_errors_pass_unchanged():
    class Faulty(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        nn.Sequential(Faulty())(1)
    assert caught.value.args == ("mine",)


def test_repr():
    model = Outer(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1)), minilora.lora.Linear(4, 2, r=2, lora_alpha=4))
    assert repr(model) == """\
Outer(
  (head): ReLU()
  (blocks.0): Sequential(
    (0): Linear(in_features=3, out_features=4, bias=True)
    (1): Dropout(p=0.1)
  )
  (blocks.1): Linear(in_features=4, out_features=2, bias=True, r=2, lora_alpha=4, scaling=2)
)"""


def test_parameters_in_lists_tuples_and_dicts_are_found(device):
    class Holder(nn.Module):
        def __init__(self):
            self.scales = [minilora.Parameter(place([1.0])), minilora.Parameter(place([2.0, 3.0]))]
            self.pair = (minilora.Parameter(place([4.0]), trainable=False),)
            self.named = {"a": minilora.Parameter(place([5.0])), "b": "not a parameter"}

    holder = Holder()
    assert [name for name, p in holder.named_parameters()] == ["scales.0", "scales.1", "pair.0", "named.a"]
    assert (nn.summary(holder).trained, nn.summary(holder).frozen) == (4, 1)
    other = Holder()
    other.scales[1].data[...] = 7.0
    assert holder.load_state_dict(other.state_dict()) == []
    np.testing.assert_array_equal(fetch(holder.scales[1]), [7.0, 7.0])
