"""LoRA layers: how they start, dropout, merging and its refusals, and a plain-matrix model of all of it."""
import copy
import math

import numpy as np
import pytest
from conftest import PROOF, fetch, place
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import minilora
from minilora import engine, lora, nn, ops, optim
from minilora.errors import ConfigError, DTypeError, MiniloraError, StateDictError, StateError
from minilora.lora.layers.base import AdaptedLayer

EPS = {"float32": 2.0 ** -23, "float64": 2.0 ** -52}


def gamma(n, dtype):
    u = EPS[dtype] / 2
    return n * u / (1 - n * u)


def draw(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(n_in=6, out=4, r=3, lora_alpha=1.5, seed=0, **options):
    """A layer away from its start: B is not 0."""
    rng = np.random.default_rng(seed)
    layer = lora.Linear(n_in, out, r=r, lora_alpha=lora_alpha, rng=rng, **options)
    layer.lora_B.data[...] = place(rng.standard_normal((out, r)).astype(layer.lora_B.dtype))
    return layer


def integers(n_in=6, out=4, r=2, lora_alpha=4, seed=0, dtype="float32"):
    """A layer whose numbers and scaling leave no rounding."""
    rng = np.random.default_rng(seed)
    layer = lora.Linear(n_in, out, r=r, lora_alpha=lora_alpha, dtype=dtype, rng=rng)
    layer.load_state_dict({name: rng.integers(-8, 9, p.shape).astype(dtype) for name, p in layer.named_parameters()})
    return layer


def paths(values):
    """A lone adapter's lora_A and lora_B under their paths in a layer."""
    return {f"adapters.default.{name}" if name.startswith("lora") else name: value for name, value in values.items()}


def bytes_of(module):
    return {name: fetch(p).tobytes() for name, p in module.named_parameters()}


# -- how a layer starts -------------------------------------------------------------------------------------


def test_parameters_and_which_of_them_train(device):
    layer = lora.Linear(6, 4, r=3, lora_alpha=1.5, rng=np.random.default_rng(0))
    assert [(name, p.shape, p.trainable) for name, p in layer.named_parameters()] == [
        ("weight", (4, 6), False), ("bias", (4,), False), ("adapters.default.lora_A", (3, 6), True),
        ("adapters.default.lora_B", (4, 3), True)]
    assert (layer.lora_A, layer.lora_B) == tuple(p for name, p in layer.named_parameters() if "lora" in name)
    assert layer.scaling == 0.5 and not layer.merged
    assert {p.device.name for p in layer.parameters()} == {device}
    assert [name for name, _ in lora.Linear(6, 4, r=3, bias=False).named_parameters()] == [
        "weight", "adapters.default.lora_A", "adapters.default.lora_B"]


def test_A_starts_as_in_peft_and_B_at_0(device):
    n_in, r = 100, 64
    layer = lora.Linear(n_in, 5, r=r, rng=np.random.default_rng(1))
    A, bound = fetch(layer.lora_A), 1 / math.sqrt(n_in)
    assert 0.97 * bound < np.abs(A).max() <= np.float32(bound)
    assert abs(A.mean()) < 6 * bound / math.sqrt(3 * A.size)
    assert abs(A.var() * 3 / bound ** 2 - 1) < 6 * math.sqrt(0.8 / A.size)
    assert fetch(layer.lora_B).tobytes() == np.zeros((5, r), "float32").tobytes()


def test_A_gaussian(device):
    layer = lora.Linear(200, 5, r=32, init_lora_weights="gaussian", rng=np.random.default_rng(1))
    A = fetch(layer.lora_A) * 32
    assert abs(A.mean()) < 6 / math.sqrt(A.size) and abs(A.var() - 1) < 6 * math.sqrt(2 / A.size)
    assert not fetch(layer.lora_B).any()


def test_one_seed_gives_one_layer_on_every_device(device):
    layer = lora.Linear(6, 4, r=3, rng=np.random.default_rng(5))
    with minilora.use("cpu"):
        other = lora.Linear(6, 4, r=3, rng=np.random.default_rng(5))
    assert bytes_of(layer) == bytes_of(other)
    assert layer.lora_dropout.seed == other.lora_dropout.seed


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dtype_is_kept(device, dtype, dropout):
    layer = make(dtype=dtype, lora_alpha=np.float64(1.7), lora_dropout=dropout)
    y = layer(minilora.tensor(draw(5, 6, dtype=dtype)))
    y.mean().backward()
    assert {str(a.dtype) for a in (layer.weight, layer.bias, y)} == {dtype}
    trained = dtype if dtype != "float16" else "float32"
    assert {str(a.dtype) for a in (layer.lora_A, layer.lora_B, layer.lora_A.grad, layer.lora_B.grad)} == {trained}
    layer.merge()
    assert layer.weight.dtype == dtype


def test_repr(device):
    layer = lora.Linear(6, 4, r=3, lora_alpha=4, lora_dropout=0.25, bias=False)
    text = "in_features=6, out_features=4, bias=False, r=3, lora_alpha=4, scaling=1.33333, lora_dropout=0.25"
    assert repr(layer) == f"Linear({text})"
    layer.merge()
    assert repr(layer) == f"Linear({text}, merged)"


@pytest.mark.parametrize("options, match", [
    (dict(r=0), "r must be an int >= 1, got 0"), (dict(r=2.0), "got 2.0"), (dict(r=True), "got True"),
    (dict(r="8"), "got '8'"), (dict(lora_alpha=0), "lora_alpha must not be 0"), (dict(lora_alpha=math.nan), "got nan"),
    (dict(lora_dropout=1.0), r"dropout must be a number in \[0, 1\), got 1.0"),
    (dict(lora_dropout=math.nan), "got nan"),
    (dict(lora_dropout=-0.1), "got -0.1"),
    (dict(init_lora_weights="lora_ga"), "one of True, False, .*, 'orthogonal', 'loftq', got 'lora_ga'"),
    (dict(init_lora_weights=1), "got 1$"), (dict(in_features=0), "in_features .* got 0"),
    (dict(out_features=2.5), "out_features .* got 2.5"),
], ids=str)
def test_settings_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        lora.Linear(**{"in_features": 6, "out_features": 4, "r": 2, **options})
    if not options.keys() & {"in_features", "out_features"}:
        base = nn.Linear(6, 4, rng=np.random.default_rng(0))
        before = bytes_of(base)
        with pytest.raises(ConfigError, match=match):
            lora.adapt(base, **{"r": 2, **options})
        assert bytes_of(base) == before and base.weight.trainable


# -- adapting a layer that exists ---------------------------------------------------------------------------


def test_adapt_shares_the_arrays_and_starts_as_the_base(device):
    base = nn.Linear(6, 4, rng=np.random.default_rng(0))
    layer = lora.adapt(base, r=2, lora_alpha=3, rng=np.random.default_rng(1))
    assert layer.weight.data is base.weight.data and layer.bias.data is base.bias.data
    assert not layer.weight.trainable and base.weight.trainable
    x = minilora.tensor(draw(5, 6))
    assert fetch(layer(x)).tobytes() == fetch(base(x)).tobytes()


def test_adapt_without_bias_and_on_the_bases_device(device):
    with minilora.use("cpu"):
        base = nn.Linear(6, 4, bias=False, dtype="float64")
    layer = lora.adapt(base, r=2)
    assert layer.bias is None
    assert {(p.device.name, str(p.dtype)) for p in layer.parameters()} == {("cpu", "float64")}


def test_adapt_is_the_layer_of_its_arrays(device):
    layer = make()
    base = nn.Linear(6, 4)
    base.load_state_dict({name: fetch(p) for name, p in layer.named_parameters() if "lora" not in name})
    adapted = lora.adapt(base, r=3, lora_alpha=1.5)
    adapted.lora_A.data, adapted.lora_B.data = layer.lora_A.data, layer.lora_B.data
    x = minilora.tensor(draw(5, 6))
    assert fetch(adapted(x)).tobytes() == fetch(layer(x)).tobytes()


def train(layer, steps=3, dtype="float32"):
    optimizer = optim.AdamW(layer.parameters(), lr=0.05)
    for t in range(steps):
        optimizer.zero_grad()
        (layer(minilora.tensor(draw(8, 6, seed=t, dtype=dtype))) ** 2).mean().backward()
        optimizer.step()


def test_frozen_weights_never_change(device):
    """Adapting, training, merging, training on, unmerging: the base keeps every bit, and no gradient appears."""
    base = nn.Linear(6, 4, rng=np.random.default_rng(0))
    before = bytes_of(base)
    layer = lora.adapt(base, r=2, lora_alpha=3, lora_dropout=0.1, rng=np.random.default_rng(1))
    train(layer)
    assert fetch(layer.weight).tobytes() == before["weight"]
    layer.merge()
    assert bytes_of(base) == before
    layer.eval()
    layer(minilora.tensor(draw(5, 6)))
    layer.unmerge()
    layer.train()
    train(layer)
    assert bytes_of(base) == before and fetch(layer.bias).tobytes() == before["bias"]
    assert layer.weight.grad is None and layer.bias.grad is None and base.weight.grad is None


def test_loading_into_an_adapted_layer_leaves_the_base(device):
    base = nn.Linear(6, 4, rng=np.random.default_rng(0))
    before = bytes_of(base)
    layer = lora.adapt(base, r=2, rng=np.random.default_rng(1))
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
    assert bytes_of(base) == before


def test_training_an_unfrozen_weight_leaves_the_base(device):
    base = nn.Linear(6, 4, rng=np.random.default_rng(0))
    before = bytes_of(base)
    layer = lora.adapt(base, r=2, rng=np.random.default_rng(1)).requires_grad()
    train(layer)
    assert fetch(layer.weight).tobytes() != before["weight"] and bytes_of(base) == before


def test_two_adapters_on_one_base_are_independent(device):
    base = nn.Linear(6, 4, rng=np.random.default_rng(0))
    one, two = (lora.adapt(base, r=2, rng=np.random.default_rng(seed)) for seed in (1, 2))
    before = bytes_of(two)
    train(one)
    one.merge()
    assert bytes_of(two) == before and not two.merged


@pytest.mark.parametrize("base, hint", [
    (lambda: make(), r"this Linear has an update already.*lora.inject\(model, config, name=...\)"),
    (lambda: nn.ReLU(), "expected one of nn.Linear, .*got ReLU: only those can be adapted"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), "got Sequential"), (lambda: None, "got NoneType"),
    (lambda: np.ones((2, 2)), "got ndarray"),
], ids=["lora.Linear", "ReLU", "Sequential", "None", "array"])
def test_adapt_refuses(base, hint):
    with pytest.raises(DTypeError, match=hint):
        lora.adapt(base(), r=2)


# -- dropout ------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_adapters_input_only(device):
    """Against the composed operations with the same mask: output and every gradient."""
    p, n = 0.4, 7
    layer = make(lora_dropout=p, dtype="float64").requires_grad()
    W, b, A, B = (fetch(parameter) for parameter in layer.parameters())
    x, dy = draw(n, 6, dtype="float64"), draw(n, 4, seed=1, dtype="float64")
    leaf = minilora.Parameter(place(x))
    y = layer(leaf)
    y.backward(place(dy))
    mask = fetch(ops.dropout(minilora.tensor(np.ones((n, 6))), p, layer.lora_dropout.seed, layer.lora_dropout.step))
    assert set(np.unique(mask)) == {0.0, 1 / (1 - p)}
    dropped, s = x * mask, layer.scaling
    expected = {
        "y": (y, x @ W.T + b + s * (dropped @ A.T) @ B.T),
        "x": (leaf.grad, dy @ W + s * ((dy @ B) @ A) * mask),
        "W": (layer.weight.grad, dy.T @ x), "b": (layer.bias.grad, dy.sum(0)),
        "A": (layer.lora_A.grad, s * (dy @ B).T @ dropped), "B": (layer.lora_B.grad, s * dy.T @ (dropped @ A.T)),
    }
    for name, (got, value) in expected.items():
        np.testing.assert_allclose(fetch(got), value, rtol=1e-12, atol=1e-13, err_msg=name)


def test_dropout_leaves_the_frozen_path_alone(device):
    layer = make(lora_dropout=0.9)
    layer.lora_A.data[...] = 0.0
    x = minilora.tensor(draw(5, 6))
    base = fetch(ops.linear(x, layer.weight, layer.bias))
    assert np.array_equal(fetch(layer(x)), base)


def test_dropout_has_the_mean_of_no_dropout(device):
    n = 20_000
    layer = make(lora_dropout=0.3, dtype="float64")
    x = minilora.tensor(np.ones((n, 6)))
    rows = fetch(layer(x))
    mean = fetch(layer.eval()(x))[0]
    assert (np.abs(rows.mean(0) - mean) < 6 * rows.std(0) / math.sqrt(n)).all()
    assert rows.std(0).min() > 0.1


def test_dropout_is_off_in_evaluation_and_at_0(device):
    x = minilora.tensor(draw(5, 6))
    without = fetch(make()(x))
    layer = make(lora_dropout=0.5)
    assert not np.array_equal(fetch(layer(x)), without)
    y = layer.eval()(x)
    assert fetch(y).tobytes() == without.tobytes()
    assert layer.lora_dropout.step == 1
    assert [row.op for row in engine.ledger(y).rows] == ["LoRALinear"]  # one op again, not four
    layer.train()
    assert not np.array_equal(fetch(layer(x)), without)


def test_dropout_repeats_with_its_seed_and_changes_with_the_step(device):
    x = minilora.tensor(draw(5, 6))
    one, two = make(lora_dropout=0.5), make(lora_dropout=0.5)
    first, second = [fetch(one(x)) for _ in range(2)], [fetch(two(x)) for _ in range(2)]
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], first[1])


# -- merging ------------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), st.booleans(),
       st.sampled_from(["float32", "float64"]), st.floats(0.0625, 16), st.integers(0, 2 ** 32 - 1))
def test_merged_forward_within_the_proven_bound(device, shape, bias, dtype, alpha, seed):
    """Each way differs from the exact value by gamma(terms) of the absolute products at most: twice that apart."""
    n, n_in, out, r = shape
    layer = make(n_in, out, r, alpha, seed, bias=bias, dtype=dtype).eval()
    x = draw(n, n_in, seed=seed, dtype=dtype)
    y = fetch(layer(minilora.tensor(x)))
    layer.merge()
    merged = fetch(layer(minilora.tensor(x)))
    layer.unmerge()
    W, *b, A, B = (np.abs(fetch(p).astype("float64")) for p in layer.parameters())
    size = np.abs(x.astype("float64")) @ (W + layer.scaling * (B @ A)).T + (b[0] if b else 0)
    assert (np.abs(merged.astype("float64") - y) <= 2 * gamma(n_in + r + 4, dtype) * size + 1e-36).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merged_forward_is_exact_for_integers(device, dtype):
    layer = integers(dtype=dtype).eval()
    x = minilora.tensor(np.random.default_rng(1).integers(-8, 9, (5, 6)).astype(dtype))
    y = fetch(layer(x))
    layer.merge()
    assert np.array_equal(fetch(layer(x)), y)


def test_merge_adds_the_delta(device):
    layer = integers()
    W, D = fetch(layer.weight), fetch(layer.delta())
    layer.merge()
    assert layer.merged and np.array_equal(fetch(layer.weight), W + D)
    assert np.array_equal(D, 2.0 * fetch(layer.lora_B) @ fetch(layer.lora_A))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@PROOF
def test_unmerge_gives_back_the_bits_after_1000_cycles(device, dtype):
    layer = make(dtype=dtype)
    A, before = fetch(layer.lora_A), bytes_of(layer)
    for cycle in range(1000):
        layer.lora_A.data *= -1.0 if cycle % 3 else 1.0  # another update each time
        layer.merge()
        layer.unmerge()
    layer.lora_A.data[...] = place(A)
    assert bytes_of(layer) == before


def test_merge_keeps_signed_zeros_for_unmerge(device):
    layer = make()
    layer.weight.data[...] = place(np.full((4, 6), -0.0, "float32"))
    before = bytes_of(layer)
    layer.merge()
    layer.unmerge()
    assert bytes_of(layer) == before and np.signbit(fetch(layer.weight)).all()


def test_merged_forward_costs_what_nn_linear_costs(device):
    rng = np.random.default_rng(0)
    base = nn.Linear(6, 4, rng=rng).requires_grad(False)
    layer = lora.adapt(base, r=2, rng=rng).eval()
    layer.merge()
    x = minilora.Parameter(place(draw(5, 6)))
    y = layer(x)
    assert type(y.node) is type(base(x).node) and list(y.node.sources) == [x, None, None]
    assert engine.ledger(y).nbytes == engine.ledger(base(x)).nbytes == 0
    if device == "standin":
        from standin import counting
        with counting() as merged:
            layer(x)
        with counting() as plain:
            base(x)
        assert merged.calls == plain.calls and merged.launches == plain.launches


def test_merged_gradient_of_the_input(device):
    layer = integers(dtype="float64").eval()
    x, dy = draw(5, 6, dtype="float64").round(), draw(5, 4, seed=1, dtype="float64").round()

    def run():
        leaf = minilora.Parameter(place(x))
        layer(leaf).backward(place(dy))
        return fetch(leaf.grad)

    unmerged = run()
    layer.merge()
    assert np.array_equal(run(), unmerged)
    assert fetch(layer.lora_A.grad).any() and layer.weight.grad is None


def test_training_goes_on_after_unmerge_as_if_never_merged(device):
    def run(merging):
        layer = make()
        optimizer = optim.Adam(layer.parameters(), lr=0.05)
        for t in range(6):
            if merging and t == 3:
                layer.merge()
                layer.eval()
                layer(minilora.tensor(draw(8, 6, seed=99)))
                layer.unmerge()
                layer.train()
            optimizer.zero_grad()
            (layer(minilora.tensor(draw(8, 6, seed=t))) ** 2).mean().backward()
            optimizer.step()
        return bytes_of(layer)

    assert run(True) == run(False)


# -- what merging refuses: each leaves everything as it was -------------------------------------------------


def refused(layer, call, match, error=StateError):
    before = bytes_of(layer), layer.merged, layer.weight.data
    with pytest.raises(error, match=match):
        call()
    assert (bytes_of(layer), layer.merged) == before[:2] and layer.weight.data is before[2]


def test_merge_twice(device):
    layer = make()
    layer.merge()
    refused(layer, layer.merge, r"merged already.*Call unmerge\(\) first")


def test_unmerge_of_what_is_not_merged(device):
    layer = make()
    refused(layer, layer.unmerge, r"not merged. Call merge\(\) first")
    layer.merge()
    layer.unmerge()
    refused(layer, layer.unmerge, "not merged")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "weight"])
@pytest.mark.parametrize("start", [False, True], ids=["B drawn", "B zero"])
def test_merge_of_what_is_not_finite(device, name, value, start):
    layer = make()
    if start:
        layer.lora_B.data[...] = 0.0
    values = fetch(getattr(layer, name))
    values.flat[0] = value
    getattr(layer, name).data[...] = place(values)
    refused(layer, layer.merge, rf"NaN or inf \(found in: {name}\). Nothing was changed")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("big", [("lora_A", "lora_B"), ("lora_A",), ("weight",)], ids=str)
def test_merge_that_overflows(device, dtype, big):
    """Every number is finite, the product or the sum is not."""
    layer = make(dtype=dtype)
    largest = float(np.finfo(dtype).max)
    for name in ("lora_A", "lora_B", "weight"):
        getattr(layer, name).data[...] = largest if name in big else 1.0
    if big == ("weight",):
        layer.lora_B.data[...] = largest / 4  # s B A is finite, W + s B A is not
    refused(layer, layer.merge, f"none of them: W . s B A overflows {dtype}")


def test_training_while_merged(device):
    layer = make()
    layer.merge()
    x = minilora.tensor(draw(5, 6))
    refused(layer, lambda: layer(x), r"training while merged.*Call unmerge\(\) first, or eval\(\)")
    with minilora.no_grad():
        assert layer(x).node is None
    assert layer.eval()(x).node is None
    layer.train()
    layer.requires_grad(False)
    assert layer(x).node is None


def test_copies_while_merged(device):
    layer = make()
    state = layer.state_dict()
    model = nn.Sequential(nn.ReLU(), layer)
    layer.merge()
    for call in (lambda: layer.load_state_dict(state), lambda: layer.to(dtype="float64"), lambda: layer.to("cpu")):
        refused(layer, call, r"this layer is merged.*Call unmerge\(\) first")
    refused(layer, lambda: model.to("cpu"), "^1: this layer is merged")
    assert list(model.state_dict()) == ["1.weight", "1.bias"]  # those of the merged base
    assert np.array_equal(model.state_dict()["1.weight"], fetch(layer.weight))
    layer.unmerge()
    assert all(np.array_equal(value, state[name]) for name, value in layer.state_dict().items())


def test_deepcopy_of_a_merged_layer_unmerges_to_the_same_bits():
    layer = make()
    before = bytes_of(layer)
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    assert bytes_of(other) == before and layer.merged


def test_changing_the_update_while_merged_waits_for_the_next_merge(device):
    layer = integers()
    W, D = fetch(layer.weight), fetch(layer.delta())
    layer.merge()
    layer.lora_B.data *= 2.0
    assert np.array_equal(fetch(layer.weight), W + D)
    layer.unmerge()
    layer.merge()
    assert np.array_equal(fetch(layer.weight), W + 2 * D)


# -- any order: a model of plain matrices -------------------------------------------------------------------


class LayerMachine(RuleBasedStateMachine):
    """Integers and a scaling of 2: the layer must equal NumPy's matrices with tolerance 0, whatever is called."""

    N_IN, OUT, R = 4, 3, 2

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.x = rng.integers(-8, 9, (5, self.N_IN)).astype("float64")
        shapes = {"weight": (self.OUT, self.N_IN), "bias": (self.OUT,), "lora_A": (self.R, self.N_IN),
                  "lora_B": (self.OUT, self.R)}
        self.matrices = {name: rng.integers(-8, 9, shape).astype("float64") for name, shape in shapes.items()}
        self.base = nn.Linear(self.N_IN, self.OUT, dtype="float64")
        self.base.load_state_dict({name: self.matrices[name] for name in ("weight", "bias")})
        self.base_bytes = bytes_of(self.base)
        self.layer = lora.adapt(self.base, r=self.R, lora_alpha=2 * self.R)
        self.layer.load_state_dict(paths(self.matrices))
        self.optimizer = optim.SGD(self.layer.parameters(), lr=1.0)
        self.merged_weight = None

    def delta(self):
        return 2.0 * self.matrices["lora_B"] @ self.matrices["lora_A"]

    @rule()
    def merge(self):
        if self.merged_weight is None:
            self.layer.merge()
            self.merged_weight = self.matrices["weight"] + self.delta()
        else:
            with pytest.raises(StateError, match="merged already"):
                self.layer.merge()

    @rule()
    def unmerge(self):
        if self.merged_weight is not None:
            self.layer.unmerge()
            self.merged_weight = None
        else:
            with pytest.raises(StateError, match="not merged"):
                self.layer.unmerge()

    @rule(mode=st.booleans())
    def switch(self, mode):
        self.layer.train(mode)

    @rule(dy=st.integers(-2, 2))
    def step(self, dy):
        """A real step, whose gradients are integers; to the whole numbers -8 ... 8, so that nothing grows."""
        self.optimizer.zero_grad()
        if self.merged_weight is not None and self.layer.training:
            with pytest.raises(StateError, match="training while merged"):
                self.layer(minilora.tensor(self.x))
            return
        y = self.layer(minilora.tensor(self.x))
        if self.merged_weight is not None:
            assert y.node is None
            return
        y.backward(place(np.full(y.shape, float(dy))))
        A, B = self.matrices["lora_A"], self.matrices["lora_B"]
        G = np.full((self.OUT, len(self.x)), float(dy)) @ self.x
        assert np.array_equal(fetch(self.layer.lora_A.grad), 2.0 * B.T @ G)
        assert np.array_equal(fetch(self.layer.lora_B.grad), 2.0 * G @ A.T)
        self.optimizer.step()
        for name, gradient in (("lora_A", 2.0 * B.T @ G), ("lora_B", 2.0 * G @ A.T)):
            moved = self.matrices[name] - gradient
            assert np.array_equal(fetch(getattr(self.layer, name)), moved)
            self.matrices[name] = np.fmod(moved, 9.0)
            getattr(self.layer, name).data[...] = place(self.matrices[name])

    @rule(seed=st.integers(0, 50))
    def load(self, seed):
        rng = np.random.default_rng(seed)
        state = {name: rng.integers(-8, 9, value.shape).astype("float64") for name, value in self.matrices.items()}
        state |= {name: self.matrices[name] for name in ("weight", "bias")}
        if self.merged_weight is None:
            self.layer.load_state_dict(paths(state))
            self.matrices = state
        else:
            with pytest.raises(StateError, match="is merged"):
                self.layer.load_state_dict(paths(state))

    @rule()
    def load_what_does_not_fit(self):
        with pytest.raises((StateError, StateDictError)):
            self.layer.load_state_dict(paths({"lora_A": np.zeros((9, 9)), "lora_B": np.zeros((self.OUT, self.R))}))

    @precondition(lambda self: self.merged_weight is not None)
    @rule(name=st.sampled_from(["lora_A", "lora_B"]))
    def change_while_merged(self, name):
        self.matrices[name] = -self.matrices[name]
        getattr(self.layer, name).data[...] = place(self.matrices[name])

    @rule()
    def poison(self):
        A = fetch(self.layer.lora_A)
        A[0, 0] = np.nan
        self.layer.lora_A.data[...] = place(A)
        with pytest.raises(MiniloraError):
            self.layer.merge()
        self.layer.lora_A.data[...] = place(self.matrices["lora_A"])

    @invariant()
    def output_is_that_of_the_matrices(self):
        weight = self.matrices["weight"] + self.delta() if self.merged_weight is None else self.merged_weight
        with minilora.no_grad():
            y = fetch(self.layer(minilora.tensor(self.x)))
        assert np.array_equal(y, self.x @ weight.T + self.matrices["bias"])

    @invariant()
    def arrays_are_the_matrices(self):
        assert self.layer.merged == (self.merged_weight is not None)
        expected = paths(self.matrices)
        if self.layer.merged:
            expected["weight"] = self.merged_weight
        for name, p in self.layer.named_parameters():
            assert np.array_equal(fetch(p), expected[name]), name
        assert self.layer.weight.grad is None and self.layer.bias.grad is None

    @invariant()
    def base_keeps_its_bits(self):
        assert bytes_of(self.base) == self.base_bytes


def test_any_order_of_calls(device):
    run_state_machine_as_test(LayerMachine, settings=settings(stateful_step_count=20))


def test_a_kind_of_layer_that_lacks_a_definition_says_so():
    class Half(AdaptedLayer, nn.Linear):
        pass

    layer = Half.__new__(Half)
    layer.adopt(nn.Linear(2, 2, rng=0))
    with pytest.raises(TypeError, match="Half has no frozen: define frozen in the subclass"):
        layer(np.ones((1, 2), "float32"))
