"""DeBERTa-v2 and v3: names, what attention to distances sees, padding, heads, files, stored numbers, adapters."""
import copy
import dataclasses
import pickle

import numpy as np
import pytest
import standin
from conftest import fetch, place
from stored_models import FOR_FILES, assert_stored, folder_of

from minilora import backend, lora, models, no_grad, ops, optim
from minilora.errors import ConfigError, FormatError, OutOfRangeError, ShapeError
from minilora.testing import gradcheck

V, T = 13, 9
TINY = dict(vocab_size=V, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=16)
V3 = dict(TINY, relative_attention=True, position_buckets=4, max_relative_positions=8, pos_att_type="p2c|c2p",
          share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)
KINDS = {
    "v3": models.DebertaV2Config(**V3),
    "v2-xlarge": models.DebertaV2Config(**{**V3, "share_att_key": False}, conv_kernel_size=3, conv_act="gelu"),
    "no buckets": models.DebertaV2Config(**{**V3, "position_buckets": -1, "max_relative_positions": 3}, type_vocab_size=2),
    "one term": models.DebertaV2Config(**{**V3, "pos_att_type": ("p2c",), "share_att_key": False,
                                          "position_biased_input": True}),
    "no distances": models.DebertaV2Config(**TINY),
}
HEADS = [models.DebertaV2, models.DebertaV2MaskedLM, models.DebertaV2Classifier, models.DebertaV2TokenClassifier]
ARCHITECTURES = [name for name in FOR_FILES if name.startswith("Deberta")]


def ids_of(*shape, seed=1):
    return np.random.default_rng(seed).integers(1, V, shape)


def drawn(config, dtype="float64", kind=models.DebertaV2):
    """A model whose every parameter counts."""
    more = [models.Labels(3)] if "Classifier" in kind.__name__ else []
    model, rng = kind(config, *more, dtype=dtype, rng=0), np.random.default_rng(7)
    for name, p in model.named_parameters():
        p.data = place(rng.normal(float("Norm.weight" in name), 0.4, p.shape), dtype)
    return model


def close(got, expected, tol=1e-12):
    np.testing.assert_allclose(fetch(got), fetch(expected), rtol=0, atol=tol * max(1.0, np.abs(fetch(expected)).max()))


# -- shapes, names, configs ---------------------------------------------------------------------------------------------


def test_names():
    def of(kind, start):
        return {path.removeprefix(start).removesuffix(".weight") for path, _ in models.DebertaV2(KINDS[kind]).named_parameters()
                if path.startswith(start) and path.endswith(".weight")}

    contents = {"query_proj", "key_proj", "value_proj"}
    start = "encoder.layer.1.attention.self."
    assert of("v3", start) == of("no distances", start) == contents
    assert of("v2-xlarge", start) == contents | {"pos_key_proj", "pos_query_proj"}
    assert of("one term", start) == contents | {"pos_query_proj"}
    assert of("v3", "embeddings.") == {"word_embeddings", "LayerNorm"}
    assert of("one term", "embeddings.") == {"word_embeddings", "LayerNorm", "position_embeddings"}
    assert of("no buckets", "embeddings.") == {"word_embeddings", "LayerNorm", "token_type_embeddings"}
    assert {"rel_embeddings", "LayerNorm", "conv.conv", "conv.LayerNorm"} <= of("v2-xlarge", "encoder.")
    assert models.DebertaV2(KINDS["no buckets"]).encoder.rel_embeddings.num_embeddings == 6


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", KINDS)
def test_shapes_and_dtypes(name, kind, device):
    model = drawn(KINDS[name], "float32", kind)
    last = {models.DebertaV2: (8,), models.DebertaV2MaskedLM: (V,), models.DebertaV2TokenClassifier: (3,)}.get(kind)
    for lead in ((), (2,), (2, 2)):
        y = model(ids_of(*lead, T))
        assert y.shape == (lead + (T,) + last if last else lead + (3,)) and y.dtype == "float32"
    assert model([[4]]).shape[0] == 1  # a text of one token


def test_configs_are_values():
    config = KINDS["v2-xlarge"]
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) and hash(config)
    assert models.DebertaV2Config(pos_att_type=["c2p", "p2c"]).pos_att_type == ("c2p", "p2c")
    for nothing in ("none", None, [], ""):
        assert models.DebertaV2Config(pos_att_type=nothing).pos_att_type == ()
    assert models.DebertaV2Config().farthest == 512 == models.DebertaV2Config().span


MISTAKES = {
    "terms": (dict(pos_att_type="p2p"), ["pos_att_type may name c2p and p2c"]),
    "twice": (dict(pos_att_type="c2p|c2p"), ["each once"]),
    "norm": (dict(norm_rel_ebd="rms"), ["norm_rel_ebd must be 'none' or 'layer_norm', got 'rms'"]),
    "buckets": (dict(relative_attention=True, position_buckets=256, max_relative_positions=100), ["do not go together"]),
    "many": (dict(share_att_key=1, position_buckets=2.5), ["2 problems", "share_att_key", "position_buckets"]),
    "kernel": (dict(conv_kernel_size=4), ["conv_kernel_size must be odd"]),
    "groups": (dict(conv_kernel_size=3, conv_groups=7), ["1536 and 7"]),
    "heads": (dict(num_attention_heads=7), ["1536 and 7"]),
    "act": (dict(conv_act="mish"), ["conv_act", "mish"]),
    "segments": (dict(type_vocab_size=-1), ["type_vocab_size must be an int >= 0"]),
}


@pytest.mark.parametrize("settings, expected", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(settings, expected):
    with pytest.raises(ConfigError) as caught:
        models.DebertaV2Config(**settings)
    for text in expected:
        assert text in str(caught.value), str(caught.value)


def test_mistakes_in_texts(device):
    model = drawn(KINDS["one term"])
    with pytest.raises(ShapeError, match="17 tokens"):
        model(ids_of(17))
    with pytest.raises(OutOfRangeError, match="13"):
        model([[1, V]])
    assert drawn(KINDS["v3"])(ids_of(17)).shape == (17, 8)  # distances have no end
    with pytest.raises(OutOfRangeError, match="token type"):
        drawn(KINDS["no buckets"])([[1, 2]], [[0, 2]])
    close(drawn(KINDS["v3"])([[1, 2]], [[0, 1]]), drawn(KINDS["v3"])([[1, 2]]), 0.0)  # no vectors of segments: not read


# -- the function -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", KINDS)
def test_padding_does_not_leak(name, side, device):
    """Numbers of tokens do not depend on what stands at padding, nor, at the right, on how much of it there is."""
    model, ids = drawn(KINDS[name]), ids_of(1, T)
    keep = np.arange(T)[None] < 6 if side == "right" else np.arange(T)[None] >= 3
    one = fetch(model(np.where(keep, ids, 5), key_padding=keep))[keep]
    other = fetch(model(np.where(keep, ids, 7), attention_mask=keep.astype(int).tolist()))[keep]
    np.testing.assert_array_equal(one, other)
    if side == "right":
        close(one, model(ids[:, :6])[0])


def test_only_what_distances_say_tells_places_apart(device):
    """Without them a text is a set: any order of the tokens gives the same vectors in that order."""
    ids, order = ids_of(1, T), np.random.default_rng(3).permutation(T)
    plain = models.DebertaV2Config(**{**TINY, "position_biased_input": False})
    for config, alike in ((plain, True), (KINDS["v3"], False)):
        model = drawn(config)
        difference = np.abs(fetch(model(ids[:, order])) - fetch(model(ids))[:, order]).max()
        assert (difference < 1e-12) == alike


def test_distances_beyond_the_last_bucket_are_alike(device):
    """Vectors of distances that no pair of a text has are neither used nor trained."""
    model, ids = drawn(KINDS["v3"]), ids_of(1, 3)
    table = model.encoder.rel_embeddings.weight
    ops.sum(model(ids) * place(np.random.default_rng(0).standard_normal((1, 3, 8)))).backward()
    assert np.flatnonzero(np.abs(fetch(table.grad)).max(axis=1)).tolist() == [2, 3, 4, 5, 6]
    before = fetch(model(ids))
    moved = fetch(table.data)
    moved[[0, 1, 7]] += 5.0
    table.data = place(moved)
    np.testing.assert_array_equal(fetch(model(ids)), before)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name):
    model = drawn(dataclasses.replace(KINDS[name], num_hidden_layers=1), kind=models.DebertaV2MaskedLM)
    ids = ids_of(2, 5)
    labels = np.where(ids % 2, ids, -100)
    keep = np.array([[True] * 5, [True] * 3 + [False] * 2])
    report = gradcheck(lambda: model(ids, labels, keep), parameters=model.named_parameters(), full_size=4, directions=2)
    assert report, str(report)


def test_dropout_counts_in_training_only(device):
    config = dataclasses.replace(KINDS["v2-xlarge"], hidden_dropout_prob=0.5)
    model, ids = drawn(config), ids_of(2, T)
    assert np.abs(fetch(model(ids)) - fetch(model(ids))).max() > 0.1
    model.eval()
    close(model(ids), model(ids), 0.0)
    close(model(ids), drawn(KINDS["v2-xlarge"])(ids), 0.0)


def test_both_heads_for_masked_tokens_have_one_formula(device):
    old, new = (drawn(dataclasses.replace(KINDS["v3"], legacy=legacy), kind=models.DebertaV2MaskedLM)
                for legacy in (True, False))
    state = {path.replace("lm_predictions.lm_head.bias", "cls.predictions.bias").replace(
        "lm_predictions.lm_head", "cls.predictions.transform"): a for path, a in new.state_dict().items()}
    old.load_state_dict(state, strict=False)
    ids = ids_of(2, T)
    np.testing.assert_array_equal(fetch(old(ids)), fetch(new(ids)))


def test_a_step_does_not_wait_for_the_device():
    """Ids, buckets and plans of sums go up; nothing comes back, and nothing waits."""
    standin.register()
    try:
        with backend.use("standin"):
            model, ids = drawn(KINDS["v3"], "float32", models.DebertaV2MaskedLM), ids_of(2, T)
            with standin.counting() as counts:
                model(ids, ids).backward()
            assert counts.syncs == counts.d2h == 0
    finally:
        backend.unregister_device("standin")


# -- files, and transformers' stored numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_numbers(architecture, tmp_path, device):
    assert_stored(architecture, tmp_path)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", HEADS)
def test_saving_and_loading(name, kind, tmp_path):
    model = drawn(KINDS[name], "float32", kind)
    models.save(model, tmp_path / "it")
    back = models.load(tmp_path / "it")
    assert type(back) is kind and back.config == model.config and not back.origin.notes
    assert fetch(back(ids_of(2, T))).tobytes() == fetch(model.eval()(ids_of(2, T))).tobytes()


def test_what_real_files_hold_beside(tmp_path):
    """Vectors of positions that the model does not use, another head of the training, a kernel of 0, two words for a norm."""
    extra = {"deberta.embeddings.position_embeddings.weight": np.zeros((16, 8), "float32"),
             "mask_predictions.dense.weight": np.zeros((8, 8), "float32"),
             "deberta.embeddings.position_ids": np.arange(16)[None]}
    folder_of("DebertaV2ForMaskedLM", tmp_path, {"pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm|none"}, **extra)
    model = models.load(tmp_path)
    assert model.embedding.num_embeddings == V and any("position_embeddings" in note for note in model.origin.notes)


REFUSED = {
    "another width inside": (dict(embedding_size=4), ["embedding_size is 4", "hidden_size"]),
    "another width of the pooler": (dict(pooler_hidden_size=4), ["pooler_hidden_size is 4"]),
    "heads of another width": (dict(attention_head_size=3), ["attention_head_size is 3"]),
    "an unknown term": (dict(pos_att_type=["p2p"]), ["p2p"]),
    "an untied head": (dict(tie_word_embeddings=False), ["tie_word_embeddings is False"]),
}


@pytest.mark.parametrize("fields, expected", REFUSED.values(), ids=REFUSED)
def test_files_that_ask_for_something_else(fields, expected, tmp_path):
    folder_of("DebertaV2ForMaskedLM", tmp_path, fields)
    with pytest.raises(FormatError) as caught:
        models.load(tmp_path)
    for text in expected:
        assert text in str(caught.value), str(caught.value)


# -- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["query_proj", "value_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("name", ["v3", "v2-xlarge"])
def test_adapters(name, targets, device):
    """PEFT's default targets and all layers; training moves the loss; merging changes no output."""
    model, ids = drawn(KINDS[name], "float32", models.DebertaV2Classifier), ids_of(4, T)
    labels = np.array([0, 1, 2, 0])
    lora.inject(model, lora.Config(r=2, lora_alpha=4, target_modules=targets), rng=1)
    optimizer = optim.Adam([p for p in model.parameters() if p.trainable], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(ids, labels)
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


@pytest.mark.parametrize("name", ["v3", "v2-xlarge", "one term"])
def test_an_adapter_for_every_text(name, device):
    """The vectors of distances are projected once for each adapter: a text of a mixed batch is as it is alone."""
    model, ids = drawn(KINDS[name], kind=models.DebertaV2Classifier).eval(), ids_of(5, 6)
    for adapter in ("a", "b"):
        lora.inject(model, lora.Config(r=2, target_modules="all-linear", init_lora_weights=False), adapter, rng=ord(adapter))
    names = ["a", "b", "__base__", "a", "b"]
    with no_grad():
        with lora.mixed(model, adapter_names=names):
            together = fetch(model(ids))
            assert fetch(model(ids[:, None])).shape == (5, 1, 3)
        for i, adapter in enumerate(names):
            with lora.mixed(model, adapter_names=[adapter]):
                close(together[i], fetch(model(ids[i:i + 1]))[0])


def test_shared_projections_are_adapted_for_distances_too(device):
    """query_proj makes queries of distances as well: its update is in both, as it is in PEFT."""
    model, ids = drawn(KINDS["v3"]), ids_of(2, T)
    lora.inject(model, lora.Config(r=2, target_modules=["query_proj", "key_proj"], init_lora_weights=False), rng=1)
    adapted = fetch(model(ids))
    lora.bake(model)
    close(model(ids), adapted)


def test_adapters_beside_half_precision(device):
    grads, losses = [], []
    for dtype in ("float32", "float16"):
        model, ids = drawn(KINDS["v2-xlarge"], "float32", models.DebertaV2MaskedLM), ids_of(2, T)
        model.to(dtype=dtype)
        lora.inject(model, lora.Config(r=2, target_modules=["query_proj", "key_proj", "value_proj", "pos_key_proj"]), rng=1)
        loss = model(ids, ids)
        loss.backward()
        trained = [p for p in model.parameters() if p.trainable]
        assert {p.dtype.name for p in trained} == {"float32"}
        grads.append(np.concatenate([fetch(p.grad).ravel() for p in trained]))
        losses.append(float(loss.item()))
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert np.linalg.norm(grads[1] - grads[0]) < 0.05 * np.linalg.norm(grads[0])


def test_a_plan_of_adapters():
    model = models.DebertaV2Classifier(KINDS["v2-xlarge"], models.Labels(2), rng=0)
    config = lora.Config(r=2, target_modules=["query_proj", "pos_key_proj"], modules_to_save=["classifier"])
    plan = str(lora.plan(model, config))
    assert "query_proj" in plan and "pos_key_proj" in plan
