"""Whole models against transformers' in float64: outputs, losses and all gradients. Run with -m parity.

Three places of transformers compute in float32 whatever the model's dtype is: Llama's norm, its rotary angles, and the loss
of both language models. The norm is replaced by torch's own, the angles by ours (which have a test of their own), and the
loss is written out; its float32 form is compared too, to its precision.
"""
import warnings

import numpy as np
import pytest
from test_torch import assert_close, draw, torch  # noqa: F401  (torch is a fixture)
from tiny_transformers import D, V, build, names, randomise, token_ids

from conftest import fetch, place
from minilora import ops

pytestmark = pytest.mark.parity

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own imports
        return pytest.importorskip("transformers")


def gpt2(torch, transformers, config):  # noqa: F811
    own = {**vars(config), "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**own, attn_implementation="sdpa")).double()


def bert(torch, transformers, config):  # noqa: F811
    own = {**vars(config), "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(**own, attn_implementation="sdpa")).double()


def llama(torch, transformers, config):  # noqa: F811
    own = {name: value for name, value in vars(config).items() if name != "rope_theta" and value is not None}
    own["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**own, attn_implementation="sdpa")).double()
    cos, sin = ops.rotary_tables(ops.rotary_frequencies(config.heads[2], config.rope_theta), 64, "float64", "cpu")

    class Angles(torch.nn.Module):
        def forward(self, x, position_ids):
            return tuple(torch.tensor(np.tile(a, 2))[position_ids] for a in (cos, sin))

    def norm():
        return torch.nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=torch.float64)

    model.model.rotary_emb, model.model.norm = Angles(), norm()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
    return model


MAKERS = {"gpt2": gpt2, "bert": bert, "llama": llama}


def both(family, torch, transformers, **changes):  # noqa: F811
    """Two models with the same random weights, and the pairs of their parameters."""
    own = randomise(build(family, **changes))
    other = MAKERS[family](torch, transformers, own.config).eval()
    theirs = dict(other.named_parameters())
    table = {ours: name for ours, (name, _) in names(family).items() if name in theirs}
    assert set(table) == set(own.state_dict()) and set(table.values()) == set(theirs)
    with torch.no_grad():
        for name, value in own.state_dict().items():
            theirs[table[name]].copy_(torch.tensor(value.T if family == "gpt2" and name.endswith(TRANSPOSED) else value))
    return own, other, [(name, p, theirs[table[name]]) for name, p in own.named_parameters()]


def compare_gradients(family, parameters):
    own = {name: fetch(p.grad) for name, p, _ in parameters}
    for name, ours, theirs in parameters:
        gradient = theirs.grad.T if family == "gpt2" and name.endswith(TRANSPOSED) else theirs.grad
        if name.endswith("key.bias"):  # it moves all scores of a query alike, so that the softmax does not: 0, to rounding
            largest = max(np.abs(own[name]).max(), gradient.abs().max().item())
            assert largest < 1e-13 * np.abs(own[name.replace("key", "query")]).max(), name
        else:
            assert_close(ours.grad, gradient, name)


PADDINGS = {
    "none": None,
    "right": np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool),
    "left": np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool),
}


def causal(torch, other, ids, labels, keep, **more):  # noqa: F811
    mask = None if keep is None else torch.tensor(keep.astype("int64"))
    result = other(input_ids=torch.tensor(ids), labels=torch.tensor(labels), attention_mask=mask, **more)
    loss = torch.nn.functional.cross_entropy(result.logits[:, :-1].reshape(-1, V), torch.tensor(labels)[:, 1:].reshape(-1))
    np.testing.assert_allclose(loss.item(), result.loss.item(), rtol=1e-6)  # theirs, in float32
    return result.logits, loss


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family, changes", [
    ("gpt2", {}), ("gpt2", dict(n_inner=None, layer_norm_epsilon=0.1)),
    ("llama", {}), ("llama", dict(num_key_value_heads=None, head_dim=6, rms_norm_eps=0.1, rope_theta=500.0)),
    ("llama", dict(tie_word_embeddings=True)),
], ids=str)
def test_language_model(family, changes, padding, device, torch, transformers):  # noqa: F811
    own, other, parameters = both(family, torch, transformers, **changes)
    ids, keep = token_ids(2, 7), PADDINGS[padding]
    labels = ids.copy()
    labels[0, 3] = -100
    more = {}
    if keep is not None:
        labels[~keep] = -100
        if family == "gpt2":
            more["position_ids"] = np.maximum(keep.cumsum(axis=1) - 1, 0)
    theirs = {key: torch.tensor(value) for key, value in more.items()}
    logits, loss = causal(torch, other, ids, labels, keep, **theirs)
    seen = np.ones_like(ids, bool) if keep is None else keep  # of padding, transformers gives other numbers, which nobody reads
    ours = fetch(own(ids, key_padding=keep, **more))
    assert_close(place(ours[seen]), logits[torch.tensor(seen)], "logits")
    mine = own.loss(ids, labels, key_padding=keep, **more)
    assert_close(mine, loss, "loss", 1e-12)
    loss.backward()
    mine.backward()
    compare_gradients(family, parameters)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_and_their_gradients(family, device, torch, transformers):  # noqa: F811
    """Under a random cotangent of all logits: nothing cancels as in a loss."""
    own, other, parameters = both(family, torch, transformers)
    ids, dy = token_ids(2, 7), draw(2, 7, V, seed=5)
    y, theirs = own(ids), other(input_ids=torch.tensor(ids)).logits
    assert_close(y, theirs, "logits")
    y.backward(place(dy))
    theirs.backward(torch.tensor(dy))
    compare_gradients(family, parameters)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_bert(padding, segments, device, torch, transformers):  # noqa: F811
    """Hidden states and pooled vector, both under random cotangents. The ids hold the padding id, whose row is not trained."""
    own, other, parameters = both("bert", torch, transformers, layer_norm_eps=0.1 if segments else 1e-12)
    ids, keep = token_ids(2, 7), PADDINGS[padding]
    ids[1, 5] = 0
    types = np.random.default_rng(2).integers(0, 2, ids.shape) if segments else None
    dh, dp = draw(2, 7, D, seed=5), draw(2, D, seed=6)
    if keep is not None:
        dh *= keep[..., None]
    result = other(input_ids=torch.tensor(ids), token_type_ids=None if types is None else torch.tensor(types),
                   attention_mask=None if keep is None else torch.tensor(keep.astype("int64")))
    h = own(ids, types, keep)
    pooled = own.pool(h)
    seen = np.ones_like(ids, bool) if keep is None else keep
    assert_close(place(fetch(h)[seen]), result.last_hidden_state[torch.tensor(seen)], "hidden")
    assert_close(pooled, result.pooler_output, "pooled")
    loss = ops.sum(h * place(dh)) + ops.sum(pooled * place(dp))
    other_loss = (result.last_hidden_state * torch.tensor(dh)).sum() + (result.pooler_output * torch.tensor(dp)).sum()
    assert_close(loss, other_loss, "loss", 1e-12)
    loss.backward()
    other_loss.backward()
    compare_gradients("bert", parameters)
    assert not fetch(own.embeddings.word_embeddings.weight.grad)[0].any()


@pytest.mark.parametrize("family", MAKERS)
def test_weights_start_alike(family, torch, transformers):  # noqa: F811
    """The same standard deviations and constants; not the same numbers."""
    large = {"gpt2": dict(n_embd=256, vocab_size=300, n_positions=64), "bert": dict(hidden_size=256, vocab_size=300),
             "llama": dict(hidden_size=256, vocab_size=300)}[family]
    own = build(family, **large)
    other = dict(MAKERS[family](torch, transformers, own.config).named_parameters())
    for name, p in own.named_parameters():
        ours, theirs = fetch(p.data), other[names(family)[name][0]].detach().numpy()
        assert abs(ours.mean() - theirs.mean()) < 0.002, name
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.15, atol=1e-12, err_msg=name)
