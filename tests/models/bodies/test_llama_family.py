"""Llama, Mistral, Qwen2 and Qwen3: names, windows, norms of heads, kinds of rope, files, stored numbers, adapters."""
import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
from conftest import fetch, place
from stored_models import FOR_FILES, assert_stored, folder_of

import minilora
from minilora import lora, models, nn, ops, optim
from minilora.errors import ConfigError, FormatError
from minilora.testing import gradcheck

V, T = 13, 9
TINY = dict(vocab_size=V, hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
FAMILY = {
    "llama": models.LlamaConfig(**TINY, rope_scaling=LLAMA3),
    "llama with biases": models.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "mistral": models.MistralConfig(**TINY, sliding_window=4),
    "qwen2": models.Qwen2Config(**{**TINY, "head_dim": None, "hidden_size": 16}, use_sliding_window=True, sliding_window=3,
                                max_window_layers=1),
    "qwen3": models.Qwen3Config(**TINY, attention_bias=True, tie_word_embeddings=True),
}
ARCHITECTURES = [name for name in FOR_FILES if not name.startswith("Deberta")]


def ids_of(*shape, seed=1):
    return np.random.default_rng(seed).integers(1, V, shape)


def drawn(config, dtype="float64", kind=models.Llama, *more):
    """A model whose every parameter counts."""
    model, rng = kind(config, *more, dtype=dtype, rng=0), np.random.default_rng(7)
    for name, p in model.named_parameters():
        p.data = place(rng.normal(float("norm" in name), 0.3, p.shape), dtype)
    return model


def close(got, expected, tol=1e-12):
    np.testing.assert_allclose(fetch(got), fetch(expected), rtol=0, atol=tol * max(1.0, np.abs(fetch(expected)).max()))


# -- what the members have ----------------------------------------------------------------------------------------------


def test_names_of_the_members():
    common = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    qkv = {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    expected = {"llama": common, "llama with biases": common | qkv | {"o_proj.bias"}, "mistral": common, "qwen2": common | qkv,
                "qwen3": common | qkv | {"o_proj.bias", "q_norm.weight", "k_norm.weight"}}
    for name, config in FAMILY.items():
        own = {path for path, _ in models.Llama(config, rng=0).named_parameters()}
        start = "model.layers.1.self_attn."
        assert {path.removeprefix(start) for path in own if path.startswith(start)} == expected[name], name
        assert ("lm_head.weight" in own) == (name != "qwen3")
        assert ("model.layers.0.mlp.down_proj.bias" in own) == (name == "llama with biases")


def test_windows_of_the_members():
    assert models.LlamaConfig().windows == (None,) * 32
    assert models.MistralConfig(num_hidden_layers=2, sliding_window=None).windows == (None, None)
    qwen = dict(num_hidden_layers=3, sliding_window=8)
    assert models.Qwen2Config(**qwen, max_window_layers=0).windows == (None,) * 3
    assert models.Qwen3Config(**qwen, use_sliding_window=True, max_window_layers=2).windows == (None, None, 8)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert models.Qwen2Config(**qwen, use_sliding_window=True, layer_types=kinds).windows == (8, None, None)
    assert models.Qwen2Config(**qwen, layer_types=kinds).windows == (None,) * 3


@pytest.mark.parametrize("name", FAMILY)
def test_configs_are_values(name):
    config = FAMILY[name]
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == type(config)(**vars(config))
    assert hash(config) == hash(dataclasses.replace(config)) and config != dataclasses.replace(config, rms_norm_eps=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


MISTAKES = {
    "kind": (models.LlamaConfig, dict(rope_scaling={"rope_type": "longrope", "factor": 2.0}), ["'longrope' is not offered"]),
    "old and new name": (models.LlamaConfig, dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), [
        "disagree"]),
    "fields": (models.LlamaConfig, dict(rope_scaling={"type": "linear", "beta_fast": 2.0}), [
        "2 problems", "factor is missing", "'beta_fast' is unknown"]),
    "factor": (models.LlamaConfig, dict(rope_scaling={"type": "dynamic", "factor": 0.5}), [
        "factor must be a number in [1, 1e+06]"]),
    "ramp": (models.LlamaConfig, dict(rope_scaling={**LLAMA3, "high_freq_factor": 1.0}), ["high_freq_factor must be above"]),
    "no mapping": (models.LlamaConfig, dict(rope_scaling="linear"), ["expected a mapping"]),
    "infinite": (models.LlamaConfig, dict(rope_scaling={"type": "linear", "factor": float("inf")}), ["factor"]),
    "theta 1": (models.LlamaConfig, dict(rope_theta=1.0, rope_scaling={"type": "yarn", "factor": 2.0}), ["theta above 1"]),
    "two numbers a head": (models.LlamaConfig, dict(head_dim=2, rope_scaling={"type": "dynamic", "factor": 2.0}), [
        "head_dim of 4"]),
    "window": (models.MistralConfig, dict(sliding_window=0), ["sliding_window must be an int >= 1, got 0"]),
    "layer types": (models.Qwen2Config, dict(layer_types=["full_attention"]), ["each of 32 layers, got 1"]),
    "strange layers": (models.Qwen2Config, dict(layer_types=["linear"] * 32), ["among them linear"]),
    "head_dim": (models.Qwen2Config, dict(head_dim=8), ["is it a Qwen3"]),
    "bias": (models.LlamaConfig, dict(attention_bias=1), ["attention_bias must be True or False, got 1"]),
    "activation": (models.LlamaConfig, dict(hidden_act="snake"), ["hidden_act", "snake"]),
    "pad": (models.LlamaConfig, dict(pad_token_id=32000), ["pad_token_id"]),
}


@pytest.mark.parametrize("kind, settings, expected", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(kind, settings, expected):
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    for text in expected:
        assert text in str(caught.value), str(caught.value)


# -- the function -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_shapes_and_dtypes(name, device):
    for dtype in ("float32", "float64"):
        model = models.Llama(FAMILY[name], dtype=dtype, rng=0)
        assert model(ids_of(2, T)).shape == (2, T, V) and model(ids_of(T)).shape == (T, V)
        loss = model.loss(ids_of(2, 2, T), ids_of(2, 2, T))
        loss.backward()
        assert {loss.dtype.name, *(p.grad.dtype.name for p in model.parameters())} == {dtype}


@pytest.mark.parametrize("name", FAMILY)
def test_padding_at_either_side_changes_nothing(name, device):
    model, ids = drawn(FAMILY[name]), ids_of(1, 6)
    expected = fetch(model(ids))
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = np.pad(ids, ((0, 0), (left, right)))
        y = model(padded, attention_mask=np.pad(np.ones((1, 6), int), ((0, 0), (left, right))))
        close(fetch(y)[:, left:left + 6], expected)


def test_a_window_forgets_what_lies_before_it(device):
    """With one layer exactly; with three, a token still hears of 3 (w - 1) tokens before it, through those between."""
    for layers in (1, 3):
        model = drawn(dataclasses.replace(FAMILY["mistral"], num_hidden_layers=layers, sliding_window=2))
        ids = ids_of(1, T)
        changed = ids.copy()
        changed[0, 2] = ids[0, 2] % (V - 1) + 1
        moved = np.abs(fetch(model(changed)) - fetch(model(ids))).max(axis=-1)[0] > 0
        assert moved.tolist() == [2 <= t <= 2 + layers for t in range(T)]


def test_heads_are_normalised_one_by_one(device):
    """Scaling the rows of q_proj that make one head changes nothing, but for eps."""
    config = dataclasses.replace(FAMILY["qwen3"], rms_norm_eps=1e-30, attention_bias=False)
    model, ids = drawn(config), ids_of(2, T)
    before = fetch(model(ids))
    q = model.model.layers[1].self_attn.q_proj.weight
    scaled = fetch(q.data)
    scaled[4:8] *= 7.0
    q.data = place(scaled)
    close(model(ids), before)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients(name):
    config = dataclasses.replace(FAMILY[name], num_hidden_layers=2, **(
        dict(layer_types=None, max_window_layers=1) if name == "qwen2" else {}))
    model = drawn(config)
    ids = ids_of(1, 5)
    report = gradcheck(lambda: model.loss(ids, ids), parameters=model.named_parameters(), full_size=4, directions=2)
    assert report, str(report)


def test_dynamic_frequencies_are_those_of_the_call(device):
    rotary = nn.RotaryEmbedding(8, 100.0, {"type": "dynamic", "factor": 2.0}, 6)
    x = np.random.default_rng(0).standard_normal((2, 9, 8))

    def turned(n, length):
        frequencies, factor = ops.scaled_rotary_frequencies(8, 100.0, rotary.scaling, 6, length)
        assert factor == 1.0
        return ops.rotary(place(x[:, :n]), *ops.rotary_tables(frequencies, 16, "float64"))

    long = rotary(place(x))
    close(long, turned(9, 9), 0.0)
    close(rotary(place(x[:, :4])), turned(4, 6), 0.0)  # nothing is remembered
    close(rotary(place(x)), long, 0.0)
    assert np.abs(fetch(rotary(place(x[:, :1]), offset=8)) - fetch(long)[:, 8:] * 0.0).max() > 0
    positions = [0, 0, 1, 2, 3, 4, 5, 6, 7]
    shifted = ops.rotary(place(x), *ops.rotary_tables(ops.scaled_rotary_frequencies(8, 100.0, rotary.scaling, 6, 8)[0], 16,
                                                      "float64"), positions=positions)
    close(rotary(place(x), positions=positions), shifted, 0.0)
    assert "dynamic" in repr(rotary) and len(rotary.stretched) == 1


def test_the_factor_of_yarn_lengthens_what_is_turned(device):
    rotary = nn.RotaryEmbedding(8, scaling={"type": "yarn", "factor": 4.0}, max_positions=64)
    x = np.random.default_rng(0).standard_normal((2, 9, 8))
    np.testing.assert_allclose(np.linalg.norm(fetch(rotary(place(x))), axis=-1),
                               np.linalg.norm(x, axis=-1) * (0.1 * np.log(4.0) + 1.0), rtol=1e-13)


# -- files, and transformers' stored numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_numbers(architecture, tmp_path, device):
    assert_stored(architecture, tmp_path)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", [models.Llama, models.LlamaBody, models.LlamaClassifier, models.LlamaTokenClassifier])
def test_saving_and_loading(name, kind, tmp_path):
    more = [models.Labels(3)] if "Classifier" in kind.__name__ else []
    model = drawn(FAMILY[name], "float32", kind, *more)
    models.save(model, tmp_path / "it")
    back = models.load(tmp_path / "it")
    assert type(back) is kind and back.config == model.config
    ids = ids_of(2, T)
    assert fetch(back(ids)).tobytes() == fetch(model.eval()(ids)).tobytes()


OLD = {"rope_parameters": None, "rope_theta": 30.0,
       "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 24}}


def test_both_spellings_of_rope(tmp_path):
    new, _ = folder_of("LlamaForCausalLM", tmp_path / "new"), folder_of("LlamaForCausalLM", tmp_path / "old", OLD)
    both = {**OLD, "rope_parameters": new["config"]["rope_parameters"]}
    folder_of("LlamaForCausalLM", tmp_path / "both", both)
    one, other, third = (models.load(tmp_path / name).config for name in ("new", "old", "both"))
    assert one == other == third and one.rope_scaling["rope_type"] == "llama3" and one.rope_theta == 30.0


REFUSED = {
    "two spellings that disagree": (dict(rope_theta=31.0), ["rope_theta is 31.0", "30.0"]),
    "longrope": (dict(rope_parameters={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), ["'longrope'"]),
    "a kind for every sort of layer": (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), ["full_attention"]),
    "a part of a head": (dict(partial_rotary_factor=0.5), ["partial_rotary_factor is 0.5"]),
    "a part of a head, inside": (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), ["0.5"]),
    "two lengths": (dict(original_max_position_embeddings=99), ["99", "24"]),
    "an unknown number": (dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "slope": 1.0}), ["'slope' is unknown"]),
    "an activation": (dict(hidden_act="xielu"), ["xielu"]),
}


@pytest.mark.parametrize("fields, expected", REFUSED.values(), ids=REFUSED)
def test_files_that_ask_for_something_else(fields, expected, tmp_path):
    folder_of("LlamaForCausalLM", tmp_path, fields)
    with pytest.raises(FormatError) as caught:
        models.load(tmp_path)
    for text in expected:
        assert text in str(caught.value), str(caught.value)


def test_what_real_files_say_beside(tmp_path):
    """Buffers of old files, how a model was trained, a padding id from the end, a length at the top, a tied head twice."""
    fields = {"rope_parameters": None, "rope_theta": 30.0, "original_max_position_embeddings": 64, "pad_token_id": -1,
              "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "finetuned": True}, "pretraining_tp": 1,
              "attention_dropout": 0.1}
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, "float32")}
    folder_of("LlamaForCausalLM", tmp_path, fields, **inverse)
    model = models.load(tmp_path)
    assert model.config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    assert model.model.embed_tokens.padding_idx == V - 1 and any("attention_dropout" in note for note in model.origin.notes)
    models.save(model, tmp_path / "again")
    assert models.load(tmp_path / "again").config == model.config
    assert "rope_scaling" not in json.loads((tmp_path / "again" / "config.json").read_text())


# -- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_adapters(name, device):
    """The targets that PEFT takes by default; training moves the loss; merging changes no output."""
    model, ids = drawn(FAMILY[name], "float32"), ids_of(2, T)
    report = lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), rng=1)
    assert "q_proj" in str(report)
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before = fetch(model.eval()(ids))
    lora.merge(model)
    close(model(ids), before, 1e-4)
    lora.unmerge(model)
    assert fetch(model(ids)).tobytes() == before.tobytes()


@pytest.mark.parametrize("name", FAMILY)
def test_adapters_beside_half_precision(name, device):
    """The base in float16, adapters in float32: near the numbers of a base in float32, forward and backward."""
    grads, losses = [], []
    for dtype in ("float32", "float16"):
        model, ids = drawn(FAMILY[name], "float32"), ids_of(2, T)
        model.to(dtype=dtype)
        lora.inject(model, lora.Config(r=2, target_modules="all-linear"), rng=1)
        loss = model.loss(ids, ids)
        loss.backward()
        trained = [p for p in model.parameters() if p.trainable]
        assert {p.dtype.name for p in trained} == {"float32"}
        grads.append(np.concatenate([fetch(p.grad).ravel() for p in trained]))
        losses.append(float(loss.item()))
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert np.linalg.norm(grads[1] - grads[0]) < 0.05 * np.linalg.norm(grads[0])


def test_a_plan_of_adapters():
    plan = lora.plan(models.Llama(FAMILY["qwen3"], rng=0), lora.Config(r=2, target_modules="all-linear"))
    assert "q_proj" in str(plan) and "down_proj" in str(plan)
    assert minilora.summary(models.Llama(FAMILY["mistral"], rng=0)).trainable_line
