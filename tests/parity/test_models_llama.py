"""The Llama family against transformers' in float64, everything of theirs included: hidden states, logits, loss, gradients."""
import numpy as np
import pytest
from in_double import import_transformers, in_double
from test_torch import torch  # noqa: F401  (a fixture)
from tiny_transformers import D, F, V, randomise, token_ids

from conftest import fetch
from minilora import models, ops

pytestmark = pytest.mark.parity

T = 9
TINY = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16)
CONFIGS = {"llama": models.LlamaConfig, "mistral": models.MistralConfig, "qwen2": models.Qwen2Config,
           "qwen3": models.Qwen3Config}
THEIRS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
CASES = {
    "llama": ("llama", {}),
    "llama, all heads": ("llama", dict(num_key_value_heads=4, rms_norm_eps=0.1)),
    "llama, one key head": ("llama", dict(num_key_value_heads=1, head_dim=6, rope_theta=500.0)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True, pad_token_id=3)),
    "llama, linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama, dynamic, short": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "llama, dynamic, long": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=5)),
    "llama, llama3": ("llama", dict(rope_scaling=LLAMA3, max_position_embeddings=64, rope_theta=500.0)),
    "llama, llama3, wide": ("llama", dict(rope_scaling={**LLAMA3, "original_max_position_embeddings": 32}, head_dim=64,
                                          max_position_embeddings=64, rope_theta=50.0)),
    "llama, yarn": ("llama", dict(rope_scaling=YARN, head_dim=32)),
    "llama, yarn, a step": ("llama", dict(rope_scaling={**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False})),
    "llama, yarn, its own ramp": ("llama", dict(
        rope_scaling={**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}, head_dim=32, rope_theta=50.0)),
    "llama, yarn, a factor": ("llama", dict(rope_scaling={**YARN, "attention_factor": 0.7}, head_dim=16)),
    "llama, yarn, mscale": ("llama", dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, head_dim=16)),
    "llama, yarn, one mscale": ("llama", dict(rope_scaling={**YARN, "mscale": 0.7}, head_dim=16)),
    "llama, yarn from the length": ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=2.0), max_position_embeddings=64)),
    "mistral": ("mistral", dict(sliding_window=4)),
    "mistral, window of two": ("mistral", dict(sliding_window=2)),
    "mistral, long window": ("mistral", dict(sliding_window=T)),
    "mistral, no window": ("mistral", dict(sliding_window=None, head_dim=6)),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)),
    "qwen2, yarn": ("qwen2", dict(rope_scaling=YARN)),
    "qwen3": ("qwen3", dict(head_dim=6)),
    "qwen3, biases, tied": ("qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=0.1)),
    "qwen3, window": ("qwen3", dict(head_dim=8, use_sliding_window=True, sliding_window=3,
                                    layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
}
PADDINGS = {
    "none": None,
    "right": np.arange(T) < np.array([[T], [5]]),
    "left": np.arange(T) >= np.array([[4], [0]]),
}


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    return import_transformers()


def theirs_of(config, family, torch, transformers):  # noqa: F811
    """transformers' model of a config of ours."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("rope_") and value is not None}
    for name in ("sliding_window", "layer_types"):  # None means something there
        if hasattr(config, name):
            value = getattr(config, name)
            fields[name] = list(value) if isinstance(value, tuple) else value
    fields["rope_parameters"] = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    made = getattr(transformers, THEIRS[family] + "Config")(**fields, attn_implementation="eager")
    return getattr(transformers, THEIRS[family] + "ForCausalLM")(made).eval()


def both(family, torch, transformers, dtype="float64", **changes):  # noqa: F811
    """Two models with the same random weights, and the pairs of their parameters."""
    config = CONFIGS[family](**{**TINY, **changes})
    own = randomise(models.Llama(config, dtype=dtype, rng=0))
    other = theirs_of(config, family, torch, transformers)
    theirs = dict(other.named_parameters())
    assert set(own.state_dict()) == set(theirs)
    with torch.no_grad():
        for name, value in own.state_dict().items():
            theirs[name].copy_(torch.tensor(value))
    return own, other, theirs


def relative(got, expected):
    got, expected = fetch(got), expected.detach().numpy() if hasattr(expected, "detach") else expected
    assert got.shape == expected.shape
    return np.abs(got - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30)


def states_of(own, ids, keep):
    """The hidden states before every layer, and after the last norm."""
    body = own.model
    states = [body.embed_tokens(ids)]
    for layer in body.layers:
        states.append(layer(states[-1], keep))
    return [*states[:-1], body.norm(states[-1])]


def compare(family, changes, padding, torch, transformers, dtype, tol):  # noqa: F811
    own, other, theirs = both(family, torch, transformers, dtype, **changes)
    ids, keep = token_ids(2, T), PADDINGS[padding]
    labels = ids.copy()
    labels[0, 3] = -100
    if keep is not None:
        labels[~keep] = -100
        labels[:, 1:][~keep[:, :-1]] = -100  # what padding predicts, nobody reads
    seen = np.ones_like(ids, bool) if keep is None else keep
    mask = None if keep is None else torch.tensor(keep.astype("int64"))
    result = other(input_ids=torch.tensor(ids), attention_mask=mask, output_hidden_states=True)
    for ours, state in zip(states_of(own, ids, keep), result.hidden_states, strict=True):
        assert relative(fetch(ours)[seen], state[torch.tensor(seen)]) < tol
    assert relative(fetch(own(ids, key_padding=keep))[seen], result.logits[torch.tensor(seen)]) < tol
    expected = torch.nn.functional.cross_entropy(result.logits[:, :-1].reshape(-1, V), torch.tensor(labels)[:, 1:].reshape(-1))
    loss = own.loss(ids, labels, key_padding=keep)
    assert relative(loss, expected) < tol
    expected.backward()
    loss.backward()
    for name, p in own.named_parameters():
        assert relative(p.grad, theirs[name].grad) < tol, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("case", CASES)
def test_double(case, padding, torch, transformers):  # noqa: F811
    with in_double(torch):
        compare(*CASES[case], padding, torch, transformers, "float64", 1e-10)


@pytest.mark.parametrize("case", ["llama", "llama, yarn", "mistral", "qwen2", "qwen3"])
def test_single(case, torch, transformers):  # noqa: F811
    compare(*CASES[case], "left", torch, transformers, "float32", 1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_theirs(family, torch, transformers):  # noqa: F811
    """Every field, but for the dropout that is not there."""
    theirs, own = getattr(transformers, THEIRS[family] + "Config")(), CONFIGS[family]()
    for name, value in vars(own).items():
        if name not in ("rope_scaling", "rope_theta", "layer_types", "head_dim", "num_key_value_heads", "sliding_window",
                        "classifier_dropout"):  # compared below, or not there (0.1 then)
            assert getattr(theirs, name) == value, name
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == own.heads[:2]
    assert (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads) == own.heads[2]
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": own.rope_theta}
    kinds = getattr(theirs, "layer_types", None)
    if family == "mistral":
        assert own.windows == (theirs.sliding_window,) * theirs.num_hidden_layers
    else:
        assert set(own.windows) == {None} and (kinds is None or set(kinds) == {"full_attention"})
    if family.startswith("qwen"):
        assert own.sliding_window == 4096


def test_dynamic_frequencies_follow_the_last_position(torch, transformers):  # noqa: F811
    """With positions given it is the largest of them that counts, and a later, shorter call is turned by its own length."""
    with in_double(torch):
        own, other, _ = both("llama", torch, transformers, rope_scaling=dict(rope_type="dynamic", factor=2.0),
                             max_position_embeddings=5)
        ids = token_ids(1, 4)
        for places in ([0, 3, 4, 11], [0, 1, 2, 3], [0, 0, 1, 7]):
            theirs = other(input_ids=torch.tensor(ids), position_ids=torch.tensor([places]),
                           attention_mask=torch.ones(1, 4, dtype=torch.int64)).logits
            assert relative(own(ids, position_ids=places), theirs) < 1e-10


@pytest.mark.parametrize("name", sorted({name for name, (_, changes) in CASES.items() if "rope_scaling" in changes}))
def test_frequencies(name, torch, transformers):  # noqa: F811
    """Wide heads, as models have them: 128 numbers, theta 500,000."""
    family, changes = CASES[name]
    config = CONFIGS[family](**{**TINY, **changes, "head_dim": None, "hidden_size": 512, "rope_theta": 500_000.0})
    with in_double(torch):
        rotary = theirs_of(config, family, torch, transformers).model.rotary_emb
    ours, factor = ops.scaled_rotary_frequencies(128, 500_000.0, config.rope_scaling, config.max_position_embeddings)
    np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=1e-13)
    assert abs(factor - rotary.attention_scaling) < 1e-15


# -- files -----------------------------------------------------------------------------------------------------------------

KINDS = {"Model": "hidden", "ForCausalLM": "next", "ForSequenceClassification": "text", "ForTokenClassification": "tokens"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama, biases", "llama, tied", "llama, llama3, wide", "llama, yarn, mscale",
                                  "llama, dynamic, long", "mistral", "qwen2, window", "qwen3, window", "qwen3, biases, tied"])
def test_files_of_theirs_and_ours(case, kind, tmp_path, torch, transformers):  # noqa: F811
    """What they saved gives their numbers here; what was saved from that gives them there."""
    family, changes = CASES[case]
    with in_double(torch):
        made = theirs_of(CONFIGS[family](**{**TINY, **changes}), family, torch, transformers).config
        made.num_labels, made.pad_token_id = 3, changes.get("pad_token_id", 0)
        other = getattr(transformers, THEIRS[family] + kind)(made).eval()
        rng = np.random.default_rng(3)
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(torch.tensor(rng.normal(float("norm" in name), 0.3, tuple(p.shape))))
        other.save_pretrained(tmp_path / "theirs")
        own = models.load(tmp_path / "theirs")
        assert not [note for note in own.origin.notes if "dropout" not in note], own.origin.notes
        ids, keep = token_ids(2, T), PADDINGS["right"]
        ids = np.where(keep, ids, made.pad_token_id)
        models.save(own, tmp_path / "ours")
        back, told = type(other).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
        for model in (other, back.eval()):
            result = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(keep.astype("int64")))
            expected = result.last_hidden_state if kind == "Model" else result.logits
            ours = fetch(own(ids, key_padding=keep))
            if KINDS[kind] != "text":
                ours, expected = ours[keep], expected[torch.tensor(keep)]
            assert relative(ours, expected) < 1e-10
        mine, other_state = models.load(tmp_path / "ours").state_dict(), back.state_dict()
        assert {name: a.tobytes() for name, a in mine.items()} == {name: a.tobytes() for name, a in own.state_dict().items()}
        assert set(mine) <= set(other_state)
