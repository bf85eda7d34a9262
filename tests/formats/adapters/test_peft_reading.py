"""PEFT's tensors and config as a SavedAdapter: what is read, and what is refused."""
import itertools
from pathlib import Path

import numpy as np
import pytest

from minilora.errors import ConfigError, FormatError
from minilora.formats.adapters.dialect import Source
from minilora.formats.adapters.reading import read_source
from minilora.lora import Config
from minilora.lora.gradient import delta

A, B = np.array([[1.0, 2.0, 3.0]], "float32"), np.array([[1.0], [2.0]], "float32")
P = "base_model.model."


def config(**settings):
    return {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["lin"], **settings}


def pair(path="lin", A=A, B=B, prefix=P):
    return {f"{prefix}{path}.lora_A.weight": A, f"{prefix}{path}.lora_B.weight": B}


def read(tensors, settings=None, metadata=None, **options):
    settings = config() if settings is None else settings
    return read_source(Source(Path("here"), tensors, metadata or {}, settings or None), **options)


def refused(tensors, settings=None, **options):
    with pytest.raises(FormatError) as caught:
        read(tensors, settings, **options)
    return str(caught.value)


def test_a_linear_layer():
    adapter = read(pair(), metadata={"format": "pt"})
    update = adapter.updates["lin"]
    assert (update.kind, update.s, update.r, adapter.dialect) == ("linear", 2.0, 1, "peft")
    assert update.A is A and update.B is B  # not copied
    assert adapter.metadata == {"format": "pt"} and adapter.notes == () and adapter.config.r == 1


SPELLINGS = ["{}lin.lora_A.weight", "_orig_mod.{}lin.lora_A.weight", "{}_orig_mod.lin.lora_A.weight",
             "module.lin.lora_A.weight", "lin.lora_A.weight", "{}lin.lora_A.default.weight",
             "{}lin.lora_A.default.default.weight",
             "module._orig_mod.module.{}lin.lora_A.my-own.weight", "{}_fsdp_wrapped_module.lin._orig_mod.lora_A.weight"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_name(spelling):
    key = spelling.format(P)
    adapter = read({key: A, key.replace("lora_A", "lora_B"): B})
    assert [*adapter.updates] == ["lin"]
    assert (delta(adapter.updates["lin"].A, adapter.updates["lin"].B, adapter.updates["lin"].s) == 2 * B @ A).all()


def test_a_prefix_in_the_middle_is_taken_out():
    assert [*read(pair("lin", prefix="thinker.base_model.model.")).updates] == ["thinker.lin"]


def test_two_spellings_of_one_name_are_refused():
    text = refused({**pair(), "lin.lora_A.weight": A + 1})
    assert "means the same as base_model.model.lin.lora_A.weight, and differs" in text


def test_several_adapters_in_one_file_are_refused():
    tensors = {f"{P}{path}.lora_{which}.{name}.weight": array for path, name in (("lin", "default"), ("fc", "other"))
               for which, array in (("A", A), ("B", B))}
    assert "several adapters in one file: default, other" in refused(tensors)


def test_an_embedding():
    a, b = np.array([[0.0, 1.0, 0.0]]), np.array([[1.0], [2.0]])
    adapter = read({f"{P}emb.lora_embedding_A": a, f"{P}emb.lora_embedding_B": b}, config(target_modules=["emb"]))
    update = adapter.updates["emb"]
    table = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) + delta(update.A, update.B, update.s).T
    assert update.kind == "embedding" and table.tolist() == [[1, 0], [2, 5], [1, 1]]


@pytest.mark.parametrize("axes, groups", [*itertools.product((1, 2, 3), (1, 2))])
def test_convolutions(axes, groups):
    a, b = np.ones((4, 3, *[5] * axes)), np.ones((6, 4 // groups, *[1] * axes))
    update = read(pair(A=a, B=b), config(r=4, lora_alpha=4)).updates["lin"]
    assert update.kind == "convolution" and update.A is a and update.B is b and update.s == 1.0


def test_a_stored_transpose_changes_nothing_about_the_factors():
    adapter = read(pair(A=np.array([[1.0, 1.0]]), B=np.array([[1.0], [0.0], [2.0]])), config(lora_alpha=1, fan_in_fan_out=True))
    update = adapter.updates["lin"]
    W = np.array([[1.0, 2, 3], [4, 5, 6]])  # as stored, (in, out)
    assert (W + delta(update.A, update.B, update.s).T).tolist() == [[2, 2, 5], [5, 5, 8]] and adapter.config.fan_in_fan_out


LENGTHS = ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default",
           "lora_magnitude_vector.default.weight", "magnitude"]


@pytest.mark.parametrize("ending", LENGTHS)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1), (1, 2, 1), (1, 2, 1, 1), (1, 2, 1, 1, 1)], ids=str)
def test_lengths_of_dora(ending, shape):
    m = np.array([10.0, 2.0], "float32")
    update = read({**pair(), f"{P}lin.{ending}": m.reshape(shape)}, config(use_dora=True)).updates["lin"]
    assert update.magnitude.tolist() == [10.0, 2.0] and update.magnitude.shape == (2,)


def test_lengths_and_config_must_agree():
    m = np.ones(2, "float32")
    assert "the config has use_dora, and lin has no lora_magnitude_vector" in refused(pair(), config(use_dora=True))
    assert "the config does not have use_dora" in refused({**pair(), f"{P}lin.lora_magnitude_vector": m})
    three = {**pair(), f"{P}lin.lora_magnitude_vector": np.ones(3)}
    assert "expected (2,), as many as the rows of B" in refused(three, config(use_dora=True))


def test_the_bias_of_an_update():
    tensors = {**pair(), f"{P}lin.lora_B.bias": np.ones(2, "float32")}
    assert read(tensors, config(lora_bias=True)).updates["lin"].bias.tolist() == [1, 1]
    assert "the config does not have lora_bias" in refused(tensors)
    assert "the config has lora_bias, and lin has no lora_bias" in refused(pair(), config(lora_bias=True))


@pytest.mark.parametrize("spelling", ["lin.base_layer.bias", "lin.bias"])
@pytest.mark.parametrize("mode", ["lora_only", "all", "none"])
def test_biases_of_the_base(spelling, mode):
    adapter = read({**pair(), f"{P}{spelling}": np.ones(2)}, config(bias=mode))
    assert [*adapter.biases] == ["lin.bias"] and not adapter.saved
    assert bool(adapter.notes) == (mode == "none")


def test_all_biases_and_a_saved_module():
    """bias="all" writes the bias of a saved module under three names, one of them the base's own."""
    head, own = np.ones(3), np.zeros(3)
    adapter = read({**pair(), f"{P}ln.bias": np.ones(2), f"{P}head.weight": np.ones((3, 2)), f"{P}head.bias": head,
                    f"{P}head.modules_to_save.bias": head, f"{P}head.original_module.bias": own},
                   config(bias="all", modules_to_save=["head"]))
    assert [*adapter.biases] == ["ln.bias"] and [*adapter.saved] == ["head.weight", "head.bias"]
    assert adapter.saved["head.bias"] is head and "head.original_module.bias: the base's own" in adapter.notes[0]
    again = read({**pair(), f"{P}head.modules_to_save.default.weight": np.ones((3, 2))}, config(modules_to_save=["head"]))
    assert [*again.saved] == ["head.weight"]


def test_saved_modules():
    tensors = {**pair(), f"{P}head.weight": np.ones((3, 2)), f"{P}head.bias": np.ones(3)}
    adapter = read(tensors, config(modules_to_save=["head"]))
    assert [*adapter.saved] == ["head.weight", "head.bias"] and adapter.notes == ()
    adapter = read(tensors)  # what the file holds decides
    assert [*adapter.saved] == ["head.weight", "head.bias"]
    assert "modules_to_save does not name it: head.weight" in adapter.notes[0]
    batch_norm = {f"{P}bn.running_mean": np.ones(2), f"{P}bn.num_batches_tracked": np.array(3)}
    assert len(read({**pair(), **batch_norm}, config(modules_to_save=["bn"])).saved) == 2
    assert "no part of an adapter" in refused({**pair(), **batch_norm})
    assert "'head': the file holds no such module" in refused(pair(), config(modules_to_save=["head"]))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_heads_that_the_task_type_names(task):
    """PEFT appends classifier and score, and matches by the end of a name without a dot: pre_classifier too."""
    tensors = {**pair(), f"{P}classifier.weight": np.ones((3, 2)), f"{P}pre_classifier.weight": np.ones((2, 2)),
               f"{P}classifier.dense.out_proj.weight": np.ones((2, 2))}
    adapter = read(tensors, config(task_type=task, modules_to_save=["classifier", "score"]))
    assert len(adapter.saved) == 3 and adapter.notes == ()
    assert read(tensors, config(task_type=task, modules_to_save=None)).notes == ()
    assert "'score': the file holds" in refused(tensors, config(modules_to_save=["classifier", "score"]))


def test_an_embedding_saved_beside_its_update():
    tensors = {f"{P}embed_tokens.lora_embedding_A": np.ones((1, 3)), f"{P}embed_tokens.lora_embedding_B": np.ones((2, 1)),
               f"{P}embed_tokens.base_layer.weight": np.ones((3, 2))}
    adapter = read(tensors, config(target_modules=["embed_tokens"]))
    assert [*adapter.saved] == ["embed_tokens.weight"] and "saved beside its update" in adapter.notes[0]


def test_attention_inside_an_updated_module():
    adapter = read({**pair("att"), **pair("att.base_layer.out_proj"),
                    f"{P}att.base_layer.out_proj.base_layer.bias": np.ones(2)},
                   config(target_modules=["att", "out_proj"], bias="lora_only"))
    assert [*adapter.updates] == ["att", "att.out_proj"] and [*adapter.biases] == ["att.out_proj.bias"]


def test_tokens():
    rows = np.ones((2, 4))
    key = f"{P}model.emb.token_adapter.trainable_tokens_delta"
    for indices in ([1, 3], {"emb": [1, 3]}):
        tokens = read({**pair(), key: rows}, config(trainable_token_indices=indices)).tokens
        assert [*tokens] == ["model.emb"] and tokens["model.emb"].indices == (1, 3) and tokens["model.emb"].rows is rows
    text = refused({**pair(), key: rows}, config(trainable_token_indices=[1, 2, 3]))
    assert "trainable_token_indices has 3 tokens: expected (3, d)" in text
    assert "which tokens?" in refused({**pair(), key: rows})
    assert "which tokens?" in refused({**pair(), key: rows}, config(trainable_token_indices={"wte": [1, 3]}))
    assert "holds no trainable_tokens_delta" in refused(pair(), config(trainable_token_indices=[1]))
    assert "emb: the file holds no" in refused(pair(), config(trainable_token_indices={"emb": [1]}))


def test_scalings():
    tensors = {**pair(A=np.ones((2, 3)), B=np.ones((2, 2))), **pair("head", np.ones((4, 3)), np.ones((2, 4))),
               **pair("a.head", np.ones((2, 3)), np.ones((2, 2)))}
    adapter = read(tensors, config(r=2, lora_alpha=4, use_rslora=True, rank_pattern={"^head": 4}, alpha_pattern={"^head": 2},
                                   target_modules=["lin", "head"]))
    assert {path: update.s for path, update in adapter.updates.items()} == {
        "lin": 4 / 2 ** 0.5, "head": 1.0, "a.head": 4 / 2 ** 0.5}


def test_ranks_that_the_config_contradicts():
    text = refused(pair(A=np.ones((32, 3)), B=np.ones((2, 32))), config(r=8))
    assert "rank 32, and the config says 8" in text and "base_model.model.lin.lora_A.weight" in text and "(32, 3)" in text
    assert "rank 1, and the config says 2" in refused(pair(), config(rank_pattern={"lin": 2}))


@pytest.mark.parametrize("first", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("second", ["float16", "bfloat16", "float32", "float64"])
def test_two_float_types_are_widened_to_the_one_that_holds_both(first, second):
    if "bfloat16" in (first, second):
        pytest.importorskip("ml_dtypes")
    found = read(pair(A=np.full((1, 3), 1.5).astype(first), B=np.full((2, 1), 0.25).astype(second))).updates["lin"]
    wide = first if first == second else "float64" if "float64" in (first, second) else "float32"
    assert found.A.dtype == found.B.dtype == wide
    assert (found.B.astype("float64") @ found.A.astype("float64") == 0.375).all()


@pytest.mark.parametrize("own", ["", "modules_to_save.", "modules_to_save.poems.", "modules_to_save.poems.poems."])
def test_a_saved_module_under_the_name_of_an_adapter(own):
    """As the updates of the file tell it; a name that they do not tell is a module inside of that which is saved."""
    tensors = {f"{P}lin.lora_A.poems.weight": A, f"{P}lin.lora_B.poems.weight": B, f"{P}head.{own}weight": B}
    assert list(read(tensors, config(modules_to_save=["head"])).saved) == ["head.weight"]
    tensors = {**pair(), f"{P}head.modules_to_save.poems.weight": B}
    assert list(read(tensors, config(modules_to_save=["head"])).saved) == ["head.poems.weight"]


BROKEN = {
    "half": ({f"{P}lin.lora_A.weight": A}, "lora_A without lora_B"),
    "other half": ({f"{P}lin.lora_B.weight": B}, "lora_B without lora_A"),
    "lengths alone": ({f"{P}lin.lora_magnitude_vector": B[:, 0]}, "this without lora_A"),
    "half of an embedding": ({f"{P}lin.lora_embedding_B": B}, "without lora_embedding_A"),
    "both kinds": ({**pair(), f"{P}lin.lora_embedding_A": A, f"{P}lin.lora_embedding_B": B}, "an embedding's update and"),
    "ranks": (pair(B=np.ones((2, 2), "float32")), "A is (1, 3): expected (out, 1)"),
    "integers": (pair(A=np.ones((1, 3), "int8"), B=np.ones((2, 1), "int8")), "int8: expected one of"),
    "no axes": (pair(A=np.array(1.0), B=np.array(1.0)), "expected (r, in)"),
    "one axis": (pair(A=np.ones(3), B=np.ones(3)), "expected (r, in)"),
    "empty": (pair(A=np.ones((0, 3)), B=np.ones((2, 0))), "none of them 0"),
    "no outputs": (pair(A=np.ones((1, 3)), B=np.ones((0, 1))), "expected (out, 1)"),
    "kernel of B": (pair(A=np.ones((1, 3, 5)), B=np.ones((2, 1, 5))), "expected (out, r / groups, 1)"),
    "axes of a kernel": (pair(A=np.ones((1, 3, 5)), B=np.ones((2, 1))), "expected (out, r / groups, 1)"),
    "groups": (pair(A=np.ones((3, 3, 5)), B=np.ones((4, 1, 1))), "expected (out, r / groups, 1)"),
    "too many axes": (pair(A=np.ones((1, 1, 1, 1, 1, 1)), B=np.ones((1, 1, 1, 1, 1, 1))), "more than 3 axes"),
    "ending": ({**pair(), f"{P}lin.lora_A.gamma.beta.alpha": A}, "not an ending that PEFT writes"),
    "a key alone": ({**pair(), "what": A}, "not an ending"),
    "an empty key": ({**pair(), "": A}, "not an ending"),
    "dots": ({**pair(), "...": A}, "not an ending"),
    "target_parameters": ({**pair(), **pair("lin.base_layer")}, "target_parameters, which minilora lacks"),
    "another dialect": ({**pair(), f"{P}fc.lora_down.weight": A}, "none that PEFT writes"),
    "small letters": ({**pair(), f"{P}fc.lora_a.bias": A}, "none that PEFT writes"),
    "something else": ({**pair(), f"{P}lin.scale": A}, "no part of an adapter"),
}


@pytest.mark.parametrize("tensors, message", [*BROKEN.values()], ids=BROKEN)
def test_what_is_broken_is_refused(tensors, message):
    assert message in refused(tensors)


def test_all_that_is_wrong_comes_in_one_table():
    text = refused({**pair("a", B=np.ones((2, 3), "float32")), **pair("b", np.ones((2, 3)), np.ones((2, 2))), f"{P}x.scale": A})
    assert text.startswith("here: 3 problems") and len(text.splitlines()) == 6


def test_many_faults_and_long_names_make_a_short_message():
    text = refused({**pair(), **{f"{P}{'x' * 9999}\n{i}.scale": A for i in range(999)}})
    assert len(text) < 10_000 and "and 979 more" in text


def test_nan_and_inf_are_refused_by_name_and_count():
    A_bad, B_bad = A.copy(), B.copy()
    A_bad[0, :2], B_bad[1] = np.nan, np.inf
    tensors = {**pair("one", A_bad, B), **pair("two", A, B_bad)}
    text = refused(tensors, config(target_modules=["one", "two"]))
    for line in ("base_model.model.one.lora_A.weight  (1, 3)  2 NaN", "base_model.model.two.lora_B.weight  (2, 1)  1 inf",
                 "allow_nonfinite=True"):
        assert line in text
    adapter = read(tensors, config(target_modules=["one", "two"]), allow_nonfinite=True)
    assert np.isnan(adapter.updates["one"].A).sum() == 2 and len(adapter.notes) == 2


@pytest.mark.parametrize("zero", ["A", "B"])
def test_an_adapter_of_zeros_is_read_with_a_note(zero):
    arrays = {"A": A, "B": B, zero: np.zeros_like({"A": A, "B": B}[zero])}
    assert read(pair(**arrays)).notes == ("untrained: every update is 0",)


def test_half_precision():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in ("float16", ml_dtypes.bfloat16):
        adapter = read(pair(A=A.astype(dtype), B=np.zeros_like(B).astype(dtype)))
        assert adapter.updates["lin"].A.dtype == dtype and adapter.notes == ("untrained: every update is 0",)
        assert "1 inf" in refused(pair(A=A.astype(dtype), B=np.full_like(B, [[np.inf], [0]]).astype(dtype)))
    eighth = ml_dtypes.float8_e4m3fn
    assert "float8_e4m3fn: expected one of" in refused(pair(A=A.astype(eighth), B=B.astype(eighth)))


def test_no_tensors():
    assert "no part of an adapter" in refused({})


def test_tensors_without_a_config():
    text = refused(pair(), {})
    assert "no adapter_config.json beside them" in text and "config=lora.Config(" in text
    adapter = read(pair(), {}, config=Config(r=1, lora_alpha=3, target_modules=["lin"]))
    assert adapter.updates["lin"].s == 3.0


def test_a_target_that_the_file_lacks_is_a_note():
    assert read(pair(), config(target_modules=["lin", "q"])).notes == ("target_modules has 'q', and the file no update for it",)


FOREIGN = {"lin.hada_w1_a": "LoHa", "lin.lokr_w2": "LoKr", f"{P}lin.lora_E": "AdaLoRA", f"{P}lin.vera_lambda_b": "VeRA",
           f"{P}lin.ia3_l": "IA3", "lin.oft_blocks": "OFT", "unet:9:up": "cloneofsimo", "text_encoder:0:down": "cloneofsimo",
           "lin.parametrizations.weight.0.lora_A": "minLoRA", "prompt_embeddings": "prefix"}


@pytest.mark.parametrize("key, method", [*FOREIGN.items()], ids=str)
def test_other_methods_are_named(key, method):
    text = refused({key: A, **pair()})
    assert method in text and key in text


@pytest.mark.parametrize("method", ["LOHA", "ADALORA", "OFT", "PREFIX_TUNING", None, 7, ["LORA"], {"a": 1}])
def test_peft_types_that_are_not_lora(method):
    text = refused(pair(), config(peft_type=method))
    assert "peft_type" in text and repr(method) in text


def test_settings_of_the_config():
    ok = [{"enable_lora": None, "merge_weights": False}, {"init_lora_weights": False}, {"init_lora_weights": "eva"},
          {"init_lora_weights": "mica"}, {"new": None}, {"new": False}, {"lora_alpha": 2.0}, {"loftq_config": {}},
          {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, {"corda_config": {"verbose": False}},
          {"runtime_config": {"x": 1}}]
    for settings in ok:
        adapter = read(pair(), config(**settings))
        assert adapter.updates["lin"].s == 2.0
        named = any(name in str(adapter.notes) for name in settings)
        assert named == any(name in ("enable_lora", "new") for name in settings), settings
    text = refused(pair(), config(new=3, newer="yes"))
    assert "new: there is no such setting" in text and "newer: " in text and "allow_settings=['new', 'newer']" in text
    assert read(pair(), config(new=3, newer="yes"), allow_settings=["new", "newer"]).notes == (
        "settings passed over, as asked: new, newer",)
    text = refused(pair(), config(target_parameters=["experts.gate_up_proj"], init_lora_weights="pissa_niter_4", new=1))
    for words in ("here: adapter_config.json: 3 problems", "target_parameters", "path_initial_model", "new"):
        assert words in text
    assert "allow_settings" not in text
    assert "target_parameters" in refused(pair(), config(target_parameters=["e"]), allow_settings=["target_parameters"])


HOSTILE = [{"r": 10 ** 9}, {"r": True}, {"r": 1.0}, {"r": None}, {"r": [1]}, {"r": 0}, {"r": -1}, {"r": 10 ** 4000},
           {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": 0}, {"lora_alpha": 10 ** 400},
           {"lora_alpha": "2"}, {"lora_dropout": 2}, {"target_modules": [["lin"]]}, {"target_modules": {"lin": 1}},
           {"target_modules": "("}, {"target_modules": 3}, {"rank_pattern": [["lin", 1]]}, {"rank_pattern": {"lin": [1]}},
           {"rank_pattern": {"(": 1}}, {"rank_pattern": {"lin": True}}, {"alpha_pattern": {"lin": float("nan")}}, {"bias": []},
           {"bias": {}}, {"modules_to_save": [[]]}, {"modules_to_save": "head"}, {"use_dora": "yes"}, {"use_rslora": 1},
           {"init_lora_weights": {}}, {"init_lora_weights": []}, {"layers_to_transform": [[0]]}, {"layers_pattern": [1]},
           {"task_type": 3}, {"task_type": ["SEQ_CLS"]}, {"auto_mapping": [1]}, {"auto_mapping": {"a": {"b": 1}}},
           {"inference_mode": 1}, {"revision": {}, "peft_version": 3}, {"eva_config": [[1]]},
           {"eva_config": {"rho": float("nan")}},
           {"trainable_token_indices": {"emb": {"a": 1}}}, {"trainable_token_indices": 5}, {"extra": {"r": 1}}, {"extra": 1},
           {"fan_in_fan_out": None}, {"megatron_core": 3}, {"qalora_group_size": True}, {"x" * 999: 1}, {"new": "y" * 10 ** 6}]


@pytest.mark.parametrize("settings", HOSTILE, ids=lambda value: str(value)[:40])
def test_hostile_configs(settings):
    with pytest.raises((FormatError, ConfigError)) as caught:
        read(pair(), config(**settings))
    assert len(str(caught.value)) < 5000


ENDLESS = [{"rank_pattern": {"(a+)+b": 2}}, {"alpha_pattern": {r"(x|\)*)*": 2}}, {"target_modules": "(?:.*){2,}y"},
           {"exclude_modules": "(a*)+?b"}, {"layers_to_transform": [1], "layers_pattern": ["h", "(h+)*"]}]


@pytest.mark.parametrize("settings", ENDLESS, ids=str)
def test_expressions_that_may_never_end(settings):
    assert "repeats a group without end" in refused(pair("a" * 60), config(**settings))
    assert "has 2,000,000 characters" in refused(pair(), config(target_modules="[" * 2_000_000))


def test_expressions_that_end():
    for text in (r"(.*\.)?(lin)", r"[)+*]*lin", r".*\)?\)*lin|lin", "[])*]*lin", "[^])+]*lin", "(li){1,2}n", "(?:l|x)in"):
        assert read(pair(), config(rank_pattern={text: 1})).updates["lin"].r == 1


def test_a_key_for_each_of_a_thousand_layers():
    paths = [f"h.{i}.lin" for i in range(1000)]
    tensors = {key: array for path in paths for key, array in pair(path, np.ones((1, 1)), np.ones((1, 1))).items()}
    pattern = {f"^h\\.{i}\\.lin": i + 1 for i in range(1000)}
    adapter = read(tensors, config(alpha_pattern=pattern))
    assert [update.s for update in adapter.updates.values()] == [*range(1, 1001)]


def test_two_dialects_in_one_file():
    other = "lora_unet_x.lora_down.weight"
    tensors = {**pair(), other: A, "lora_unet_x.lora_up.weight": B}
    assert f"two dialects in one file: peft ({P}lin.lora_A.weight) and kohya ({other})" in refused(tensors, {})
    assert other in refused(tensors)  # the config says whose the file is, not what all of it is
    assert other in refused(tensors, {}, dialect="peft", config=Config(r=1, target_modules=["lin"]))


def test_dialect_by_name():
    assert read(pair(), dialect="peft").updates
    with pytest.raises(ConfigError, match="dialect: expected one of 'peft'"):
        read(pair(), dialect="pefft")
    with pytest.raises(ConfigError, match="'peft' has no option 'rank' to read: it takes config, allow_settings"):
        read(pair(), rank=3)
    for options in ({"config": {"r": 1}}, {"allow_settings": "new"}, {"allow_settings": [1]}):
        with pytest.raises(ConfigError, match="expected a l"):
            read(pair(), **options)
    assert "no adapter in a dialect" in refused({"a.weight": A}, {})
