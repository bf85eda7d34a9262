"""DeBERTa-v2 and v3 against transformers' in float64: hidden states of every layer, and gradients under random cotangents."""
import itertools

import numpy as np
import pytest
from in_double import import_transformers, in_double
from test_torch import torch  # noqa: F401  (a fixture)
from tiny_transformers import D, F, V, randomise, token_ids

from conftest import fetch, place
from minilora import models, ops

pytestmark = pytest.mark.parity

T = 11
TINY = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=F,
            max_position_embeddings=16, layer_norm_eps=1e-7)
V3 = dict(relative_attention=True, position_buckets=8, max_relative_positions=-1, pos_att_type=("p2c", "c2p"),
          share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)
CASES = {
    "v3": V3,
    "own projections": {**V3, "share_att_key": False},
    "few buckets": {**V3, "position_buckets": 4, "max_relative_positions": 6},
    "fewer than tokens": {**V3, "position_buckets": 6, "max_relative_positions": 5},
    "no buckets": {**V3, "position_buckets": -1, "max_relative_positions": 4},
    "no buckets, far": {**V3, "position_buckets": -1, "norm_rel_ebd": "none"},
    "v2-xlarge": {**V3, "conv_kernel_size": 3, "conv_act": "gelu"},
    "convolution in groups": {**V3, "conv_kernel_size": 5, "conv_groups": 4},
    "positions and segments": {**V3, "position_biased_input": True, "type_vocab_size": 2},
    "no distances": dict(pos_att_type=("c2p",)),
    "no distances, no terms": {},
    "another activation": {**V3, "hidden_act": "gelu_new", "pad_token_id": None, "layer_norm_eps": 0.1},
}
for number, terms in itertools.product(range(3), ((), ("c2p",), ("p2c",))):
    CASES[f"terms {'|'.join(terms) or 'none'} {number}"] = {
        **V3, "pos_att_type": terms, "share_att_key": number == 1, "position_buckets": (4, 8, -1)[number],
        "max_relative_positions": (6, 16, 3)[number]}
PADDINGS = {
    "none": None,
    "right": np.arange(T) < np.array([[T], [5]]),
    "left": np.arange(T) >= np.array([[4], [0]]),
}


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    return import_transformers()


def fields_of(config):
    """The fields of transformers' config: dropout off."""
    fields = {**vars(config), "pos_att_type": list(config.pos_att_type), "attention_probs_dropout_prob": 0.0}
    return {name: value for name, value in fields.items() if value is not None or name == "pad_token_id"}


def copied(own, other, torch):  # noqa: F811
    """transformers' parameters by name, with our numbers in them."""
    theirs = dict(other.named_parameters())
    assert set(theirs) == {name for name, _ in own.named_parameters()}
    with torch.no_grad():
        for name, p in own.named_parameters():
            theirs[name].copy_(torch.tensor(fetch(p.data)))
    return theirs


def relative(got, expected):
    got, expected = fetch(got), expected.detach().numpy() if hasattr(expected, "detach") else expected
    assert got.shape == expected.shape
    return np.abs(got - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30)


def compare_gradients(own, theirs, tol):
    largest = max(np.abs(fetch(p.grad)).max() for p in own.parameters() if p.grad is not None)
    for name, p in own.named_parameters():
        ours, gradient = fetch(p.grad) if p.grad is not None else np.zeros(p.shape), theirs[name].grad
        gradient = np.zeros(p.shape) if gradient is None else gradient.numpy()
        # What moves all keys (of distances) alike moves all scores of a query alike: its gradient is 0, to rounding
        alike = name.endswith(("key_proj.bias", "encoder.LayerNorm.bias"))
        floor = 0.1 * tol * largest if alike else 0.0
        if max(np.abs(ours).max(), np.abs(gradient).max()) > floor:
            assert relative(ours, gradient) < tol, name


def compare(changes, padding, torch, transformers, dtype, tol):  # noqa: F811
    config = models.DebertaV2Config(**{**TINY, **changes})
    own = randomise(models.DebertaV2(config, dtype=dtype, rng=0))
    other = transformers.DebertaV2Model(transformers.DebertaV2Config(**fields_of(config))).eval()
    theirs = copied(own, other, torch)
    ids, keep = token_ids(2, T), PADDINGS[padding]
    ids[1, 5] = 0
    segments = np.random.default_rng(2).integers(0, 2, ids.shape)
    seen = np.ones_like(ids, bool) if keep is None else keep
    result = other(input_ids=torch.tensor(ids), token_type_ids=torch.tensor(segments), output_hidden_states=True,
                   attention_mask=None if keep is None else torch.tensor(keep.astype("int64")))
    h = own(ids, segments, keep)
    assert relative(fetch(h)[seen], result.last_hidden_state[torch.tensor(seen)]) < tol
    dy = np.random.default_rng(5).standard_normal(h.shape).astype(dtype) * seen[..., None]
    ops.sum(h * place(dy)).backward()
    (result.last_hidden_state * torch.tensor(dy)).sum().backward()
    compare_gradients(own, theirs, tol)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES)
def test_double(case, padding, torch, transformers):  # noqa: F811
    with in_double(torch):
        compare(CASES[case], padding, torch, transformers, "float64", 1e-10)


@pytest.mark.parametrize("case", ["v3", "own projections", "v2-xlarge"])
def test_single(case, torch, transformers):  # noqa: F811
    compare(CASES[case], "right", torch, transformers, "float32", 1e-5)


@pytest.mark.parametrize("span, limit", [
    (256, 512), (512, None), (16, None), (4, 8), (6, 9), (8, 16), (32, 64), (2, 4), (3, 7), (48, 128), (100, 300), (16, 512),
    (128, 512), (64, 128), (256, 300)], ids=str)
def test_buckets(span, limit, torch, transformers):  # noqa: F811
    """For every distance of 2,000 tokens; both terms of theirs."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    for tokens in (1, 40, 2000):
        x = torch.zeros(1, tokens, 1)
        theirs = build_relative_position(x, x, -1 if limit is None else span, limit or span)[0].numpy()
        places = np.arange(tokens)
        ours = ops.distance_buckets(tokens, span, limit)[places[:, None] - places + tokens - 1]
        np.testing.assert_array_equal(ours, np.clip(theirs + span, 0, 2 * span - 1))
        np.testing.assert_array_equal(ours.T, np.clip(-theirs + span, 0, 2 * span - 1))


def test_defaults_are_theirs(torch, transformers):  # noqa: F811
    theirs, own = transformers.DebertaV2Config(), models.DebertaV2Config()
    not_there = dict(position_buckets=-1, share_att_key=False, norm_rel_ebd="none", conv_kernel_size=0, conv_groups=1,
                     conv_act="tanh", cls_dropout=None)  # fields of config.json that are in no class
    for name, value in vars(own).items():
        if name in not_there:
            assert value == not_there[name] and not hasattr(theirs, name), name
        elif name == "hidden_dropout_prob":
            assert (value, theirs.hidden_dropout_prob) == (0.0, 0.1)
        else:
            assert (getattr(theirs, name) or ()) == value or getattr(theirs, name) == value, name


# -- heads and files -------------------------------------------------------------------------------------------------------

HEADS = {"Model": "hidden", "ForMaskedLM": "masked", "ForSequenceClassification": "text", "ForTokenClassification": "tokens"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("case", ["v3", "own projections", "v2-xlarge", "no buckets", "positions and segments", "no distances",
                                  "new head"])
def test_heads_and_files(case, kind, tmp_path, torch, transformers):  # noqa: F811
    """What they saved gives their numbers and gradients here; what was saved from that gives them there."""
    changes = {**V3, "legacy": False} if case == "new head" else CASES[case]
    with in_double(torch):
        config = models.DebertaV2Config(**{**TINY, **changes, "cls_dropout": 0.0})
        made = transformers.DebertaV2Config(**fields_of(config), num_labels=3)
        other = getattr(transformers, f"DebertaV2{kind}")(made).eval()
        rng = np.random.default_rng(3)
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(torch.tensor(rng.normal(float("Norm.weight" in name), 0.3, tuple(p.shape))))
        other.save_pretrained(tmp_path / "theirs")
        own = models.load(tmp_path / "theirs")
        assert not own.origin.notes
        ids, keep = token_ids(2, T), PADDINGS["right"]
        ids = np.where(keep, ids, 0)
        labels = {"text": np.array([2, 0]), "masked": np.where(keep & (ids > 4), ids, -100),
                  "tokens": np.where(keep, ids % 3, -100)}.get(HEADS[kind])
        models.save(own, tmp_path / "ours")
        back, told = type(other).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
        ours = fetch(own(ids, key_padding=keep))
        ours = ours if kind == "ForSequenceClassification" else ours[keep]
        for model in (back.eval(), other):
            result = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(keep.astype("int64")))
            expected = result.last_hidden_state if kind == "Model" else result.logits
            seen = expected if kind == "ForSequenceClassification" else expected[torch.tensor(keep)]
            assert relative(ours, seen) < 1e-10
        if labels is None:
            return
        loss = own(ids, labels, keep)
        theirs = torch.nn.functional.cross_entropy(expected.reshape(-1, expected.shape[-1]), torch.tensor(labels).reshape(-1))
        assert relative(loss, theirs) < 1e-10
        loss.backward()
        theirs.backward()
        compare_gradients(own, dict(other.named_parameters()), 1e-10)
