"""Rows of an embedding that an adapter replaces (`trainable_token_indices`), through every call that knows adapters.

Oracles: the plain table with the rows written into it; and the model with all of its table trained, of which only those rows
are let move.
"""
import copy
import pickle

import numpy as np
import pytest
from conftest import fetch, place
from hypothesis import given
from hypothesis import strategies as st

import minilora
from minilora import Parameter, lora, nn, ops, optim
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError, StateError
from minilora.lora.gradients.tokens import token_embedding, token_head
from minilora.lora.layers.tokens import TokenTable

IDS = np.array([[1, 4, 2, 4], [0, 3, 3, 1]])
V, D = 7, 4


class Net(nn.Module):
    """A table that makes the logits too, positions, and a layer to adapt."""

    def __init__(self, dtype="float64", padding_idx=None):
        made = dict(dtype=dtype, rng=np.random.default_rng(0))
        self.wte, self.wpe = nn.Embedding(V, D, padding_idx, **made), nn.Embedding(4, D, **made)
        self.fc, self.head = nn.Linear(D, D, **made), nn.Linear(V, 3, **made)

    @property
    def embedding(self):
        return self.wte

    def forward(self, ids):
        x = self.fc(self.wte(ids) + self.wpe([list(range(np.shape(ids)[-1]))]))
        return self.head(self.wte.logits(x))


def config(tokens=(4, 1), **settings):
    return lora.Config(**{**dict(r=1, lora_alpha=2, target_modules=["fc"], trainable_token_indices=tokens), **settings})


def with_tokens(model=None, name="new", **settings):
    model = model or Net()
    lora.inject(model, config(**settings), name, rng=1)
    return model


def shaken(model, name="new", seed=0):
    """All that the adapter trains, moved."""
    rng = np.random.default_rng(seed)
    for p in (model.wte.copies[name].rows, model.fc.adapters[name].lora_A, model.fc.adapters[name].lora_B):
        p.data = p.data + rng.standard_normal(p.shape).astype(p.dtype)
    return model


def swapped(model, name="new"):
    """The base with that adapter written into it: a plain model that computes the same."""
    plain, own = Net(str(model.head.weight.dtype)), model.wte.copies[name]
    table = model.wte.original.weight.data.copy()
    for i, row in zip(own.indices, own.rows.data):
        table[i] = row
    plain.wte.weight.data = table
    adapter = model.fc.adapters[name]
    plain.fc.weight.data = plain.fc.weight.data + adapter.scaling * adapter.lora_B.data @ adapter.lora_A.data
    return plain


# -- the ops: sums over letters -----------------------------------------------------------------------------------------

@given(ids=st.lists(st.integers(0, V - 1), max_size=30).map(lambda ids: np.array(ids, "int64")),
       indices=st.lists(st.integers(0, V - 1), max_size=5, unique=True), padding=st.sampled_from([None, 0, 3]),
       trained=st.sampled_from(["W", "T", "WT"]), dtype=st.sampled_from(["float64", "float32"]), seed=st.integers(0, 99))
def test_rows_by_letters(device, ids, indices, padding, trained, dtype, seed):
    rng = np.random.default_rng(seed)
    W, T, dy = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((V, D), (len(indices), D), (ids.size, D)))
    leaves = {name: Parameter(place(a), name in trained) for name, a in (("W", W), ("T", T))}
    y = token_embedding(ids, leaves["W"], leaves["T"], indices, padding)
    expected, dW, dT = [], np.zeros_like(W), np.zeros_like(T)
    for n, v in enumerate(ids):
        expected.append(T[indices.index(v)] if v in indices else W[v])
        if v != padding:
            (dT[indices.index(v)] if v in indices else dW[v])[...] += dy[n]
    np.testing.assert_array_equal(fetch(y), np.array(expected).reshape(ids.size, D))
    y.backward(place(dy))
    for name, expected_gradient in (("W", dW), ("T", dT)):
        got = leaves[name].grad
        if name in trained:
            np.testing.assert_array_equal(fetch(got), expected_gradient)
            assert got.dtype == dtype
        else:
            assert got is None


@given(n=st.integers(0, 5), indices=st.lists(st.integers(0, V - 1), max_size=5, unique=True), seed=st.integers(0, 99),
       trained=st.sampled_from(["h", "W", "T", "hT", "hWT"]))
def test_the_head_is_that_of_the_table_with_its_rows(device, n, indices, seed, trained):
    rng = np.random.default_rng(seed)
    h, W, T, dy = (rng.integers(-8, 9, shape).astype("float64") for shape in ((n, D), (V, D), (len(indices), D), (n, V)))
    new = W.copy()
    new[indices] = T
    leaves = [Parameter(place(a), name in trained) for name, a in (("h", h), ("W", W), ("T", T))]
    y = token_head(*leaves, indices)
    np.testing.assert_array_equal(fetch(y), h @ new.T)
    y.backward(place(dy))
    G = dy.T @ h
    dW = G.copy()
    dW[indices] = 0
    for p, name, expected in zip(leaves, "hWT", (dy @ new, dW, G[indices])):
        assert (p.grad is not None) == (name in trained)
        if name in trained:
            np.testing.assert_array_equal(fetch(p.grad), expected)


def test_composed_from_plain_ops(device):
    """y = W[ids] + (rows that are replaced) (T - W_I)[slot]: the same values and gradients."""
    rng = np.random.default_rng(0)
    W, T, dy = (rng.standard_normal(shape) for shape in ((V, D), (2, D), (8, D)))
    ids, indices = IDS.reshape(-1), [4, 1]
    one = Parameter(place(T))
    y = token_embedding(ids, place(W), one, indices)
    two, chosen = Parameter(place(T)), place((ids[:, None] == np.array(indices)).astype("float64"))
    z = ops.embedding(ids, place(W)) * (1.0 - chosen.sum(1, keepdims=True)) + ops.linear(minilora.Tensor(chosen), two.T)
    np.testing.assert_allclose(fetch(y), fetch(z), rtol=1e-14)
    y.backward(place(dy))
    z.backward(place(dy))
    np.testing.assert_allclose(fetch(one.grad), fetch(two.grad), rtol=1e-14)


@pytest.mark.parametrize("arguments, error, words", [
    (([0], np.ones((3, 2)), np.ones((1, 2)), [3]), ConfigError, "got 3"),
    (([0], np.ones((3, 2)), np.ones((1, 2)), [-1]), ConfigError, "got -1"),
    (([0], np.ones((3, 2)), np.ones((2, 2)), [1, 1]), ConfigError, "1 comes twice"),
    (([0], np.ones((3, 2)), np.ones((2, 2)), [1]), ShapeError, r"expected rows \(1, 2\)"),
    (([0], np.ones((3, 2)), np.ones((1, 3)), [1]), ShapeError, "got"),
    (([0], np.ones(3), np.ones((1, 3)), [1]), ShapeError, "expected a table"),
    (([3], np.ones((3, 2)), np.ones((1, 2)), [1]), OutOfRangeError, "token id 3"),
    (([0.5], np.ones((3, 2)), np.ones((1, 2)), [1]), DTypeError, "must be integers"),
])
def test_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        token_embedding(*arguments)


# -- inject, train, remove ----------------------------------------------------------------------------------------------

def test_at_first_it_is_the_base_to_the_last_bit():
    y = Net()(IDS).data
    model = with_tokens()
    np.testing.assert_array_equal(model(IDS).data, y)
    assert [path for path, p in model.named_parameters() if p.trainable] == [
        "wte.copies.new.rows", "fc.adapters.new.lora_A", "fc.adapters.new.lora_B"]


@pytest.mark.parametrize("tokens", [(4, 1), {"wte": (4, 1)}, {"wpe": (0,), "wte": (4, 1)}], ids=str)
def test_which_embedding(tokens):
    report = lora.inject(model := Net(), config(tokens), rng=0)
    assert dict(report.matched.tokens)["wte"] == (4, 1) and "trained rows of wte: 4, 1" in str(report)
    assert isinstance(model.wte.current, TokenTable) and isinstance(model.wpe, nn.Embedding) == ("wpe" not in tokens)


def test_training_moves_those_rows_as_training_all_of_them_would(seed=3):
    model, whole = with_tokens(), Net()
    whole.requires_grad(False)
    whole.wte.weight.trainable = True
    for one in (model, whole):
        optimizer = optim.SGD([p for path, p in one.named_parameters() if p.trainable and "fc" not in path], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            y = one(IDS)
            (y * y).sum().backward()
            if one is whole:  # what is not replaced stays
                keep = np.ones((V, 1))
                keep[[4, 1]] = 0
                one.wte.weight.grad[...] *= 1 - keep
            optimizer.step()
    np.testing.assert_allclose(model.wte.current.rows.data, whole.wte.weight.data[[4, 1]], rtol=1e-10)
    np.testing.assert_allclose(model(IDS).data, whole(IDS).data, rtol=1e-10)
    np.testing.assert_array_equal(model.wte.original.weight.data, Net().wte.weight.data)


def test_a_padding_row_gets_no_gradient():
    model = with_tokens(Net(padding_idx=4))
    model.wte(IDS).sum().backward()
    rows = model.wte.copies["new"].rows
    np.testing.assert_array_equal(rows.grad, [[0] * D, [2] * D])


def test_removing_it_leaves_a_plain_table():
    y = Net()(IDS).data
    model = shaken(with_tokens())
    assert np.abs(model(IDS).data - y).max() > 0.01
    lora.remove(model, "new")
    assert type(model.wte) is nn.Embedding
    np.testing.assert_array_equal(model(IDS).data, y)


def test_switching_disabling_and_two_of_them():
    model = shaken(with_tokens(), seed=1)
    y = model(IDS).data
    shaken(with_tokens(model, "other", tokens=(0, 4)), "other", seed=2)
    np.testing.assert_allclose(model(IDS).data, swapped(model, "other")(IDS).data, rtol=1e-10)
    lora.activate(model, "new")
    np.testing.assert_array_equal(model(IDS).data, y)
    with lora.disabled(model):
        np.testing.assert_array_equal(model(IDS).data, Net()(IDS).data)
    with pytest.raises(StateError, match="each a copy of wte"):
        lora.activate(model, "new", "other")
    status = str(lora.status(model))
    assert "wte" in status and "new, other" in status
    lora.activate(model)
    np.testing.assert_array_equal(model(IDS).data, Net()(IDS).data)


def test_a_mixed_batch():
    model = shaken(shaken(with_tokens(with_tokens(), "other", tokens=(0, 3))), "other", seed=4)
    rows = []
    for name in ("new", "other", None):
        lora.activate(model, *([name] if name else []))
        rows.append(model(IDS[:1]).data)
    with lora.mixed(model, adapter_names=["new", "__base__", "other"]):
        got = model(np.repeat(IDS[:1], 3, 0)).data
    np.testing.assert_allclose(got, np.concatenate([rows[0], rows[2], rows[1]]), rtol=1e-12)


def test_beside_another_adapter_of_the_same_table():
    model = shaken(with_tokens())
    lora.inject(model, lora.Config(r=1, target_modules=["wte"]), "low", rng=0)
    model.wte.original.lora_A.data += 1.0
    assert model.wte.original.weight is model.wte.copies["new"].weight
    with pytest.raises(StateError, match="do not go together"):
        lora.activate(model, "new", "low")
    low = model(IDS).data
    lora.activate(model, "new")
    np.testing.assert_allclose(model(IDS).data, swapped(model)(IDS).data, rtol=1e-10)
    lora.activate(model, "low")
    lora.merge(model.eval())
    np.testing.assert_allclose(model(IDS).data, low, rtol=1e-10)
    lora.unmerge(model)
    again = Net()
    lora.inject(again, lora.Config(r=1, target_modules=["wte"]), "low", rng=0)
    with_tokens(again)  # the other way round
    np.testing.assert_array_equal(again(IDS).data, Net()(IDS).data)
    assert lora.low_rank_updates(again, "low")["wte"].r == 1
    with pytest.raises(StateError, match="wte .trainable_token_indices"):
        lora.low_rank_updates(again, "new")


# -- merge and bake -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_merging_swaps_the_rows_and_unmerging_gives_the_bits_back(dtype):
    model = shaken(with_tokens(Net(dtype)))
    table, y = model.wte.original.weight.data.copy(), model(IDS).data
    lora.merge(model.eval(), allow_lossy=True)
    merged = model.wte.original.weight.data
    np.testing.assert_array_equal(merged[[4, 1]], model.wte.current.rows.data.astype(dtype))
    np.testing.assert_array_equal(np.delete(merged, [1, 4], 0), np.delete(table, [1, 4], 0))
    # rounding of W' in the weight's dtype, beside the largest output
    np.testing.assert_allclose(model(IDS).data, y, atol=(5e-3 if dtype == "float16" else 1e-6) * np.abs(y).max())
    assert model.wte.current.merged and lora.status(model)
    for call in (lambda: lora.merge(model), lambda: model.to(dtype="float32"), lambda: lora.remove(model, "new"),
                 lambda: lora.activate(model)):
        with pytest.raises(StateError):
            call()
    state = model.state_dict()
    assert state.keys() == Net().state_dict().keys()
    np.testing.assert_array_equal(state["wte.weight"], merged)
    lora.unmerge(model)
    assert model.wte.original.weight.data.tobytes() == table.tobytes() and not model.wte.current.merged
    np.testing.assert_array_equal(model(IDS).data, y)


def test_merged_twice_and_in_between():
    model = shaken(with_tokens())
    table = model.wte.original.weight.data.tobytes()
    for _ in range(2):
        lora.merge(model)
        lora.unmerge(model)
        assert model.wte.original.weight.data.tobytes() == table
    with pytest.raises(StateError, match="not merged"):
        model.wte.current.unmerge()
    lora.merge(model)
    with pytest.raises(StateError, match="merged already"):
        model.wte.current.merge()


@pytest.mark.parametrize("merged", [False, True])
def test_baked_it_is_a_plain_model(merged):
    model = shaken(with_tokens())
    expected = swapped(model)
    if merged:
        lora.merge(model)
    lora.bake(model)
    assert type(model.wte) is nn.Embedding and model.state_dict().keys() == Net().state_dict().keys()
    np.testing.assert_allclose(model(IDS).data, expected(IDS).data, rtol=1e-10)
    np.testing.assert_array_equal(model.wte.weight.data, expected.wte.weight.data)
    model.wte.weight.data[0] = 0  # its own, and writable


def test_a_weight_that_another_layer_shares_is_not_merged():
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(D, V, bias=False, dtype="float64")
            self.out.weight = self.wte.weight

    model = shaken(with_tokens(Shared()))
    before = [p.data.tobytes() for p in model.parameters()]
    with pytest.raises(StateError, match="'wte' and 'out' share one weight"):
        lora.merge(model)
    assert [p.data.tobytes() for p in model.parameters()] == before and not model.fc.merged


# -- the rest ------------------------------------------------------------------------------------------------------------

def test_copies_pickles_and_states():
    model = shaken(with_tokens())
    y, state = model(IDS).data, model.state_dict()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(again(IDS).data, y)
        assert again.wte.copies["new"].weight is again.wte.original.weight is not model.wte.original.weight
    fresh = with_tokens()
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(fresh(IDS).data, y)
    assert list(state)[:2] == ["wte.original.weight", "wte.copies.new.rows"]
    fresh = with_tokens()
    lora.load_lora_state_dict(fresh, lora.lora_state_dict(model))
    np.testing.assert_array_equal(fresh(IDS).data, y)
    assert sorted(lora.lora_state_dict(model)) == ["fc.lora_A", "fc.lora_B", "wte.rows"]


def test_half_precision_keeps_the_rows_in_float32():
    model = shaken(with_tokens(Net("float16")))
    rows = model.wte.copies["new"].rows
    assert rows.dtype == "float32" and model.wte(IDS).dtype == "float16"
    np.testing.assert_array_equal(model.wte([4]).data, rows.data[:1].astype("float16"))
    wide = model.to(dtype="float64")
    assert wide.wte.copies["new"].rows.dtype == "float64"
    assert with_tokens(Net()).to(dtype="float16").wte.copies["new"].rows.dtype == "float32"


def test_the_plan_counts_them():
    planned, model = lora.plan(Net(), config()), with_tokens()
    assert planned.lora.trained == sum(p.size for p in model.parameters() if p.trainable) == 2 * D + 2 * D
    assert planned.lora.total == sum(p.size for p in model.parameters())
    assert "trained rows of wte: 4, 1" in str(planned)
    listed = lora.plan([("wte", (V, D), 1, "Embedding"), ("fc", (D, D))], config())
    assert listed.lora.trained == planned.lora.trained


def test_lora_plus_learns_them_at_the_lower_rate():
    groups = lora.lora_plus_groups(model := with_tokens(), lr=0.1)
    assert any(p is model.wte.copies["new"].rows for p in groups[0]["params"])


@pytest.mark.parametrize("settings, words", [
    (dict(tokens=(7,)), "got 7"), (dict(tokens={"wte": (0, 0)}), "come twice"),
    (dict(tokens={"emb": (0,)}), "'emb' matches no embedding. The embeddings of the model are wte, wpe"),
    (dict(tokens={"fc": (0,)}), "'fc' matches no embedding"),
    (dict(tokens={"wte": (0,)}, target_modules=["wte", "fc"]), "wte is adapted too"),
    (dict(tokens={"wte": (0,)}, modules_to_save=["wte"]), "trained as a whole already"),
])
def test_configs_that_do_not_fit(settings, words):
    model = Net()
    before = [type(module) for _, module in model.named_modules()]
    with pytest.raises(ConfigError, match=words):
        lora.inject(model, config(**settings), rng=0)
    assert [type(module) for _, module in model.named_modules()] == before


def test_a_list_where_nobody_can_tell_the_embedding():
    class Two(nn.Module):
        def __init__(self):
            self.a, self.b, self.fc = nn.Embedding(3, 2), nn.Embedding(3, 2), nn.Linear(2, 2)

    with pytest.raises(ConfigError, match="a, b: name one, as in {'a': "):
        lora.inject(Two(), config((0,)), rng=0)


def test_a_language_model_learns_one_token():
    model = nn.GPT2(nn.GPT2Config(vocab_size=9, n_positions=6, n_embd=8, n_layer=1, n_head=2), rng=0)
    lora.inject(model, lora.Config(r=1, target_modules=["c_attn"], trainable_token_indices=[8]), rng=0)
    ids = [[8, 1, 8, 2, 8]]
    before, table = model.loss(ids, ids).item(), model.wte.original.weight.data.copy()
    optimizer = optim.Adam([model.wte.copies["default"].rows], lr=0.05)
    for _ in range(20):
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(ids, ids).item() < before - 0.2
    np.testing.assert_array_equal(model.wte.original.weight.data, table)
