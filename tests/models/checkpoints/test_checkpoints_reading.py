"""Checkpoints loaded: transformers' stored numbers, what files look like, how weights are held, and what is refused."""
import copy
import json
import os
import pickle

import numpy as np
import pytest
from checkpoint_cases import ARCHITECTURES, batch, labels_of, numbers, write_vectors

import minilora
from conftest import fetch, place
from minilora import lora, models, nn, optim
from minilora.errors import ConfigError, FileError, FormatError
from minilora.formats.tensors.writing import save_state
from minilora.models.checkpoints.names import common_name
from minilora.models.checkpoints.writing import family_of

IDS, MASK = batch("gpt2", "left")


def close(ours, expected, tolerance=1e-10):
    expected = np.asarray(expected)
    np.testing.assert_allclose(fetch(ours), expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)))


def refused(folder, *texts, kind=FormatError, **settings):
    with pytest.raises(kind) as caught:
        models.load(folder, **settings)
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    return str(caught.value)


# -- transformers' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_vectors(architecture, tmp_path, device):
    vectors = write_vectors(tmp_path, architecture)
    family, kind = ARCHITECTURES[architecture]
    own = models.load(tmp_path)
    assert not own.training and {p.device.name for p in own.parameters()} == {device}
    ids, mask = batch(family, "left")
    y = own(ids, attention_mask=mask)
    seen = np.ones(len(ids), bool) if kind == "text" else mask == 1
    close(fetch(y)[seen], np.array(vectors["output"])[seen])
    loss = (y * minilora.Tensor(place(mask[..., None].astype(float)))) ** 2.0 if kind == "hidden" else own(
        ids, labels_of(kind, ids, mask), attention_mask=mask)
    loss = loss.mean() if kind == "hidden" else loss
    close(loss, vectors["loss"])
    loss.backward()
    for path, p in own.named_parameters():
        name = common_name(path, *family_of(own))
        prefix = family_of(own)[0].prefix
        name = name if name in vectors["tensors"] else name.removeprefix(prefix)
        gradient = np.zeros(p.shape) if p.grad is None else fetch(p.grad)
        gradient = gradient.T if name.endswith(family_of(own)[0].transposed) else gradient
        np.testing.assert_allclose((gradient * numbers("gradient", gradient.shape)).sum(), vectors["gradients"].get(name, 0.0),
                                   rtol=1e-8, atol=1e-12, err_msg=name)


# -- what files look like ----------------------------------------------------------------------------------------------


def with_prefix(prefix):
    return lambda name: prefix + name


def old_norms(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


SAME = [  # architecture, changes to the file that mean the same model
    ("GPT2LMHeadModel", dict(rename=lambda name: name.removeprefix("transformer."))),
    ("GPT2LMHeadModel", dict(rename=with_prefix("module."))),
    ("GPT2LMHeadModel", dict(rename=with_prefix("_orig_mod.module."))),
    ("GPT2LMHeadModel", {"lm_head.weight": numbers("transformer.wte.weight", (13, 8))}),
    ("GPT2LMHeadModel", {"rename": lambda name: None if "wte" in name else name,  # the copy alone
                         "lm_head.weight": numbers("transformer.wte.weight", (13, 8))}),
    ("GPT2LMHeadModel", {f"transformer.h.{i}.attn.{name}": array for i in (0, 1) for name, array in
                         [("bias", np.ones((1, 1, 12, 12), bool)), ("masked_bias", np.array(-1e4, "float32"))]}),
    ("GPT2LMHeadModel", {"transformer.h.0.attn.bias": np.ones((1, 1, 12, 12), "uint8")}),
    ("GPT2LMHeadModel", {"multiple_choice_head.summary.weight": np.ones((1, 8))}),
    ("GPT2LMHeadModel", dict(config={"architectures": ["GPT2DoubleHeadsModel"]})),
    ("GPT2LMHeadModel", dict(config={"torch_dtype": "float64", "dtype": None})),
    ("GPT2LMHeadModel", dict(config={"torch_dtype": "float64", "dtype": "float64"})),
    ("BertForMaskedLM", dict(rename=old_norms)),
    ("BertForMaskedLM", {"cls.predictions.decoder.weight": numbers("bert.embeddings.word_embeddings.weight", (13, 8)),
                         "cls.predictions.decoder.bias": numbers("cls.predictions.bias", (13,)),
                         "bert.pooler.dense.weight": np.ones((8, 8)), "bert.pooler.dense.bias": np.ones(8),
                         "cls.seq_relationship.weight": np.ones((2, 8)), "cls.seq_relationship.bias": np.ones(2),
                         "bert.embeddings.position_ids": np.arange(12)[None]}),
    ("BertForMaskedLM", dict(config={"architectures": ["BertForPreTraining"]})),
    ("BertModel", dict(rename=with_prefix("bert."))),
    ("BertModel", dict(rename=with_prefix("model.bert."))),
    ("BertModel", dict(rename=with_prefix("0.auto_model."))),
    ("RobertaForMaskedLM", {"roberta.embeddings.token_type_ids": np.zeros((1, 12), "int64")}),
    ("RobertaForMaskedLM", {"lm_head.decoder.bias": numbers("lm_head.bias", (13,))}),
    ("DistilBertModel", dict(rename=with_prefix("distilbert."))),
]


@pytest.mark.parametrize("architecture, changes", SAME, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SAME)])
def test_the_same_model_in_another_spelling(architecture, changes, tmp_path):
    vectors = write_vectors(tmp_path, architecture, **changes)
    own = models.load(tmp_path)
    family, kind = ARCHITECTURES[architecture]
    ids, mask = batch(family, "left")
    seen = mask == 1
    close(fetch(own(ids, attention_mask=mask))[seen], np.array(vectors["output"])[seen])


def test_a_body_without_its_pooler(tmp_path):
    write_vectors(tmp_path, "BertModel", rename=lambda name: None if name.startswith("pooler") else name)
    own = models.load(tmp_path)
    assert own.pooler is None
    models.save(own, tmp_path / "again")
    assert models.load(tmp_path / "again").pooler is None


def test_what_the_config_leaves_out_means_what_transformers_means(tmp_path):
    out = {"embd_pdrop": None, "resid_pdrop": None, "activation_function": None, "layer_norm_epsilon": None,
           "classifier_dropout": None}
    write_vectors(tmp_path, "GPT2LMHeadModel", config=out)
    config = models.load(tmp_path).config
    assert (config.embd_pdrop, config.resid_pdrop, config.classifier_dropout) == (0.1, 0.1, 0.1)
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_new", 1e-5)
    write_vectors(tmp_path, "DistilBertForSequenceClassification", config={"dropout": None, "seq_classif_dropout": None})
    own = models.load(tmp_path)
    assert (own.config.dropout, own.config.seq_classif_dropout, own.drop.p) == (0.1, 0.2, 0.2)


def test_training_has_the_dropout_of_the_file(tmp_path):
    write_vectors(tmp_path, "BertForSequenceClassification", config={"hidden_dropout_prob": 0.3, "classifier_dropout": 0.4,
                                                                     "attention_probs_dropout_prob": 0.1})
    own = models.load(tmp_path, rng=1)
    ids, _ = batch("bert", "none")
    assert own.drop.p == 0.4 and own.bert.drop.p == own.bert.encoder.layer[1].drop.p == 0.3
    assert (fetch(own(ids)) == fetch(own(ids))).all()
    own.train()
    assert (fetch(own(ids)) != fetch(own(ids))).any()
    assert "attention_probs_dropout_prob is 0.1" in own.origin.notes[0]
    seeds = [models.load(tmp_path, rng=rng).drop.seed for rng in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_heads(tmp_path):
    """Another head than the file's: drawn if the file has none, refused by name, and the body alone."""
    write_vectors(tmp_path, "BertForMaskedLM")
    own = models.load(tmp_path, head="sequence_classification", labels=["a", "b"], rng=3)
    assert own.labels.names == ("a", "b") and own.classifier.weight.shape == (2, 8)
    assert "drawn, because the file has no such head: bert.pooler.dense.weight" in own.origin.notes[-2]
    same = models.load(tmp_path, head="token_classification", labels=4, rng=3)
    assert same.classifier.weight.shape == (4, 8) and np.abs(fetch(same.classifier.weight)).max() < 0.2
    assert not fetch(same.classifier.bias).any() and "classifier.weight" in same.origin.notes[-2]
    base = models.load(tmp_path, head="base")
    assert type(base) is nn.Bert and base.pooler is None
    refused(tmp_path, "head must be one of base, masked_lm", head="causal", kind=ConfigError)
    refused(tmp_path, "labels and problem_type are for classifiers", labels=3, kind=ConfigError)
    write_vectors(tmp_path, "BertForSequenceClassification", config={"id2label": {"0": "x", "1": "y", "2": "z"}})
    assert models.load(tmp_path).labels.names == ("x", "y", "z")
    refused(tmp_path, "shape       classifier.weight: expected (2, 8), got (3, 8)", labels=2)
    write_vectors(tmp_path, "BertForMaskedLM", config={"architectures": ["BertForSequenceClassification"]})
    refused(tmp_path, "missing     classifier.weight (2, 8)", "begin with a new one")


def test_dtypes(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for kind in ("float16", ml_dtypes.bfloat16):
        vectors = write_vectors(tmp_path, "GPT2LMHeadModel", dtype=kind)
        own = models.load(tmp_path)
        assert {p.dtype.name for p in own.parameters()} == {"float32"}
        close(own(IDS, attention_mask=MASK).numpy()[MASK == 1], np.array(vectors["output"])[MASK == 1], 0.1)
    write_vectors(tmp_path, "GPT2LMHeadModel", dtype="float32")
    for dtype in ("float16", "float32", "float64", np.float64):
        assert {p.dtype for p in models.load(tmp_path, dtype=dtype).parameters()} == {np.dtype(dtype)}
    refused(tmp_path, "dtype must be None, 'keep' or one of float16", dtype="int8", kind=ConfigError)
    refused(tmp_path, "dtype must be None", dtype="no such", kind=ConfigError)


# -- how weights are held ------------------------------------------------------------------------------------------------


def test_weights_are_views_of_the_file(tmp_path):
    """Read-only, whole and transposed; and no program of ours changes the file."""
    write_vectors(tmp_path, "GPT2LMHeadModel", dtype="float32")
    before = (tmp_path / "model.safetensors").read_bytes()
    own = models.load(tmp_path)
    for name, p in own.named_parameters():
        assert not p.data.flags.writeable and not p.data.flags.owndata and p.data.flags.aligned, name
        assert p.data.flags.forc, name
    shares = own.h[0].attn.c_attn.weight.data
    assert shares.shape == (24, 8) and shares.flags.f_contiguous and not shares.flags.c_contiguous
    expected = own(IDS, attention_mask=MASK).numpy()
    state = own.state_dict()
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other(IDS, attention_mask=MASK).numpy().tobytes() == expected.tobytes()
        other.load_state_dict(state)  # arrays in C order: products are summed otherwise
        np.testing.assert_allclose(other(IDS, attention_mask=MASK).numpy(), expected, atol=1e-5)
    optimizer = optim.Adam(own.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        own.loss(IDS, IDS).backward()
        optimizer.step()
    assert np.abs(own(IDS, attention_mask=MASK).numpy() - expected).max() > 1e-3
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert models.load(tmp_path)(IDS, attention_mask=MASK).numpy().tobytes() == expected.tobytes()


def test_only_what_is_trained_is_copied(tmp_path):
    write_vectors(tmp_path, "GPT2LMHeadModel", dtype="float32")
    own = models.load(tmp_path).requires_grad(False)
    own.ln_f.weight.trainable = own.h[1].mlp.c_fc.weight.trainable = True
    optimizer = optim.SGD(own.parameters(), lr=0.1)
    own.loss(IDS, IDS).backward()
    optimizer.step()
    assert [name for name, p in own.named_parameters() if p.data.flags.writeable] == ["h.1.mlp.c_fc.weight", "ln_f.weight"]


def test_adapters_on_views(tmp_path):
    """Training, merging and its exact way back, baking, moving: as on weights of one's own."""
    write_vectors(tmp_path, "GPT2LMHeadModel", dtype="float32")
    before = (tmp_path / "model.safetensors").read_bytes()
    plain = models.load(tmp_path)
    expected = plain(IDS).numpy()
    outputs = []
    for own in (models.load(tmp_path), copy.deepcopy(plain)):
        lora.inject(own, lora.Config(r=2, target_modules=["c_attn", "c_proj", "wte"]), rng=0)
        optimizer = optim.Adam(own.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            own.loss(IDS, IDS).backward()
            optimizer.step()
        trained = own(IDS).numpy()
        lora.merge(own)
        np.testing.assert_allclose(own(IDS).numpy(), trained, atol=1e-4)
        lora.unmerge(own)
        assert own(IDS).numpy().tobytes() == trained.tobytes()
        lora.bake(own)
        models.save(own, tmp_path / "baked")
        again = models.load(tmp_path / "baked")
        assert {name: a.tobytes() for name, a in again.state_dict().items()} == {
            name: a.tobytes() for name, a in own.state_dict().items()}
        np.testing.assert_allclose(again(IDS).numpy(), own(IDS).numpy(), atol=1e-5)
        outputs.append(trained)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)  # in another layout products are summed otherwise
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert plain(IDS).numpy().tobytes() == expected.tobytes()
    assert plain.to(dtype="float64").h[0].attn.c_attn.weight.dtype == np.float64


def test_a_tensor_at_an_odd_place_is_copied(tmp_path):
    """Views that are not aligned would be copied in each product."""
    write_vectors(tmp_path, "BertModel", dtype="float32")
    data = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    (tmp_path / "model.safetensors").write_bytes((n + 1).to_bytes(8, "little") + data[8:8 + n] + b" " + data[8 + n:])
    own = models.load(tmp_path)
    assert all(p.data.flags.aligned for p in own.parameters())
    ids, _ = batch("bert", "none")
    assert np.isfinite(own(ids).numpy()).all()


def test_in_several_files(tmp_path):
    vectors = write_vectors(tmp_path, "GPT2LMHeadModel")
    own = models.load(tmp_path)
    models.save(own, tmp_path / "parts", max_shard_bytes=3000)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    again = models.load(tmp_path / "parts")
    close(fetch(again(IDS, attention_mask=MASK))[MASK == 1], np.array(vectors["output"])[MASK == 1])


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "no such folder", "nothing is downloaded", kind=FileError)
    refused(tmp_path, "there is no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "this is an adapter, not a checkpoint", "minilora.formats.load_adapter(model,")
    write_vectors(tmp_path, "BertModel")
    os.remove(tmp_path / "model.safetensors")
    refused(tmp_path, "there is no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(tmp_path, "pytorch_model.bin, a pickle", "save_pretrained(folder)")
    write_vectors(tmp_path, "BertModel", config={"quantization_config": {"quant_method": "gptq"}})
    refused(tmp_path, "quantised", "'gptq'")
    write_vectors(tmp_path, "BertModel", config={"model_type": "mamba"})
    refused(tmp_path, "model_type is 'mamba'", "bert, ", "gpt2")
    write_vectors(tmp_path, "BertModel", config={"model_type": ["bert"]})
    refused(tmp_path, "model_type is ['bert']")
    for named in (["BertForQuestionAnswering"], [], None, "BertModel", [7]):
        write_vectors(tmp_path, "BertModel", config={"architectures": named})
        refused(tmp_path, "expected one of BertModel, BertForMaskedLM", "load(folder, head=...)")


@pytest.mark.parametrize("text, why", [
    ("{", "no JSON"), ("[]", "expected a JSON object"), ('{"a": 1, "a": 2}', "'a' is there twice"), ('{"a": NaN}', "NaN"),
    ("[" * 100_000, "nested"), (b"\xff\xfe", "no JSON"), ('{"model_type": "bert"} x', "no JSON"), ("", "no JSON"),
])
def test_a_config_that_is_no_json_object(text, why, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(tmp_path / "config.json") in refused(tmp_path, why)


def test_a_config_too_large(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * (17 << 20))
    refused(tmp_path, "17,825,792 bytes")


FIXED = [
    ("GPT2LMHeadModel", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True}),
    ("BertModel", {"position_embedding_type": "relative_key", "is_decoder": True, "pruned_heads": {"0": [1]}}),
    ("BertForMaskedLM", {"tie_word_embeddings": False}),
    ("RobertaModel", {"auto_map": {"AutoModel": "mine.Model"}, "is_encoder_decoder": True}),
    ("DistilBertForMaskedLM", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize("architecture, fields", FIXED, ids=str)
def test_settings_that_are_not_computed(architecture, fields, tmp_path):
    """All of them in one message, each with its value."""
    write_vectors(tmp_path, architecture, config=fields)
    refused(tmp_path, *(f"{name} is {value!r}: only" for name, value in fields.items()))


RANGE = [
    ("GPT2LMHeadModel", {"n_head": 3}, "n_embd must be a multiple of n_head"),
    ("GPT2LMHeadModel", {"n_head": "2"}, "n_head must be an int"), ("GPT2LMHeadModel", {"n_layer": 2.0}, "n_layer"),
    ("GPT2LMHeadModel", {"activation_function": "quick_gelu"}, "activation_function must be one of gelu, gelu_new"),
    ("GPT2LMHeadModel", {"activation_function": ["gelu"]}, "activation_function must be one of"),
    ("GPT2LMHeadModel", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be True or False"),
    ("GPT2LMHeadModel", {"pad_token_id": 13}, "pad_token_id"), ("BertModel", {"hidden_act": "gelu_fast"}, "hidden_act"),
    ("BertModel", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
    ("BertModel", {"layer_norm_eps": "1e-12"}, "layer_norm_eps"), ("BertModel", {"vocab_size": True}, "vocab_size"),
    ("RobertaModel", {"pad_token_id": 11}, "positions begin behind it"),
    ("BertForSequenceClassification", {"id2label": {"0": "a", "2": "b"}}, "each of the ids 0 to n - 1"),
    ("BertForSequenceClassification", {"id2label": ["a"]}, "each of the ids"),
    ("BertForSequenceClassification", {"num_labels": 5}, "num_labels is 5, but id2label names 3"),
    ("BertForSequenceClassification", {"num_labels": -1, "id2label": None}, "labels must be an int >= 1"),
    ("BertForSequenceClassification", {"problem_type": "ranking"}, "problem_type must be None or one of"),
    ("GPT2LMHeadModel", {"torch_dtype": "float16"}, "torch_dtype is 'float16' and dtype is 'float64'"),
]


@pytest.mark.parametrize("architecture, fields, text", RANGE, ids=str)
def test_settings_out_of_range(architecture, fields, text, tmp_path):
    write_vectors(tmp_path, architecture, config=fields)
    assert "config.json" in refused(tmp_path, text)


def test_names_that_do_not_fit(tmp_path):
    """One table: what is missing, unexpected, twice, transposed, of another kind; and the nearest name."""
    def rename(name):
        return {"transformer.ln_f.bias": "transformer.ln_f.bais", "transformer.wpe.weight": None}.get(name, name)

    write_vectors(tmp_path, "GPT2LMHeadModel", rename=rename, **{
        "transformer.h.0.attn.c_attn.weight": np.ones((24, 8)), "transformer.h.1.ln_1.bias": np.ones(8, "int32"),
        "module.transformer.h.0.extra": np.ones(3)})
    message = refused(
        tmp_path, "missing     transformer.wpe.weight (12, 8)", "missing     transformer.ln_f.bias (8,)",
        "unexpected  transformer.ln_f.bais (8,): is it transformer.ln_f.bias?", "unexpected  module.transformer.h.0.extra (3,)",
        "shape       transformer.h.0.attn.c_attn.weight: expected (8, 24), got (24, 8), which looks transposed",
        "kind        transformer.h.1.ln_1.bias: expected one of F64, F32, F16, BF16, got I32")
    assert message.count("\n") == 6
    write_vectors(tmp_path, "BertModel", **{"embeddings.LayerNorm.gamma": np.ones(8)})
    refused(tmp_path, "twice       embeddings.LayerNorm.gamma and embeddings.LayerNorm.weight both mean")


BUFFERS = [
    ("GPT2LMHeadModel", "transformer.h.0.attn.bias", np.ones((24,))),
    ("GPT2LMHeadModel", "transformer.h.0.attn.bias", np.ones((1, 1, 12, 11), bool)),
    ("GPT2LMHeadModel", "transformer.h.0.attn.masked_bias", np.ones(2)),
    ("BertModel", "embeddings.position_ids", np.ones((1, 12))),
    ("BertModel", "my_embeddings.position_ids.weight", np.arange(12)[None]),
]


@pytest.mark.parametrize("architecture, name, array", BUFFERS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_buffer_by_name_alone_is_no_buffer(architecture, name, array, tmp_path):
    write_vectors(tmp_path, architecture, **{name: array})
    refused(tmp_path, f"unexpected  {name}")


def test_a_tied_weight_that_is_another(tmp_path):
    write_vectors(tmp_path, "GPT2LMHeadModel", **{"lm_head.weight": np.ones((13, 8))})
    refused(tmp_path, "lm_head.weight and transformer.wte.weight are different", "set tie_word_embeddings to false")
    write_vectors(tmp_path, "GPT2LMHeadModel", config={"tie_word_embeddings": False}, **{"lm_head.weight": np.ones((13, 8))})
    own = models.load(tmp_path)
    assert (own.lm_head.weight.data == 1).all() and own(IDS).shape == (2, 7, 13)
    assert own.loss(IDS, IDS).item() == pytest.approx(np.log(13))


def test_a_failed_load_leaves_nothing(tmp_path):
    """Also the device and the drawing of first numbers are as before."""
    write_vectors(tmp_path, "GPT2LMHeadModel", rename=lambda name: None if "wpe" in name else name)
    refused(tmp_path, "missing")
    assert fetch(nn.Linear(2, 2, rng=0).weight).any() and minilora.current_device().name == "cpu"


def test_a_truncated_file(tmp_path):
    write_vectors(tmp_path, "GPT2LMHeadModel")
    path = tmp_path / "model.safetensors"
    for end in (0, 5, 100, path.stat().st_size - 1):
        write_vectors(tmp_path, "GPT2LMHeadModel")
        path.write_bytes(path.read_bytes()[:end])
        refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize("kind, text", [
    ("LayerNorm", "expected the modules Transformer, Pooling and, optionally, Normalize or Dense, got"),
    ("Pooling", "got Transformer, Pooling, Pooling"),
])
def test_sentence_files_that_are_not_computed(kind, text, tmp_path):
    write_vectors(tmp_path, "BertModel")
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in
               [("Transformer", ""), ("Pooling", "1_Pooling"), (kind, "2")]]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    refused(tmp_path, text)
    assert type(models.load(tmp_path, head="base")) is nn.Bert


def test_sentence_files(tmp_path):
    write_vectors(tmp_path, "BertModel")
    ids, mask = batch("bert", "right")
    body = models.load(tmp_path)
    plain = models.load(tmp_path, head="sentences")
    assert (plain.pooling, plain.normalize, plain.max_tokens) == ("mean", False, None)
    for pooling, normalize, most in [("mean", True, None), ("cls", False, 5)]:
        encoder = models.SentenceEncoder(body, pooling, normalize, most)
        models.save(encoder, tmp_path / "saved")
        again = models.load(tmp_path / "saved")
        assert (again.pooling, again.normalize, again.max_tokens) == (pooling, normalize, most)
        assert again(ids, mask).numpy().tobytes() == encoder(ids, mask).numpy().tobytes()
    for broken, text in [({"pooling_mode_max_tokens": True}, "pools by ['pooling_mode_max_tokens']"),
                         ({"pooling_mode": ["mean", "max"]}, "pools by ['mean', 'max']"), ({}, "pools by []")]:
        (tmp_path / "saved" / "1_Pooling" / "config.json").write_text(json.dumps(broken))
        refused(tmp_path / "saved", text)
    (tmp_path / "saved" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert models.load(tmp_path / "saved").pooling == "cls"
    for path in ("../other", "/etc", "a/../b", 7, "C:\\x"):
        modules = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": path}]
        (tmp_path / "saved" / "modules.json").write_text(json.dumps(modules))
        refused(tmp_path / "saved", "is not that of a folder in this one")
    (tmp_path / "saved" / "sentence_bert_config.json").write_text('{"max_seq_length": 0}')
    modules[1]["path"] = "1_Pooling"
    (tmp_path / "saved" / "modules.json").write_text(json.dumps(modules))
    refused(tmp_path / "saved", "max_seq_length must be an int >= 1")


def test_rope_in_two_spellings():
    from minilora.models.checkpoints.fields import one_spelling

    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    old = [{"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
           {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}]
    for fields in [new, *old, *({**new, **one} for one in old), {**new, "rope_theta": 5e5}, {**new, "rope_scaling": None}]:
        assert one_spelling(fields) == new
    assert one_spelling({"rope_theta": 10.0}) == {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
    assert one_spelling({"rope_theta": None, "rope_scaling": None}) == {}
    for other in ({"rope_theta": 1e4}, {"rope_scaling": {"type": "yarn"}}, {"rope_scaling": {"factor": 4.0}}):
        with pytest.raises(ConfigError, match="two spellings disagree"):
            one_spelling({**new, **other})
    with pytest.raises(ConfigError, match="must be objects"):
        one_spelling({"rope_scaling": "linear"})


def test_an_unsigned_file_gives_no_other_error(tmp_path):
    """What a file says in the place of a setting is refused as a FormatError, whatever it is."""
    vectors = write_vectors(tmp_path, "BertForSequenceClassification")
    for name in ("vocab_size", "hidden_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "pad_token_id", "id2label",
                 "architectures", "model_type", "num_attention_heads", "initializer_range", "problem_type",
                 "classifier_dropout"):
        for value in ({}, [], "x", -1, 1e400, [[]], {"a": {}}, False, 1 << 70):
            fields = json.dumps({**vectors["config"], name: value}).replace("Infinity", "1e400")
            (tmp_path / "config.json").write_text(fields)
            try:
                models.load(tmp_path)
            except FormatError:
                pass


def test_save_state_of_a_model_is_another_thing(tmp_path):
    """A state dict under our names of GPT-2 has its matrices (out, in): it is no checkpoint, and says so."""
    write_vectors(tmp_path, "GPT2LMHeadModel")
    save_state(tmp_path / "model.safetensors", models.load(tmp_path).state_dict())
    refused(tmp_path, "which looks transposed")
