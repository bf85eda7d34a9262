"""lora.Config: PEFT's fields, one error for all mistakes, and the way to a file and back."""
import copy
import dataclasses
import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minilora import lora
from minilora.errors import ConfigError
from minilora.lora import Config
from minilora.lora.config_checks import BIASES, INITS, is_init, key_regex, layer_regex
from minilora.lora.gradient import scaling

# PEFT 0.21's defaults, written down by hand; tests/parity/test_peft_match.py compares with the library itself.
DEFAULTS = dict(
    r=8, lora_alpha=8, lora_dropout=0.0, target_modules=None, exclude_modules=None, layers_to_transform=None,
    layers_pattern=None, rank_pattern={}, alpha_pattern={}, bias="none", modules_to_save=None, use_rslora=False,
    use_dora=False, lora_bias=False, init_lora_weights=True, loftq_config={}, fan_in_fan_out=False,
    trainable_token_indices=None, task_type=None, base_model_name_or_path=None, revision=None, auto_mapping=None,
    inference_mode=False, peft_version=None)


def test_defaults():
    assert dataclasses.asdict(Config()) == {**DEFAULTS, "extra": {}}
    assert Config().to_dict() == {"peft_type": "LORA", **DEFAULTS}


def test_frozen_and_copied():
    config = Config(r=4, target_modules=["q", "v"], rank_pattern={"q": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 2
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and other is not config
    changed = dataclasses.replace(config, r=16)
    assert (changed.r, config.r, changed.rank_pattern) == (16, 4, {"q": 2})
    with pytest.raises(ConfigError, match="r must be an int"):
        dataclasses.replace(config, r=0)


def test_what_was_given_may_change_afterwards():
    names, ranks = ["q"], {"q": 2}
    config = Config(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["v"] = 3
    assert config.target_modules == ("q",) and config.rank_pattern == {"q": 2}


def test_sets_come_in_one_order():
    assert Config(target_modules={"v", "q", "k"}).target_modules == ("k", "q", "v")


BAD = [
    (dict(r=0), "r must be an int >= 1, got 0"),
    (dict(r=2.0), "r must be an int >= 1, got 2.0"),
    (dict(r=True), "r must be an int >= 1, got True"),
    (dict(lora_alpha=0), "lora_alpha must not be 0"),
    (dict(lora_alpha=math.inf), "lora_alpha must be a finite number"),
    (dict(lora_alpha="16"), "lora_alpha must be a finite number, got '16'"),
    (dict(lora_dropout=1.0), "lora_dropout: dropout must be a number in [0, 1), got 1.0"),
    (dict(lora_dropout=-0.1), "lora_dropout: dropout must be"),
    (dict(target_modules=[]), "target_modules: the list is empty"),
    (dict(target_modules=""), "target_modules: the string is empty"),
    (dict(target_modules="q("), "target_modules: 'q(' is not a regular expression"),
    (dict(target_modules=["q", 3, ""]), "target_modules: expected names, got [3, ''] in the list"),
    (dict(target_modules=7), "target_modules: expected a list of names, got 7"),
    (dict(exclude_modules=[None]), "exclude_modules: expected names, got [None]"),
    (dict(modules_to_save="head"), "modules_to_save: expected a list of names, got 'head'"),
    (dict(target_modules=["q"], layers_to_transform=-1), "layers_to_transform: expected layer numbers >= 0, got [-1]"),
    (dict(target_modules=["q"], layers_to_transform=[0, True, "1"]), "layer numbers >= 0, got [True, '1']"),
    (dict(target_modules=["q"], layers_to_transform=[]), "layers_to_transform: the list is empty"),
    (dict(target_modules=["q"], layers_to_transform=0, layers_pattern=["h["]), "layers_pattern: 'h[' is not a regular"),
    (dict(target_modules=["q"], layers_pattern="h"), "give layers_to_transform too"),
    (dict(target_modules=".*q", layers_to_transform=1), "layers_to_transform: works with a list in target_modules only"),
    (dict(target_modules="all-linear", layers_pattern="h"), "layers_pattern: works with a list in target_modules only"),
    (dict(target_modules=["q"], layers_to_transform=0, layers_pattern="(?i)H"), "layers_pattern: '(?i)H' becomes part of a "
     "longer expression, where flags must have a scope: write '(?i:H)'"),
    (dict(target_modules=["q"], layers_to_transform=0, layers_pattern=["h", "(?P<idx>h)"]), "layers_pattern: '(?P<idx>h)' "
     "becomes part of a longer expression, which it breaks: redefinition of group name 'idx'"),
    (dict(target_modules=["q"], layers_to_transform=0, layers_pattern=["h", 3]), "layers_pattern: expected names, got [3]"),
    (dict(target_modules=["q"], layers_to_transform=0, layers_pattern=""), "layers_pattern: "),
    (dict(rank_pattern={"(?i)Q": 4}), "rank_pattern: '(?i)Q' becomes part of a longer expression, where flags must have a "
     "scope: write '(?i:Q)'"),
    (dict(alpha_pattern={"(?s)q": 4}), "alpha_pattern: '(?s)q' becomes part of a longer expression"),
    (dict(target_modules=["q"], layers_to_transform=np.bool_(True)), "layer numbers >= 0"),
    (dict(target_modules=["q"], layers_to_transform=[np.int64(-1)]), "layer numbers >= 0"),
    (dict(rank_pattern=[("q", 1)]), "rank_pattern: expected a dict"),
    (dict(rank_pattern={"q": 0, "(": 1, 3: 2}), "'q': r must be an int >= 1, got 0; '(' is not a regular expression"),
    (dict(rank_pattern={3: 2}), "rank_pattern: expected names as keys, got 3"),
    (dict(alpha_pattern={"q": 0}), "alpha_pattern: 'q': lora_alpha must not be 0"),
    (dict(bias=True), "bias: expected one of 'none', 'all', 'lora_only', got True"),
    (dict(use_dora=1), "use_dora: expected one of True, False, got 1"),
    (dict(use_rslora=None), "use_rslora: expected one of True, False, got None"),
    (dict(init_lora_weights="orthogonl"), "init_lora_weights: expected one of True, False, 'gaussian'"),
    (dict(init_lora_weights=1), "init_lora_weights: expected one of True, False, 'gaussian'"),
    (dict(lora_bias=True, use_dora=True), "lora_bias: not together with use_dora"),
    (dict(lora_bias=True, init_lora_weights="pissa"), "lora_bias: only with init_lora_weights=True or False, got 'pissa'"),
    (dict(rank=4), "rank: there is no such setting. Is 'rank_pattern' meant, or r?"),
    (dict(lora_aplha=4), "lora_aplha: there is no such setting. Is 'lora_alpha' meant?"),
    (dict(dropout=0.1), "dropout: there is no such setting. Is 'lora_dropout' meant?"),
    (dict(targets=["q"]), "targets: there is no such setting. Is 'target_modules' meant?"),
    (dict(zzz=1), "zzz: there is no such setting. The settings are r, lora_alpha"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=lambda value: str(value)[:40])
def test_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    assert message in str(caught.value)


def test_all_problems_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        Config(rank=1, r=0, lora_alpha=0, lora_dropout=2, bias="some", rank_pattern={"a": 0})
    text = str(caught.value)
    assert text.startswith("lora.Config: 6 problems")
    assert len(text.splitlines()) == 7
    assert isinstance(caught.value, ValueError)


def test_numbers_of_numpy_become_python_numbers():
    config = Config(r=np.int64(4), rank_pattern={"q": np.int32(2)}, lora_alpha=np.float64(2.0))
    assert type(config.r) is int and type(config.rank_pattern["q"]) is int
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for layers in (np.int64(1), [np.int64(1), 0], {np.uint8(1), 0}):
        config = Config(target_modules=["q"], layers_to_transform=layers)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        kept = config.layers_to_transform
        assert {type(n) for n in (kept if isinstance(kept, tuple) else [kept])} == {int}


def test_flags_with_a_scope():
    config = Config(target_modules="(?i)Q", rank_pattern={"(?i:Q_PROJ)": 4})
    assert re.match(key_regex(*config.rank_pattern), "layers.0.q_proj")
    assert re.match(layer_regex("(?i:LAYERS)"), "model.layers.3.q")["idx"] == "3"


def test_allowed_values_have_one_home():
    assert all(Config(bias=bias).bias == bias for bias in BIASES)
    assert all(is_init(init) for init in INITS) and all(Config(init_lora_weights=init) for init in INITS)
    assert not any(is_init(value) for value in (1, 0, None, "True", "pisa", np.array(["pissa"]), []))


# -- the scaling --------------------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(1e-3, 1e6))
def test_scaling_has_one_home(r, lora_alpha):
    assert Config().scaling_for(r, lora_alpha) == scaling(lora_alpha, r) == lora_alpha / r
    assert Config(use_rslora=True).scaling_for(r, lora_alpha) == scaling(lora_alpha, r, use_rslora=True)
    assert scaling(lora_alpha, r, True) ** 2 * r == pytest.approx(lora_alpha ** 2, rel=1e-14)


def test_scaling_is_a_python_float():
    for rslora in (False, True):
        assert type(lora.scaling(16, np.int64(4), rslora)) is float


def test_settings_that_are_off_are_kept_and_those_that_are_on_are_refused():
    off = {"new": None, "newer": False, "newest": {}, "enable_lora": None, "merge_weights": False, "megatron_core": None,
           "eva_config": {"rho": 2.0, "whiten": False}, "use_bdlora": False}
    config = Config.from_dict({"target_modules": ["q"], **off})
    assert config.extra == off and {name: config.to_dict()[name] for name in off} == off
    assert Config.from_dict(config.to_dict()) == config
    for name, value in [("new", 0), ("new", True), ("new", 0.0), ("target_parameters", ["experts.gate_up_proj"]),
                        ("use_qalora", True), ("ensure_weight_tying", True), ("alora_invocation_tokens", [1])]:
        with pytest.raises(ConfigError, match=name):
            Config.from_dict({"target_modules": ["q"], name: value})
        with pytest.raises(ConfigError, match=name):
            Config(target_modules=["q"], extra={name: value})
    for name in ("r", "peft_type", "extra"):
        with pytest.raises(ConfigError, match="has a place of its own"):
            Config(extra={name: None})


@pytest.mark.parametrize("init, words", [
    ("pissa_niter_4", "path_initial_model_for_weight_conversion"), ("corda", "path_initial_model_for_weight_conversion"),
    ("lora_ga", "path_initial_model_for_weight_conversion")])
def test_starts_that_no_file_keeps_are_refused_with_the_way_out(init, words):
    with pytest.raises(ConfigError, match=words):
        Config(target_modules=["q"], init_lora_weights=init)


@pytest.mark.parametrize("tokens, message", [
    ([], "expected a list"), ({}, "the dict is empty"), (3, "expected a list"), ([1, True], "got [True]"), ([-1], "got [-1]"),
    ([1.0], "got [1.0]"), ([2 ** 63], "expected token numbers"), ([1, 2, 1], "[1] come twice"), ({"emb": None}, "'emb'"),
    ({"emb": [0, [1]]}, "got [[1]]"), ({"": [1]}, "expected names as keys"), ({"emb": {"a": [1]}}, "'emb'")], ids=str)
def test_tokens_that_are_no_tokens(tokens, message):
    with pytest.raises(ConfigError) as caught:
        Config(trainable_token_indices=tokens)
    assert message in str(caught.value) and "trainable_token_indices" in str(caught.value)


# -- files --------------------------------------------------------------------------------------------------

name = st.text("abcxyz_.0", min_size=1, max_size=8).filter(lambda s: s not in ("", "."))
names = st.lists(name, min_size=1, max_size=3, unique=True)
tokens = st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)
configs = st.builds(
    dict, r=st.integers(1, 64), lora_alpha=st.integers(1, 64) | st.floats(0.5, 64), lora_dropout=st.floats(0, 0.9),
    target_modules=st.none() | names, exclude_modules=st.none() | names | st.just(r".*\.h\.\d+"),
    layers_to_transform=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1),
    rank_pattern=st.dictionaries(name, st.integers(1, 9), max_size=2),
    alpha_pattern=st.dictionaries(name, st.floats(0.5, 9), max_size=2), bias=st.sampled_from(["none", "all", "lora_only"]),
    modules_to_save=st.none() | names, use_rslora=st.booleans(), use_dora=st.booleans(),
    init_lora_weights=st.sampled_from(INITS), fan_in_fan_out=st.booleans(), task_type=st.none() | st.just("SEQ_CLS"),
    trainable_token_indices=st.none() | tokens | st.dictionaries(name, tokens, min_size=1, max_size=2),
    base_model_name_or_path=st.none() | st.text(max_size=9), revision=st.none() | st.just("main"),
    auto_mapping=st.none() | st.dictionaries(name, name, min_size=1, max_size=2), inference_mode=st.booleans(),
    peft_version=st.none() | st.just("0.21.2"),
    extra=st.dictionaries(name, st.sampled_from([None, False, [], {}, ""]), max_size=2) | st.just({"eva_config": {"rho": 2.0}}))


@given(configs)
def test_round_trip_through_json(settings):
    config = Config(**settings)
    text = json.dumps(config.to_dict(), sort_keys=True)
    again = Config.from_dict(json.loads(text))
    assert again == config
    assert json.dumps(again.to_dict(), sort_keys=True) == text


PEFT_FILE = """{
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
  "base_model_name_or_path": "gpt2", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
  "eva_config": null, "exclude_modules": null, "fan_in_fan_out": true, "inference_mode": true,
  "init_lora_weights": true, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
  "loftq_config": {}, "lora_alpha": 32, "lora_bias": false, "lora_dropout": 0.1, "megatron_config": null,
  "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA", "peft_version": "0.18.0",
  "qalora_group_size": 16, "r": 16, "rank_pattern": {"c_proj": 4}, "revision": null,
  "target_modules": ["c_attn", "c_proj"], "target_parameters": null, "task_type": "CAUSAL_LM",
  "trainable_token_indices": null, "use_dora": false, "use_qalora": false, "use_rslora": true}"""


def test_a_file_as_peft_writes_it():
    config = Config.from_dict(json.loads(PEFT_FILE))
    assert config == Config(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
                            rank_pattern={"c_proj": 4}, use_rslora=True, base_model_name_or_path="gpt2", inference_mode=True,
                            peft_version="0.18.0", task_type="CAUSAL_LM")
    assert config.scaling_for(config.r, config.lora_alpha) == 8.0


def test_a_file_that_asks_for_more_is_refused_line_by_line():
    data = {**json.loads(PEFT_FILE), "peft_type": "LOHA", "kasa_config": {"rho": 2.0}, "layer_replication": [[0, 4]],
            "target_module": ["q"], "r": 0}
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(data)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for word in ("peft_type: expected 'LORA', got 'LOHA'", "kasa_config: this feature of PEFT is not part", "layer_replication",
                 "target_module: there is no such setting. Is 'target_modules' meant?", "r must be an int >= 1"):
        assert sum(word in line for line in lines) == 1, word


def test_empty_lists_in_a_file_mean_none():
    config = Config.from_dict({"target_modules": ["q"], "layers_to_transform": [], "layers_pattern": "", "exclude_modules": []})
    assert config == Config(target_modules=["q"])


@pytest.mark.parametrize("data", [None, [], "r"])
def test_no_dict_at_all(data):
    with pytest.raises(ConfigError, match="expected a dict"):
        Config.from_dict(data)


def test_numbers_of_numpy_are_numbers():
    config = Config(r=np.int64(4), lora_alpha=np.float32(8), lora_dropout=np.float32(0.5), target_modules=["0"],
                    rank_pattern={"0": np.int32(2)}, alpha_pattern={"0": np.int64(3)}, layers_to_transform=np.int64(1))
    text = json.dumps(config.to_dict())
    assert Config.from_dict(json.loads(text)) == config and '"lora_alpha": 8.0' in text and '"0": 3' in text
    assert scaling(np.int64(8), np.int64(4)) == 2.0 and type(scaling(np.float32(3), 2)) is float
    for wrong in (np.float32("inf"), np.float64("nan"), np.bool_(True), np.ones(1), 10 ** 400):
        with pytest.raises(ConfigError, match="lora_alpha must be a finite number"):
            scaling(wrong, 2)
