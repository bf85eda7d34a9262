"""GPT-2, BERT and Llama: names, causality, padding, gradients, what is kept, and that they learn."""
import copy
import math

import numpy as np
import pytest
import standin
from conftest import PROOF, fetch, place
from tiny_transformers import CAUSAL, CONFIGS, TABLES, D, F, P, V, build, names, randomise, token_ids

import minilora
from minilora import engine, lora, nn, ops, optim
from minilora.errors import ConfigError, DTypeError, OutOfRangeError, ShapeError, StateError
from minilora.testing import gradcheck

FAMILIES = list(TABLES)
SMALL = {  # for what costs time, or needs every number of the model
    "gpt2": dict(n_embd=8, n_head=2, n_inner=12), "bert": dict(hidden_size=8, num_attention_heads=2, intermediate_size=12),
    "llama": dict(hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2),
}
# In the second of two layers: the module that is replaced, and the operations that a gradient then passes.
ADAPTED = {
    "gpt2": ("h.1.attn.c_attn", """LoRALinear PackedAttention Linear Add LayerNorm Linear GELU Linear Add LayerNorm GetItem
             LinearCrossEntropy"""),
    "bert": ("encoder.layer.1.attention.self.query", """LoRALinear Reshape Transpose Attention Transpose Reshape Linear Add
             LayerNorm Linear ExactGELU Linear Add LayerNorm Mean"""),
    "llama": ("model.layers.1.self_attn.v_proj", """LoRALinear Reshape Transpose Attention Transpose Reshape Linear Add RMSNorm
              Linear SiLU Linear Mul Linear Add RMSNorm GetItem LinearCrossEntropy"""),
}


def loss_of(model, ids):
    return ops.mean(model(ids)) if isinstance(model, nn.Bert) else model.loss(ids, ids)


def assert_close(got, expected, tol=1e-13):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol * max(1.0, np.abs(expected).max(initial=0.0)))


def adapt(model, path, **settings):
    """Replace the linear layer at this path by one with an update."""
    *above, name = path.split(".")
    owner = dict(model.named_modules())[".".join(above)]
    layer = lora.adapt(getattr(owner, name), **{"r": 2, "lora_alpha": 4, "rng": 3, **settings})
    layer.lora_B.data[...] = place(np.random.default_rng(4).normal(0, 0.1, layer.lora_B.shape), layer.lora_B.dtype)
    setattr(owner, name, layer)
    return layer


# -- names, shapes, first weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes(family):
    """The checkpoint's own, but for a prefix: a table maps them, and no code."""
    own = {name: p.shape for name, p in build(family).named_parameters()}
    assert own == {ours: shape for ours, (_, shape) in names(family).items()}
    prefix = {"gpt2": "transformer.", "bert": "", "llama": ""}[family]
    assert [theirs for theirs, _ in names(family).values()] == [prefix + ours for ours in names(family)]


def test_names_that_depend_on_settings():
    assert "lm_head.weight" not in build("llama", tie_word_embeddings=True).state_dict()
    assert build("llama", tie_word_embeddings=True).lm_head is None
    assert not [name for name in nn.Bert(CONFIGS["bert"], add_pooling_layer=False).state_dict() if "pooler" in name]
    wide = build("llama", head_dim=6, num_key_value_heads=1).state_dict()
    assert wide["model.layers.0.self_attn.q_proj.weight"].shape == (24, D)
    assert wide["model.layers.0.self_attn.k_proj.weight"].shape == (6, D)
    assert wide["model.layers.0.self_attn.o_proj.weight"].shape == (D, 24)
    assert build("gpt2", n_inner=None).h[0].mlp.c_fc.weight.shape == (4 * D, D)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_sizes(family):
    """Numbers of parameters of GPT-2 (124M), bert-base-uncased and Llama-2-7b, counted from one layer."""
    widths = {"gpt2": (50257, 1024, 768, 3072), "bert": (30522, 512, 768, 3072), "llama": (32000, 0, 4096, 11008)}[family]
    exchange = {**dict(zip((V, P, D, F), widths)), 3 * D: 3 * widths[2]}  # of a tiny model's widths
    config, layers = type(CONFIGS[family])(), "n_layer" if family == "gpt2" else "num_hidden_layers"

    def count(n):
        model = build(family, **{layers: n}, **({"num_key_value_heads": None} if family == "llama" else {}))
        return sum(math.prod(exchange.get(length, length) for length in p.shape) for p in model.parameters())

    total = count(1) + (getattr(config, layers) - 1) * (count(2) - count(1))
    assert total == {"gpt2": 124_439_808, "bert": 109_482_240, "llama": 6_738_415_616}[family]
    assert (config.vocab_size, getattr(config, "n_embd", None) or config.hidden_size) == (widths[0], widths[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family, device):
    model = build(family, dtype="float32")
    width = V if family in CAUSAL else D
    assert model(token_ids(2, 5)).shape == (2, 5, width)
    assert model(token_ids(5)).shape == (5, width)
    assert model(token_ids(2, 3, 4)).shape == (2, 3, 4, width)
    assert model([[1, 2, 3]]).shape == (1, 3, width)
    assert model([4]).shape == (1, width)
    if family == "bert":
        assert model.pool(model(token_ids(2, 5))).shape == (2, D) and model.pool(model(token_ids(5))).shape == (D,)
    else:
        assert model.hidden(token_ids(2, 5)).shape == (2, 5, D) and model.loss(token_ids(2, 5), token_ids(2, 5)).shape == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_weights(family, device):
    model = build(family, **{"gpt2": dict(n_embd=128), "bert": dict(hidden_size=128), "llama": dict(hidden_size=128)}[family])
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert (value == 1.0).all(), name
        else:
            std = 0.02 / 2 if "c_proj" in name else 0.02  # two layers: 1 / sqrt(2 * 2)
            rows = value[1:] if "word_embeddings" in name else value
            assert abs(rows.std() / std - 1) < 5 / np.sqrt(2 * rows.size), name
            assert abs(rows.mean()) < 5 * std / np.sqrt(rows.size), name
    if family == "bert":
        assert not model.state_dict()["embeddings.word_embeddings.weight"][0].any()
    assert abs(build("gpt2", n_embd=128, initializer_range=0.1).state_dict()["wte.weight"].std() - 0.1) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_one_model_on_every_device(family, device):
    state = build(family, rng=np.random.default_rng(5)).state_dict()
    with minilora.use("cpu"):
        same, other = build(family, rng=5).state_dict(), build(family, rng=6).state_dict()
    assert {name: a.tobytes() for name, a in state.items()} == {name: a.tobytes() for name, a in same.items()}
    assert all(state[name].tobytes() != other[name].tobytes() for name in state if state[name].ndim == 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_copies_and_devices(family, device):
    model, other = randomise(build(family)), build(family, rng=9)
    ids = token_ids(2, 5)
    expected = fetch(model(ids))
    other.load_state_dict(model.state_dict())
    assert fetch(other(ids)).tobytes() == fetch(copy.deepcopy(model)(ids)).tobytes() == expected.tobytes()
    model.to("cpu")
    assert_close(fetch(model(ids)), expected, 1e-12)
    assert_close(fetch(model.to(dtype="float32")(ids)), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_kept(family, dtype, device):
    model = build(family, dtype=dtype, **({"embd_pdrop": 0.1, "resid_pdrop": 0.1} if family == "gpt2" else {}))
    h = model(token_ids(2, 5))
    loss = ops.mean(model.pool(h)) if family == "bert" else model.loss(token_ids(2, 5), token_ids(2, 5))
    loss.backward()
    assert {h.dtype.name, loss.dtype.name, *(p.grad.dtype.name for p in model.parameters())} == {dtype}


# -- the formula, written out for one text ---------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, heads, kv_heads, causal):
    """q (T, H hd), k and v (T, KV hd), head by head."""
    T, hd = len(q), q.shape[1] // heads
    y = np.empty_like(q)
    for h in range(heads):
        own, shared = np.s_[:, h * hd:(h + 1) * hd], np.s_[:, h * kv_heads // heads * hd:(h * kv_heads // heads + 1) * hd]
        z = q[own] @ k[shared].T / math.sqrt(hd)
        y[own] = softmax(np.where(np.tri(T, dtype=bool), z, -np.inf) if causal else z) @ v[shared]
    return y


def turned(x, hd, theta):
    """Pairs (i, i + hd / 2) of every head as complex numbers, turned by t theta^(-2 i / hd)."""
    heads = x.reshape(len(x), -1, 2, hd // 2)
    angles = np.outer(np.arange(len(x)), theta ** (-2.0 * np.arange(hd // 2) / hd))
    z = (heads[:, :, 0] + 1j * heads[:, :, 1]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], axis=2).reshape(x.shape)


class Weights(dict):
    """A state dict, and the layers that it holds."""

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self.get(f"{name}.bias", 0.0)

    def layer_norm(self, x, name, eps):
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self[f"{name}.weight"] + self[f"{name}.bias"]

    def rms_norm(self, x, name, eps):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self[f"{name}.weight"]


def gpt2_formula(w, ids, c):
    x = w["wte.weight"][ids] + w["wpe.weight"][:len(ids)]
    for i in range(2):
        q, k, v = np.split(w.linear(w.layer_norm(x, f"h.{i}.ln_1", c.layer_norm_epsilon), f"h.{i}.attn.c_attn"), 3, axis=1)
        x = x + w.linear(attention(q, k, v, 4, 4, True), f"h.{i}.attn.c_proj")
        z = w.linear(w.layer_norm(x, f"h.{i}.ln_2", c.layer_norm_epsilon), f"h.{i}.mlp.c_fc")
        z = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
        x = x + w.linear(z, f"h.{i}.mlp.c_proj")
    return w.layer_norm(x, "ln_f", c.layer_norm_epsilon) @ w["wte.weight"].T


def bert_formula(w, ids, c):
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:len(ids)]
    x = w.layer_norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm", c.layer_norm_eps)
    for i in range(2):
        at = f"encoder.layer.{i}"
        q, k, v = (w.linear(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        y = w.linear(attention(q, k, v, 4, 4, False), f"{at}.attention.output.dense")
        x = w.layer_norm(x + y, f"{at}.attention.output.LayerNorm", c.layer_norm_eps)
        z = w.linear(x, f"{at}.intermediate.dense")
        z = z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))) / 2
        x = w.layer_norm(x + w.linear(z, f"{at}.output.dense"), f"{at}.output.LayerNorm", c.layer_norm_eps)
    return x


def llama_formula(w, ids, c):
    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        at = f"model.layers.{i}"
        normed = w.rms_norm(x, f"{at}.input_layernorm", c.rms_norm_eps)
        q, k, v = (w.linear(normed, f"{at}.self_attn.{name}_proj") for name in "qkv")
        q, k = (turned(a, D // 4, c.rope_theta) for a in (q, k))
        x = x + w.linear(attention(q, k, v, 4, 2, True), f"{at}.self_attn.o_proj")
        normed = w.rms_norm(x, f"{at}.post_attention_layernorm", c.rms_norm_eps)
        gate = w.linear(normed, f"{at}.mlp.gate_proj")
        x = x + w.linear(gate / (1 + np.exp(-gate)) * w.linear(normed, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return w.linear(w.rms_norm(x, "model.norm", c.rms_norm_eps), "lm_head")


FORMULAS = {"gpt2": gpt2_formula, "bert": bert_formula, "llama": llama_formula}


@pytest.mark.parametrize("family, changes", [
    *((family, {}) for family in FAMILIES), ("gpt2", dict(layer_norm_epsilon=0.1)), ("bert", dict(layer_norm_eps=0.1)),
    ("llama", dict(rms_norm_eps=0.1, rope_theta=50.0)),
], ids=str)
def test_a_model_is_its_formula(family, changes, device):
    model, ids = randomise(build(family, **changes)), token_ids(7)
    w = Weights(model.state_dict())
    assert_close(fetch(model(ids)), FORMULAS[family](w, ids, model.config), 1e-12)
    if family == "bert":
        h = fetch(model(ids))
        assert_close(fetch(model.pool(model(ids))), np.tanh(w.linear(h[0], "pooler.dense")))


# -- what a token sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_causality(family, device):
    """A token changes nothing before it; with BERT it changes all."""
    model = randomise(build(family))
    ids = token_ids(1, P)
    before = fetch(model(ids))[0]
    for t in range(P):
        changed = ids.copy()
        changed[0, t] = ids[0, t] % (V - 1) + 1
        difference = np.abs(fetch(model(changed))[0] - before).max(axis=1)
        assert difference[t:].min() > 1e-6
        assert (difference[:t] < 1e-13).all() if family in CAUSAL else (difference[:t] > 1e-6).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_leak(family, side, device):
    """Whatever stands in the padding, the tokens' outputs are those of the text without it."""
    model = randomise(build(family))
    text, padding = token_ids(1, 5), token_ids(1, 3, seed=2)
    expected = fetch(model(text))[0]
    for other in (padding, padding % (V - 1) + 1):
        ids = np.concatenate([text, other] if side == "right" else [other, text], axis=1)
        keep = np.isin(np.arange(8), np.arange(5) if side == "right" else np.arange(3, 8))
        more = {}
        if side == "left" and family != "llama":  # whose positions count by their differences only
            more["position_ids"] = np.maximum(keep.cumsum() - 1, 0)
        y = fetch(model(ids, key_padding=keep[None], **more))[0]
        assert_close(y[keep], expected)
        assert np.isfinite(y).all()
        without = fetch(model(ids, **more))[0, keep]
        assert (np.abs(without - expected).max() > 1e-6) == (side == "left" or family == "bert")


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_gets_no_gradient(family, device):
    model = randomise(build(family))
    ids = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 12, 12]])
    keep = ids != 12
    model.loss(ids, np.where(keep, ids, -100), key_padding=keep).backward()
    # GPT-2's table makes the logits too: all its rows are trained.
    trained = model.embedding.weight if family == "llama" else model.wpe.weight
    rows = np.flatnonzero(np.abs(fetch(trained.grad)).max(axis=1))
    # From the last token of a text nothing is predicted, and so nothing flows back to it.
    assert rows.tolist() == ([1, 2, 3, 4, 6, 7] if family == "llama" else [0, 1, 2, 3])


def test_batches_do_not_mix(device):
    for family in FAMILIES:
        model = randomise(build(family))
        ids = token_ids(3, 6)
        assert_close(fetch(model(ids)), np.stack([fetch(model(row)) for row in ids]))


def test_positions_and_segments(device):
    gpt2, bert = randomise(build("gpt2")), randomise(build("bert"))
    ids = token_ids(2, 5)
    for model in (gpt2, bert):
        np.testing.assert_array_equal(fetch(model(ids, position_ids=[0, 1, 2, 3, 4])), fetch(model(ids)))
        np.testing.assert_array_equal(fetch(model(ids, position_ids=np.tile(np.arange(5), (2, 1)))), fetch(model(ids)))
        assert np.abs(fetch(model(ids, position_ids=np.arange(1, 6))) - fetch(model(ids))).max() > 1e-6
    zeros = np.zeros((2, 5), int)
    np.testing.assert_array_equal(fetch(bert(ids, zeros)), fetch(bert(ids)))
    assert np.abs(fetch(bert(ids, zeros + 1)) - fetch(bert(ids))).max() > 1e-6


# -- the loss ------------------------------------------------------------------------------------------------------------


def written_out(logits, labels):
    """The mean, over labels that count, of -log p, one by one."""
    losses = []
    for z, row in zip(logits, labels):
        for t in range(len(row) - 1):
            if row[t + 1] != -100:
                losses.append(np.log(np.exp(z[t] - z[t].max()).sum()) + z[t].max() - z[t, row[t + 1]])
    return np.mean(losses)


@pytest.mark.parametrize("family, changes", [("gpt2", {}), ("llama", {}), ("llama", dict(tie_word_embeddings=True))], ids=str)
def test_loss_is_its_formula(family, changes, device):
    model = randomise(build(family, **changes))
    ids = token_ids(3, 6)
    labels = ids.copy()
    labels[0, 2:4] = labels[2, 0] = -100
    expected = written_out(fetch(model(ids)), labels)
    for given in (labels, labels.tolist(), place(labels), minilora.Tensor(place(labels))):
        assert_close(model.loss(ids, given).item(), expected)
    assert_close(model(ids, labels).item(), expected)
    assert_close(model.loss(place(ids), labels).item(), expected)
    row = [op for op, *_ in engine.ledger(model.loss(ids, labels)).rows]
    assert row[-1] == "LinearCrossEntropy" and "CrossEntropy" not in row


def test_a_replaced_head_takes_part_in_the_loss(device):
    model = randomise(build("llama")).requires_grad(False)
    ids = token_ids(2, 6)
    before = model.loss(ids, ids).item()
    adapt(model, "lm_head")
    loss = model.loss(ids, ids)
    assert_close(loss.item(), written_out(fetch(model(ids)), ids))
    assert abs(loss.item() - before) > 1e-4
    assert [row.op for row in engine.ledger(loss).rows] == ["LoRALinear", "CrossEntropy"]
    loss.backward()
    assert fetch(model.lm_head.lora_A.grad).any()


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, changes", [
    ("gpt2", {}), ("bert", {}), ("llama", {}), ("llama", dict(tie_word_embeddings=True, head_dim=4)),
], ids=str)
@PROOF
def test_gradients(family, changes, device):
    """By the complex step, in every parameter: four directions each, and each element of the small ones."""
    model = randomise(build(family, **{**SMALL[family], **changes, "vocab_size": V}))
    ids, keep = token_ids(2, 5), np.array([[True] * 5, [True] * 3 + [False] * 2])
    labels = np.where(keep, ids, -100)

    def f():
        if family != "bert":
            return model.loss(ids, labels, key_padding=keep)
        h = model(ids, np.array([[0, 0, 1, 1, 1]] * 2), keep)
        return ops.concatenate([ops.reshape(h, (-1,)), ops.reshape(model.pool(h), (-1,))])

    report = gradcheck(f, parameters=model.named_parameters(), full_size=24, directions=4)
    assert report, str(report)
    assert len(report.rows) == len(list(model.parameters()))


def test_gradients_by_central_differences():
    for family in FAMILIES:
        model = randomise(build(family, **SMALL[family])).requires_grad(False)
        path = ADAPTED[family][0]
        adapt(model, path)
        ids = token_ids(2, 5)
        gradcheck(lambda: loss_of(model, ids), parameters=model.named_parameters(), mode="central").check()


# -- with everything frozen but one adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_below_the_first_adapter(family, device):
    model = randomise(build(family)).requires_grad(False)
    path, expected = ADAPTED[family]
    layer = adapt(model, path)
    loss = loss_of(model, token_ids(2, 5))
    ledger = engine.ledger(loss)
    assert sorted(row.op for row in ledger.rows) == sorted(expected.split())
    assert [row.op for row in ledger.rows][0] == "LoRALinear" and [row.op for row in ledger.rows][-1] == expected.split()[-1]
    assert not any(row.nbytes for row in ledger.rows if row.op in ("Linear", "Add"))  # frozen weights need no inputs
    loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == [f"{path}.adapters.default.{name}" for name in ("lora_A", "lora_B")] and fetch(layer.lora_A.grad).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_at_all_is_kept_of_a_frozen_model(family, device):
    model = build(family).requires_grad(False)
    assert model(token_ids(2, 5)).node is None and loss_of(model, token_ids(2, 5)).node is None


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_no_output(family, device):
    model = randomise(build(family))
    layer = adapt(model, ADAPTED[family][0])
    model.eval()
    ids = token_ids(2, 5)
    before = fetch(model(ids))
    layer.merge()
    assert_close(fetch(model(ids)), before, 1e-12)
    layer.unmerge()
    assert fetch(model(ids)).tobytes() == before.tobytes()


def test_a_step_does_not_wait_for_the_device():
    """Ids go up; nothing comes back, and nothing waits."""
    standin.register()
    try:
        with minilora.use("standin"):
            for family in FAMILIES:
                model = build(family, dtype="float32").requires_grad(False)
                adapt(model, ADAPTED[family][0])
                ids = token_ids(2, 5)
                loss_of(model, ids).backward()  # rotary tables are made once
                with standin.counting() as counts:
                    loss_of(model, ids).backward()
                assert counts.syncs == counts.d2h == 0 and counts.h2d <= 3, (family, counts)
    finally:
        minilora.backend.unregister_device("standin")


# -- dropout and training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, changes", [
    ("gpt2", dict(embd_pdrop=0.5)), ("gpt2", dict(resid_pdrop=0.5)), ("bert", dict(hidden_dropout_prob=0.5)),
], ids=str)
def test_dropout(family, changes, device):
    ids = token_ids(2, 5)
    model, same, without = (randomise(build(family, rng=1, **c)) for c in (changes, changes, {}))
    first = fetch(model(ids))
    assert fetch(same(ids)).tobytes() == first.tobytes()  # a function of seed and step
    assert np.abs(fetch(model(ids)) - first).max() > 1e-3
    assert fetch(model.eval()(ids)).tobytes() == fetch(without(ids)).tobytes()


def copies(rng, n):
    """Three tokens, a separator, and the same three again: only the second half can be known."""
    text = rng.integers(2, V, (n, 3))
    return np.concatenate([text, np.ones((n, 1), int), text], axis=1)


def train(model, loss):
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.02)
    rng, losses = np.random.default_rng(0), []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(copies(rng, 32))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def known(model):
    """The loss of what can be known. BERT reads the text from its right: it tells the first token in the place of the last."""
    if isinstance(model, nn.Bert):
        return lambda ids: ops.linear_cross_entropy(model(ids), model.embeddings.word_embeddings.weight, ids[:, ::-1])
    return lambda ids: model.loss(ids, np.where(np.arange(7) >= 4, ids, -100))


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_to_copy(family):
    model = build(family, dtype="float32")
    losses = train(model, known(model))
    assert losses[0] > 2.0 and np.mean(losses[-10:]) < 0.1 * losses[0], losses


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_learn(family):
    """A frozen model, with an update on every linear layer of its blocks."""
    model = build(family, dtype="float32", initializer_range=0.2).requires_grad(False)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path not in ("lm_head", "pooler.dense"):
            adapt(model, path, r=4, lora_alpha=8)
    frozen = {name: a.tobytes() for name, a in model.state_dict().items() if "lora" not in name}
    losses = train(model, known(model))
    assert np.mean(losses[-10:]) < 0.4 * losses[0], losses
    assert frozen == {name: a.tobytes() for name, a in model.state_dict().items() if "lora" not in name}


# -- mistakes --------------------------------------------------------------------------------------------------------------

CONFIG_MISTAKES = [
    (nn.GPT2Config, dict(n_embd=10, n_head=4), ["n_embd must be a multiple of n_head, got 10 and 4"]),
    (nn.GPT2Config, dict(n_layer=0, n_inner=1.5, resid_pdrop=1.0, layer_norm_epsilon=-1.0),
     ["GPT2Config: 4 problems", "n_layer must be an int >= 1, got 0", "n_inner must be an int >= 1, got 1.5",
      "layer_norm_epsilon must be a finite number above 0, got -1.0", "resid_pdrop: dropout", "got 1.0"]),
    (nn.GPT2Config, dict(initializer_range=float("nan")), ["initializer_range", "nan"]),
    (nn.BertConfig, dict(hidden_size=30, num_attention_heads=4), ["hidden_size", "num_attention_heads", "30 and 4"]),
    (nn.BertConfig, dict(pad_token_id=-1), ["pad_token_id must be None or an int in [0, 30522), got -1"]),
    (nn.BertConfig, dict(type_vocab_size="2"), ["type_vocab_size must be an int >= 1, got '2'"]),
    (nn.LlamaConfig, dict(num_attention_heads=8, num_key_value_heads=3), ["8 and 3"]),
    (nn.LlamaConfig, dict(hidden_size=30, num_attention_heads=4), ["30 and 4"]),
    (nn.LlamaConfig, dict(head_dim=5), ["head_dim must be even, got 5"]),
    (nn.LlamaConfig, dict(rope_theta=0), ["rope_theta must be a finite number above 0, got 0"]),
    (nn.LlamaConfig, dict(tie_word_embeddings=1), ["tie_word_embeddings must be True or False, got 1"]),
]


@pytest.mark.parametrize(("config", "settings", "expected"), CONFIG_MISTAKES)
def test_config_mistakes(config, settings, expected):
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert all(text in str(caught.value) for text in expected), caught.value


def test_config_takes_numpy_integers_and_is_frozen():
    config = nn.LlamaConfig(vocab_size=np.int64(9), hidden_size=np.int64(8), num_attention_heads=np.int32(2))
    assert type(config.num_attention_heads) is int and config.heads == (2, 2, 4)
    with pytest.raises(AttributeError):
        config.vocab_size = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mask_is_another_name_of_key_padding(family, device):
    model, ids = randomise(build(family, rng=1)), token_ids(2, 5)
    keep = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = fetch(model(ids, key_padding=keep == 1))
    for mask in (keep, keep.tolist(), keep == 1, place(keep)):
        assert fetch(model(ids, attention_mask=mask)).tobytes() == expected.tobytes()
    assert np.abs(fetch(model(ids)) - expected).max() > 1e-3
    if not isinstance(model, nn.Bert):
        labels = np.where(keep == 1, ids, -100)
        assert model.loss(ids, labels, attention_mask=keep).item() == model.loss(ids, labels, keep == 1).item()
    with pytest.raises(ConfigError, match="two names of one thing"):
        model(ids, key_padding=keep, attention_mask=keep)


def test_positions_of_llama(device):
    model, ids = randomise(build("llama", rng=1, dtype="float64")), token_ids(2, 5)
    expected = fetch(model(ids))
    assert fetch(model(ids, position_ids=np.arange(5))).tobytes() == expected.tobytes()
    assert fetch(model(ids, position_ids=[[0, 1, 2, 3, 4]] * 2)).tobytes() == expected.tobytes()
    assert fetch(model(ids[0], position_ids=[0, 1, 2, 3, 4])).tobytes() == fetch(model(ids[0])).tobytes()
    assert_close(fetch(model(ids, position_ids=np.arange(5) + [[200], [7]])), expected)  # only differences count
    apart = fetch(model(ids, position_ids=[0, 1, 2, 9, 10]))
    assert_close(apart[:, :3], expected[:, :3])
    assert np.abs(apart[:, 3:] - expected[:, 3:]).max() > 1e-3
    assert np.isfinite(model.loss(ids, ids, position_ids=[0, 1, 2, 9, 10]).item())


IDS = np.ones((2, 5), int)
MISTAKES = {
    "token": ("gpt2", OutOfRangeError, "token id 13 at position (0, 1) is out of range: expected 0 to 12",
              lambda m: m([[1, 13]])),
    "floats": ("gpt2", DTypeError, "token ids must be integers, got float64", lambda m: m(np.ones((1, 2)))),
    "no axis": ("llama", ShapeError, "(..., T)", lambda m: m(3)),
    "no token": ("llama", ShapeError, "(2, 0)", lambda m: m(IDS[:, :0])),
    "too long": ("gpt2", ShapeError, "10 tokens, but the model has a vector for 9 positions (n_positions)",
                 lambda m: m(np.ones((1, 10), int))),
    "too long, bert": ("bert", ShapeError, "9 positions (max_position_embeddings)", lambda m: m(np.ones((1, 10), int))),
    "position": ("gpt2", OutOfRangeError, "position 9", lambda m: m([[1, 2]], position_ids=[8, 9])),
    "positions": ("bert", ShapeError, "position_ids (5,) or (2, 5), like the token ids, got (1, 5)",
                  lambda m: m(IDS, position_ids=[[0, 1, 2, 3, 4]])),
    "positions of llama": ("llama", ShapeError, "position_ids (5,) or (2, 5), like the token ids, got (4,)",
                           lambda m: m(IDS, position_ids=[0, 1, 2, 3])),
    "position of llama": ("llama", OutOfRangeError, "position -1", lambda m: m([[1, 2]], position_ids=[-1, 0])),
    "segments": ("bert", ShapeError, "token_type_ids of the shape of the ids, (2, 5), got (5,)", lambda m: m(IDS, [0] * 5)),
    "segment": ("bert", OutOfRangeError, "token type 2", lambda m: m([[1, 1]], [[0, 2]])),
    "padding": ("llama", ShapeError, "(2, 5)", lambda m: m(IDS, key_padding=np.ones((2, 4), bool))),
    "labels": ("gpt2", ShapeError, "labels of the shape of the ids, (2, 5), got (2, 4): give the ids themselves",
               lambda m: m.loss(IDS, IDS[:, 1:])),
    "label": ("gpt2", OutOfRangeError, "label 13", lambda m: m.loss(IDS, IDS * 13)),
    "one token": ("gpt2", ShapeError, "two tokens or more", lambda m: m.loss([[1]], [[1]])),
    "no label": ("llama", ShapeError, "each of the 8 labels is ignore_index -100", lambda m: m.loss(IDS, IDS * 0 - 100)),
    "pooler": ("bert", StateError, "add_pooling_layer=False",
               lambda m: nn.Bert(m.config, add_pooling_layer=False).pool(m(IDS))),
}


@pytest.mark.parametrize(("family", "error", "named", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(family, error, named, call, device):
    with pytest.raises(error) as caught:
        call(build(family, dtype="float32"))
    assert named in str(caught.value)


@pytest.mark.parametrize("family, path, layer", [
    ("gpt2", "h.1.attn.c_proj", "h.1.attn.c_proj"), ("llama", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
    ("bert", "encoder.layer.1.attention.self.key", "encoder.layer.1.attention.self.key"),
])
def test_the_error_names_the_layer(family, path, layer, device):
    model = build(family, dtype="float32")
    *above, name = path.split(".")
    setattr(dict(model.named_modules())[".".join(above)], name, nn.Linear(3, 4))
    with pytest.raises(ShapeError) as caught:
        loss_of(model, IDS)
    assert caught.value.path == layer


def test_a_group_has_no_forward():
    with pytest.raises(TypeError, match="Group has no forward"):
        build("gpt2").h[0].mlp(1)
