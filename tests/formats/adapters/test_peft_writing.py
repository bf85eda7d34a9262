"""A SavedAdapter as a PEFT folder: the same tensors, the same settings, and patterns that give each update its r and s."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from minilora.errors import FormatError
from minilora.formats.adapters.dialect import Source
from minilora.formats.adapters.peft.folder import Peft
from minilora.formats.adapters.peft.ranks import alpha_for
from minilora.formats.adapters.reading import read_source
from minilora.formats.adapters.saved import SavedAdapter, TokenRows, Update
from minilora.lora import Config
from minilora.lora.gradient import scaling

P = "base_model.model."


def update(r=1, s=1.0, kind="linear", **more):
    return Update(kind, np.ones((r, 3), "float32"), np.ones((2, r), "float32"), s, **more)


def write(updates=None, config=None, **more):
    updates = {"lin": update()} if updates is None else updates
    config = config or Config(r=1, lora_alpha=1, target_modules=["lin"])
    return Peft().write(SavedAdapter(updates, config, **more))


def again(written):
    """What a reader makes of it, after the way through JSON."""
    text = json.dumps(written.config, indent=2, sort_keys=True)
    return read_source(Source(Path("there"), written.tensors, written.metadata, json.loads(text)))


def test_the_settings_of_a_fresh_adapter():
    written = write()
    assert written.names == ("adapter_model.safetensors", "adapter_config.json") and written.metadata == {"format": "pt"}
    assert written.config == {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 1,
        "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": 1, "rank_pattern": {}, "revision": None,
        "target_modules": ["lin"], "target_parameters": None, "task_type": None, "trainable_token_indices": None,
        "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None}


def test_the_scalings_are_those_of_the_updates():
    updates = {"a.lin": update(1, 2.0), "b.lin": update(2, 0.5), "lin": update(4, -3.0)}
    written = write(updates, Config(r=1, lora_alpha=2, target_modules=["lin"]))
    assert written.config["r"] == 1 and written.config["lora_alpha"] == 2 and written.config["target_modules"] == ["lin"]
    assert written.config["rank_pattern"] == {r"^b\.lin": 2, "^lin": 4}
    assert written.config["alpha_pattern"] == {r"^b\.lin": 1, "^lin": -12}
    assert {path: (u.r, u.s) for path, u in again(written).updates.items()} == {
        "a.lin": (1, 2.0), "b.lin": (2, 0.5), "lin": (4, -3.0)}


def test_patterns_that_hold_are_kept():
    config = Config(r=4, lora_alpha=8, target_modules=["q", "v"], rank_pattern={"v": 2}, alpha_pattern={r"0\.v": 6})
    updates = {"0.q": update(4, 2.0), "0.v": update(2, 3.0), "1.v": update(2, 4.0)}
    written = write(updates, config)
    assert (written.config["rank_pattern"], written.config["alpha_pattern"]) == ({"v": 2}, {r"0\.v": 6})
    # Sorted, the other key comes first, and the first one that fits counts.
    config = Config(r=4, lora_alpha=8, target_modules=["q", "v"], rank_pattern={"v": 2}, alpha_pattern={"v": 4, ".*": 6})
    updates = {"0.q": update(4, 1.5), "0.v": update(2, 2.0)}
    assert {path: u.s for path, u in again(write(updates, config)).updates.items()} == {"0.q": 1.5, "0.v": 2.0}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_of_pissa_as_a_part_of_the_update(rslora):
    """Row 7: r = 2, alpha = 3 becomes rank 4 with the same s."""
    config = Config(r=2, lora_alpha=3, use_rslora=rslora, init_lora_weights="pissa", target_modules=["lin"])
    s = scaling(3, 2, rslora)
    written = write({"lin": update(4, s)}, config)
    assert written.config["r"] == 4 and written.config["init_lora_weights"] is True
    assert written.config["lora_alpha"] == (pytest.approx(4.242641, rel=1e-6) if rslora else 6)
    assert again(written).updates["lin"].s == s
    assert write({"lin": update(2, s)}, config).config["init_lora_weights"] == "pissa"  # as it was read
    with pytest.raises(FormatError, match="is the start part of the updates or not"):
        write({"lin": update(3, s)}, config)


@given(st.floats(1e-6, 1e6), st.integers(1, 512), st.booleans())
def test_alpha_makes_the_same_s(alpha, r, rslora):
    config = Config(use_rslora=rslora)
    s = scaling(alpha, r, rslora)
    found = alpha_for(s, r, config, 8)
    assert abs(scaling(found, r, rslora) - s) <= math.ulp(s)
    assert scaling(alpha_for(s, r, config, alpha), r, rslora) == s
    whole = scaling(round(alpha) or 1, r)
    assert scaling(alpha_for(whole, r, Config(), 8), r) == whole


TARGETS = [
    (dict(target_modules=["lin"]), ["a.lin", "b.lin"], None),
    (dict(target_modules=["lin", "q"]), ["a.lin"], ["a.lin"]),
    (dict(target_modules=["lin"]), ["a.lin", "b.q"], ["a.lin", "b.q"]),
    (dict(target_modules=r".*\.lin"), ["a.lin"], None),
    (dict(target_modules=r".*\.lin"), ["lin"], ["lin"]),
    (dict(target_modules="all-linear"), ["a.lin"], ["a.lin"]),
    (dict(target_modules=["lin"], exclude_modules=["b.lin", "c"]), ["a.lin"], None),
    (dict(target_modules=["lin"], exclude_modules=["a.lin"]), ["a.lin"], ["a.lin"]),
    (dict(target_modules=["lin"], layers_to_transform=[1]), ["h.1.lin"], None),
    (dict(target_modules=["lin"], layers_to_transform=[1]), ["h.0.lin"], ["h.0.lin"]),
    (dict(), ["a.lin"], ["a.lin"]),
    (dict(target_modules=["att"]), ["att", "att.out_proj"], None),
    (dict(target_modules=["x"]), ["att", "att.out_proj"], ["att"]),
]


@pytest.mark.parametrize("settings, paths, expected", TARGETS, ids=str)
def test_targets(settings, paths, expected):
    config = Config(r=1, lora_alpha=1, **settings)
    written = write({path: update() for path in paths}, config).config
    kept = {name: written[name] for name in ("target_modules", "exclude_modules", "layers_to_transform")}
    if expected is None:
        assert kept == {name: config.to_dict()[name] for name in kept}
    else:
        assert kept == {"target_modules": expected, "exclude_modules": None, "layers_to_transform": None}


def test_names_and_shapes_of_every_part():
    conv = Update("convolution", np.ones((2, 3, 5, 5)), np.ones((4, 1, 1, 1)), 1.0, magnitude=np.ones(4))
    table = Update("embedding", np.ones((2, 7)), np.ones((3, 2)), 1.0, magnitude=np.ones(3))
    linear = Update("linear", np.ones((2, 3)), np.ones((4, 2)), 1.0, magnitude=np.ones(4))
    written = write({"c": conv, "e": table, "att": linear, "att.out": linear},
                    Config(r=2, lora_alpha=2, target_modules=["c", "e", "att"], use_dora=True, bias="all",
                           modules_to_save=["head"]),
                    saved={"head.weight": np.ones((2, 2)), "e.weight": np.ones((7, 3))},
                    biases={"c.bias": np.ones(4), "att.out.bias": np.ones(4), "ln.bias": np.ones(3)},
                    tokens={"wte": TokenRows((1, 3), np.ones((2, 5)))})
    assert {key.removeprefix(P): array.shape for key, array in written.tensors.items()} == {
        "c.lora_A.weight": (2, 3, 5, 5), "c.lora_B.weight": (4, 1, 1, 1), "c.lora_magnitude_vector": (1, 4, 1, 1),
        "e.lora_embedding_A": (2, 7), "e.lora_embedding_B": (3, 2), "e.lora_magnitude_vector": (3,),
        "att.lora_A.weight": (2, 3), "att.lora_B.weight": (4, 2), "att.lora_magnitude_vector": (4,),
        "att.base_layer.out.lora_A.weight": (2, 3), "att.base_layer.out.lora_B.weight": (4, 2),
        "att.base_layer.out.lora_magnitude_vector": (4,), "head.weight": (2, 2), "e.base_layer.weight": (7, 3),
        "c.base_layer.bias": (4,), "att.base_layer.out.base_layer.bias": (4,), "ln.bias": (3,),
        "wte.token_adapter.trainable_tokens_delta": (2, 5)}
    assert written.config["trainable_token_indices"] == {"wte": [1, 3]}
    same(again(written), SavedAdapter({"c": conv, "e": table, "att": linear, "att.out": linear}, Config(), biases={
        "c.bias": np.ones(4), "att.out.bias": np.ones(4), "ln.bias": np.ones(3)}, saved={
            "head.weight": np.ones((2, 2)), "e.weight": np.ones((7, 3))}, tokens={"wte": TokenRows((1, 3), np.ones((2, 5)))}))


def same(got, expected):
    """Equal to the last bit, but for the config."""
    assert got.updates.keys() == expected.updates.keys()
    for path, u in expected.updates.items():
        v = got.updates[path]
        assert (u.kind, u.s, u.A.dtype) == (v.kind, v.s, v.A.dtype)
        for name in ("A", "B", "bias", "magnitude"):
            a, b = getattr(u, name), getattr(v, name)
            assert (a is None and b is None) or (a.shape == b.shape and a.tobytes() == b.tobytes()), (path, name)
    for field in ("saved", "biases"):
        a, b = getattr(expected, field), getattr(got, field)
        assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() and a[k].shape == b[k].shape for k in a)
    assert got.tokens.keys() == expected.tokens.keys()
    for path, rows in expected.tokens.items():
        assert got.tokens[path].indices == rows.indices and got.tokens[path].rows.tobytes() == rows.rows.tobytes()


CANNOT = {
    "lengths in some layers": dict(updates={"a": update(magnitude=np.ones(2)), "b": update()}),
    "biases in some layers": dict(updates={"a": update(bias=np.ones(2)), "b": update()}),
    "both": dict(updates={"a": update(bias=np.ones(2), magnitude=np.ones(2))}),
    "an embedding twice": dict(updates={"e": update(kind="embedding")}, tokens={"e": TokenRows((0,), np.ones((1, 2)))}),
}


@pytest.mark.parametrize("adapter", [*CANNOT.values()], ids=CANNOT)
def test_what_peft_cannot_say(adapter):
    with pytest.raises(FormatError, match="a PEFT folder cannot say this"):
        write(**adapter)


def test_metadata_of_another_dialect_are_left_behind():
    assert write(metadata={"alpha": "8", "format": "mlx"}, dialect="kohya").metadata == {"format": "pt"}
    assert write(metadata={"minilora.base": "x", "format": "pt"}).metadata == {"format": "pt", "minilora.base": "x"}


# -- drawn adapters --------------------------------------------------------------------------------------------

LEAVES = ["q_proj", "v_proj", "fc", "c-1", "head"]


@st.composite
def adapters(draw):
    """An adapter as PEFT could have written it: kinds, patterns, dtypes, saved parts, and a config that agrees with it."""
    paths = [f"{stem}{leaf}" for leaf in draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=4, unique=True))
             for stem in draw(st.lists(st.sampled_from(["", "m.0.", "m.1.", "x_y."]), min_size=1, max_size=2, unique=True))]
    dora = draw(st.booleans())
    config = Config(
        r=draw(st.integers(1, 4)), lora_alpha=draw(st.integers(1, 9) | st.floats(0.01, 9)),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])), target_modules=sorted({path.split(".")[-1] for path in paths}),
        rank_pattern=draw(st.dictionaries(st.sampled_from([*LEAVES, r"m\.0\..*"]), st.integers(1, 5), max_size=2)),
        alpha_pattern=draw(st.dictionaries(st.sampled_from([*LEAVES, r"^q_proj"]), st.floats(0.01, 9), max_size=2)),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])), use_rslora=draw(st.booleans()), use_dora=dora,
        lora_bias=not dora and draw(st.booleans()), task_type=draw(st.sampled_from([None, "SEQ_CLS", "CAUSAL_LM"])),
        init_lora_weights=draw(st.sampled_from([True, False])), modules_to_save=draw(st.sampled_from([None, ["top"]])),
        trainable_token_indices=draw(st.sampled_from([None, [0, 2], {"wte": [5]}])),
        base_model_name_or_path=draw(st.sampled_from([None, "", "gpt2"])),
        auto_mapping=draw(st.sampled_from([None, {"a": "b"}])),
        extra=draw(st.sampled_from([{}, {"new": None, "enable_lora": False}, {"megatron_core": None}])))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    arrays = (lambda *shape: rng.standard_normal(shape).astype(dtype))
    updates = {path: draw_update(draw(st.integers(0, 4)), config, path, arrays) for path in paths}
    biases = {f"{path}.bias": arrays(4) for path in paths if draw(st.booleans())} if config.bias != "none" else {}
    biases.update({"norm.bias": arrays(3)} if config.bias == "all" else {})
    saved = {"top.weight": arrays(2, 2), "top.bias": arrays(2)} if config.modules_to_save else {}
    said = config.trainable_token_indices
    said = said["wte"] if isinstance(said, dict) else said
    tokens = {"m.wte": TokenRows(tuple(said), arrays(len(said), 3))} if said else {}
    return SavedAdapter(updates, config, "peft", saved, biases, tokens, {"format": "pt"})


def draw_update(axes, config, path, arrays):
    r = config.rank_at(path)
    s = config.scaling_for(r, config.alpha_at(path))
    more = {"magnitude": arrays(4)} if config.use_dora else {}
    if axes == 4:
        return Update("embedding", arrays(r, 7), arrays(4, r), s, **more)
    more.update({"bias": arrays(4)} if config.lora_bias else {})
    if not axes:
        return Update("linear", arrays(r, 3), arrays(4, r), s, **more)
    groups = 2 if r % 2 == 0 else 1
    return Update("convolution", arrays(r, 2, *[3] * axes), arrays(4, r // groups, *[1] * axes), s, **more)


@hypothesis_settings(max_examples=2 * hypothesis_settings.default.max_examples)
@given(adapters())
def test_what_is_written_is_read_again_to_the_last_bit(adapter):
    written = Peft().write(adapter)
    got = again(written)
    same(got, adapter)
    config = adapter.config
    flat = all(u.bias is None for u in adapter.updates.values())  # embeddings have no lora_bias
    rewritten = {"lora_bias": config.lora_bias and not flat, "inference_mode": True, "peft_version": "0.21.2"}
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):  # others where PEFT, which sorts them, would find others
        rewritten[name] = getattr(got.config, name)
    assert got.config == dataclasses.replace(config, **rewritten)
    if not config.alpha_pattern and not config.rank_pattern:
        assert (got.config.r, got.config.lora_alpha) == (config.r, config.lora_alpha)
    second = Peft().write(got)
    assert second.config == written.config and second.tensors.keys() == written.tensors.keys()
