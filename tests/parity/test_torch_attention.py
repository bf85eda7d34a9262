"""Attention and rotary embeddings against PyTorch's and transformers', in float64. Run with -m parity."""
import numpy as np
import pytest
from test_torch import assert_close, compare, draw, torch  # noqa: F401  (torch is a fixture)

import minilora
from conftest import fetch, place
from minilora import nn, ops

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def llama(torch):  # noqa: F811
    return pytest.importorskip("transformers.models.llama.modeling_llama")


def heads(T=6, S=6, H=4, KV=4, hd=5):
    return [draw(3, H, T, hd), draw(3, KV, S, hd, seed=1), draw(3, KV, S, hd, seed=2)]


BIAS = draw(3, 4, 6, 9, seed=5)
SEEN = np.random.default_rng(6).random((3, 1, 6, 9)) < 0.6
SEEN[..., 4] = True  # rows that see nothing have a test of their own

# id: shapes, ours, torch's
SETTINGS = {
    "plain": (dict(), {}, {}),
    "more keys": (dict(S=9), {}, {}),
    "causal": (dict(), dict(causal=True), dict(is_causal=True)),
    "numbers": (dict(S=9), dict(mask=BIAS), dict(attn_mask=BIAS)),
    "booleans": (dict(S=9), dict(mask=SEEN), dict(attn_mask=SEEN)),
    "scale": (dict(), dict(scale=0.3, causal=True), dict(scale=0.3, is_causal=True)),
    "grouped": (dict(KV=2), {}, dict(enable_gqa=True)),
    "grouped, causal": (dict(KV=2), dict(causal=True), dict(enable_gqa=True, is_causal=True)),
    "one key head": (dict(KV=1, S=9), dict(mask=BIAS), dict(enable_gqa=True, attn_mask=BIAS)),
    "one query": (dict(T=1), {}, {}),
    "wide": (dict(T=70, S=70, hd=64), dict(causal=True), dict(is_causal=True)),
}


@pytest.mark.parametrize("shapes, ours, theirs", SETTINGS.values(), ids=SETTINGS)
def test_attention(device, torch, shapes, ours, theirs):  # noqa: F811
    ours = {key: place(value) if isinstance(value, np.ndarray) else value for key, value in ours.items()}
    theirs = {key: torch.tensor(value) if isinstance(value, np.ndarray) else value for key, value in theirs.items()}
    compare(torch, lambda q, k, v: ops.attention(q, k, v, **ours),
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, **theirs), heads(**shapes))


def test_causal_with_more_keys_stands_at_the_end(device, torch):  # noqa: F811
    """As a model that continues a text needs it; PyTorch's is_causal aligns the starts, so it gets the mask."""
    mask = torch.tensor(np.tri(6, 9, 3, dtype=bool))
    compare(torch, lambda q, k, v: ops.attention(q, k, v, causal=True),
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), heads(S=9))


def test_a_query_that_sees_nothing(device, torch):  # noqa: F811
    """PyTorch gives zeros there too, in its output and in its gradients."""
    seen = SEEN.copy()
    seen[1, :, 2] = seen[2, :, 5] = False
    compare(torch, lambda q, k, v: ops.attention(q, k, v, mask=place(seen)),
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(seen)), heads(S=9))


def test_packed_attention(device, torch):  # noqa: F811
    def theirs(qkv):
        q, k, v = (part.reshape(3, 6, 4, 5).transpose(1, 2) for part in qkv.split(20, dim=-1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(3, 6, 20)

    compare(torch, lambda qkv: ops.packed_attention(qkv, 4, causal=True), theirs, [draw(3, 6, 60)])


# -- layers ----------------------------------------------------------------------------------------------------------------


def randomised(layer):
    """Biases too: PyTorch starts them at 0."""
    rng = np.random.default_rng(7)
    for p in layer.parameters():
        p.data[...] = place(rng.standard_normal(p.shape))
    return layer


def pairs(torch, layer, other, names):  # noqa: F811
    """Write our parameters into theirs, and pair them: {ours: theirs}."""
    ours, theirs = dict(layer.named_parameters()), dict(other.named_parameters())
    with torch.no_grad():
        for one, two in names.items():
            theirs[two].copy_(torch.tensor(fetch(ours[one])))
    assert set(names.values()) == set(theirs)
    return [(ours[one], theirs[two]) for one, two in names.items()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", ["", "causal", "padding", "mask"])
def test_multihead_attention(device, torch, masked, bias):  # noqa: F811
    """PyTorch packs the three projections; with packed=True so do we."""
    layer = randomised(nn.MultiheadAttention(20, 4, bias=bias, causal=masked == "causal", packed=True, dtype="float64"))
    other = torch.nn.MultiheadAttention(20, 4, bias=bias, batch_first=True, dtype=torch.float64)
    names = {"qkv_proj.weight": "in_proj_weight", "out_proj.weight": "out_proj.weight"}
    if bias:
        names |= {"qkv_proj.bias": "in_proj_bias", "out_proj.bias": "out_proj.bias"}
    ours, theirs = {}, {"need_weights": False}
    if masked == "causal":
        theirs |= {"is_causal": True, "attn_mask": torch.tensor(~np.tri(6, dtype=bool))}
    elif masked == "padding":
        keep = np.random.default_rng(3).random((3, 6)) < 0.6
        keep[:, 2] = True
        ours, theirs = {"key_padding": keep}, theirs | {"key_padding_mask": torch.tensor(~keep)}
    elif masked == "mask":
        ours, theirs = {"mask": draw(6, 6)}, theirs | {"attn_mask": torch.tensor(draw(6, 6))}
    compare(torch, lambda x: layer(x, **ours), lambda x: other(x, x, x, **theirs)[0], [draw(3, 6, 20)],
            pairs(torch, layer, other, names))


def test_multihead_attention_to_other_tokens(device, torch):  # noqa: F811
    layer = randomised(nn.MultiheadAttention(20, 4, dtype="float64"))
    other = torch.nn.MultiheadAttention(20, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            rows = np.concatenate([fetch(getattr(p, kind)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)])
            getattr(other, f"in_proj_{kind}").copy_(torch.tensor(rows))
            getattr(other.out_proj, kind).copy_(torch.tensor(fetch(getattr(layer.out_proj, kind))))
    compare(torch, layer, lambda *x: other(*x, need_weights=False)[0],
            [draw(3, 6, 20), draw(3, 9, 20, seed=1), draw(3, 9, 20, seed=2)],
            [(layer.out_proj.weight, other.out_proj.weight), (layer.out_proj.bias, other.out_proj.bias)])
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    for kind in ("weight", "bias"):
        rows = np.concatenate([fetch(getattr(p, kind).grad) for p in parts])
        assert_close(place(rows), getattr(other, f"in_proj_{kind}").grad, kind)


def test_simple_attention(device, torch):  # noqa: F811
    """The layer of the article, written out in PyTorch."""
    layer = randomised(nn.SimpleAttention(8, dtype="float64"))
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in layer.state_dict().items()}

    def theirs(values, keys, query):
        v, k, q = values @ tensors["values.weight"].T, keys @ tensors["keys.weight"].T, query @ tensors["queries.weight"].T
        y = torch.softmax(q @ k.transpose(-2, -1) / 8 ** 0.5, dim=-1) @ v
        return torch.nn.functional.linear(y, tensors["fc_out.weight"], tensors["fc_out.bias"])

    compare(torch, layer, theirs, [draw(3, 7, 8), draw(3, 7, 8, seed=1), draw(3, 4, 8, seed=2)],
            [(p, tensors[name]) for name, p in layer.named_parameters()])


# -- rotary ----------------------------------------------------------------------------------------------------------------


def both_tables(torch, hd, offset, T, theta=10000.0):  # noqa: F811
    cos, sin = ops.rotary_tables(ops.rotary_frequencies(hd, theta), offset + T, "float64")
    theirs = [torch.tensor(np.tile(fetch(a)[None, offset:], 2)) for a in (cos, sin)]
    return (cos, sin), theirs


@pytest.mark.parametrize("offset", [0, 11])
def test_rotary(device, torch, llama, offset):  # noqa: F811
    ours, theirs = both_tables(torch, 8, offset, 6)
    q, k = draw(3, 4, 6, 8), draw(3, 2, 6, 8, seed=1)
    compare(torch, lambda q: ops.rotary(q, *ours, offset),
            lambda q: llama.apply_rotary_pos_emb(q, torch.tensor(k), *theirs)[0], [q])
    compare(torch, lambda k: ops.rotary(k, *ours, offset),
            lambda k: llama.apply_rotary_pos_emb(torch.tensor(q), k, *theirs)[1], [k])


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_tables(device, torch, llama, theta):  # noqa: F811
    """Transformers computes the angles in float32, so that they are off by the angle's own rounding."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, 300, 16), torch.arange(300)[None])
    for own, other in zip(ops.rotary_tables(ops.rotary_frequencies(16, theta), 300), (cos, sin)):
        np.testing.assert_allclose(np.tile(fetch(own), 2), other[0].numpy(), atol=300 * 1.2e-7)


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_llama_attention(device, torch, llama, kv):  # noqa: F811
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=kv, attn_implementation="sdpa")
    other = llama.LlamaAttention(config, 0).double().eval()
    layer = randomised(nn.MultiheadAttention(32, 4, kv, bias=False, causal=True, rotary=nn.RotaryEmbedding(8), dtype="float64"))
    names = {f"{p}_proj.weight": f"{p}_proj.weight" for p in "qkv"} | {"out_proj.weight": "o_proj.weight"}
    _, theirs = both_tables(torch, 8, 0, 6)
    mask = torch.tensor(np.where(np.tri(6, dtype=bool), 0.0, -np.inf))[None, None]
    compare(torch, layer, lambda x: other(x, position_embeddings=theirs, attention_mask=mask)[0], [draw(3, 6, 32)],
            pairs(torch, layer, other, names))


def test_gpt2_attention(device, torch):  # noqa: F811
    """Transformers keeps GPT-2's weights as (in, out)."""
    transformers = pytest.importorskip("transformers")
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = transformers.GPT2Config(n_embd=20, n_head=4, attn_implementation="sdpa", attn_pdrop=0.0, resid_pdrop=0.0)
    other = gpt2.GPT2Attention(config, layer_idx=0).double()
    layer = randomised(nn.MultiheadAttention(20, 4, causal=True, packed=True, dtype="float64"))
    with torch.no_grad():
        for ours, theirs in ((layer.qkv_proj, other.c_attn), (layer.out_proj, other.c_proj)):
            theirs.weight.copy_(torch.tensor(fetch(ours.weight)).T)
            theirs.bias.copy_(torch.tensor(fetch(ours.bias)))
    compare(torch, layer, lambda x: other(x)[0], [draw(3, 6, 20)],
            [(layer.qkv_proj.bias, other.c_attn.bias), (layer.out_proj.bias, other.c_proj.bias)])
    assert_close(layer.qkv_proj.weight.grad, other.c_attn.weight.grad.T, "c_attn")
    assert_close(layer.out_proj.weight.grad, other.c_proj.weight.grad.T, "c_proj")


def test_single_precision(device, torch):  # noqa: F811
    """Half of the digits of float32 at least, at the size of GPT-2."""
    arrays = [draw(2, 12, 128, 64, seed=i).astype("float32") for i in range(3)]
    y = fetch(ops.attention(*map(minilora.Tensor, map(place, arrays)), causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, arrays), is_causal=True).numpy()
    np.testing.assert_allclose(y, expected, atol=2e-6)
