"""A classifier's head in an adapter: the merged folder is the classifier, and the way back leads to the base to the bit."""
import json

import numpy as np
import pytest
from merging_cases import files_in

from minilora import formats, lora, models
from minilora.cli.loading import modules_of_head
from minilora.errors import FormatError, StateError
from minilora.formats import merge_files, unmerge_files, verify_files
from minilora.formats.merging.checkpoint import PATCH

NAMES = ["bad", "good", "so so"]
SMALL = dict(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
             max_position_embeddings=16)
BASES = {
    "bert": lambda: models.Bert(models.BertConfig(**SMALL), rng=0),
    "bert without a pooler": lambda: models.Bert(models.BertConfig(**SMALL), False, rng=0),
    "roberta": lambda: models.Roberta(models.RobertaConfig(**SMALL), rng=0),
    "distilbert": lambda: models.DistilBert(models.DistilBertConfig(
        vocab_size=19, dim=8, n_layers=1, n_heads=2, hidden_dim=12, max_position_embeddings=16), rng=0),
    "deberta": lambda: models.DebertaV2(models.DebertaV2Config(**SMALL), rng=0),
    "gpt2": lambda: models.GPT2(models.GPT2Config(vocab_size=19, n_positions=16, n_embd=8, n_layer=1, n_head=2), rng=0),
    "llama": lambda: models.Llama(models.LlamaConfig(num_key_value_heads=1, **SMALL), rng=0),
    "sentences": lambda: models.SentenceEncoder(models.Bert(models.BertConfig(**SMALL), False, rng=0), "cls", True, 7),
}
TASKS = {"sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS",
         "sentence_classification": "FEATURE_EXTRACTION"}
IDS = [[3, 5, 7, 9, 11], [1, 2, 4, 8, 16]]


def trained(folder, head, labels=NAMES, run=True, out="adapter", task=""):
    """An adapter with a head for the base in `folder`, as `minilora train` writes it; and the model."""
    model = models.load(folder, head=head, labels=labels, rng=3, problem_type="single_label_classification" if run else None)
    lora.inject(model, lora.Config(r=2, target_modules="all-linear", task_type=TASKS[head] if task == "" else task,
                                   modules_to_save=modules_of_head(model)), rng=1)
    rng = np.random.default_rng(0)
    for p in model.parameters():
        if p.trainable:
            p.data = p.data + (0.05 * rng.standard_normal(p.shape)).astype("float32")
    adapter = folder.parent / out
    formats.save_adapter(model, adapter)
    if run:
        (adapter / "run.json").write_text(json.dumps({"labels": labels, "problem_type": "single_label_classification"}))
    return adapter, model.eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def bert(tmp_path):
    models.save(BASES["bert"](), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sentences(tmp_path):
    models.save(BASES["sentences"](), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("head", TASKS)
@pytest.mark.parametrize("kind", BASES)
def test_every_family_is_read_again_as_the_classifier(tmp_path, kind, head):
    base, out, back = (tmp_path / name for name in ("base", "out", "back"))
    models.save(BASES[kind](), base)
    adapter, model = trained(base, head)
    merge_files(base, adapter, out)
    merged = models.load(out)
    assert type(merged) is type(model) and merged.labels.names == tuple(NAMES)
    if head != "token_classification":
        assert merged.labels.problem_type == "single_label_classification"
    np.testing.assert_allclose(merged(IDS).data, model(IDS).data, rtol=1e-5, atol=1e-6)
    assert not merged.origin.drawn and verify_files(out, base, adapter).sound
    unmerge_files(out, back)
    assert files_in(back) == files_in(base)


def test_what_the_files_say(sentences):
    adapter, model = trained(sentences, "sentence_classification")
    out = sentences.parent / "out"
    report = merge_files(sentences, adapter, out)
    assert any("the module Dense behind the pooling, in 2_Dense; 3 outputs: bad, good, so so" in note for note in report.notes)
    lora.bake(model)
    models.save(model, sentences.parent / "baked")  # what models' own saving makes of it
    baked = sentences.parent / "baked"
    for name in ("modules.json", "2_Dense/config.json", "2_Dense/model.safetensors", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (baked / name).read_bytes(), name
    assert config_of(out) == config_of(baked)
    assert models.load(baked).labels.names == tuple(NAMES)


def test_in_another_dtype_and_without_a_patch(sentences):
    adapter, _ = trained(sentences, "sentence_classification")
    out = sentences.parent / "out"
    merge_files(sentences, adapter, out, dtype="float16", patch=False)
    assert set(formats.open_state(out / "2_Dense" / "model.safetensors").dtypes.values()) == {"F16"}
    assert models.load(out).labels.names == tuple(NAMES) and verify_files(out, sentences, adapter).sound


def test_verify_looks_at_the_head_too(sentences):
    adapter, _ = trained(sentences, "sentence_classification")
    out = sentences.parent / "out"
    merge_files(sentences, adapter, out)
    path = out / "2_Dense" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert list(verify_files(out, sentences, adapter).different) == ["2_Dense/model.safetensors"]
    path.unlink()
    assert verify_files(out, sentences, adapter).different == {"2_Dense/model.safetensors": "it is not there"}


def test_classes_without_a_run(bert):
    adapter, _ = trained(bert, "sequence_classification", run=False)
    out = bert.parent / "out"
    merge_files(bert, formats.read_adapter(adapter), out)
    assert models.load(out).labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    (adapter / "run.json").write_text('{"labels": ["of", "another", "run", "than this"]}')
    merge_files(bert, adapter, out, overwrite=True)
    assert models.load(out).labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    (adapter / "run.json").write_text("[" * 100_000)
    merge_files(bert, adapter, out, overwrite=True)
    adapter, _ = trained(bert, "sequence_classification", labels=1, run=False, out="scores")
    merge_files(bert, adapter, out, overwrite=True)
    assert models.load(out).labels.problem_type == "regression"


@pytest.mark.parametrize("head", ["sequence_classification", "sentence_classification"])
def test_a_base_that_is_a_classifier_gets_the_new_classes(tmp_path, head):
    first, base = tmp_path / "first", tmp_path / "base"
    models.save(BASES["sentences"]() if head.startswith("sentence_") else BASES["bert"](), first)
    models.save(models.load(first, head=head, labels=["yes", "no"], rng=0), base)
    fields = {**config_of(base), "num_labels": 2}
    (base / "config.json").write_text(json.dumps(fields))
    same, _ = trained(base, head, labels=["yes", "no"], out="same", run=False)
    merge_files(base, same, tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    wider, _ = trained(first, head)
    merge_files(base, wider, tmp_path / "out", force=True)
    assert models.load(tmp_path / "out").labels.names == tuple(NAMES)
    unmerge_files(tmp_path / "out", tmp_path / "back")
    assert files_in(tmp_path / "back") == files_in(base)


def test_a_classifier_of_transformers_is_no_encoder_of_sentences(sentences):
    adapter, model = trained(sentences, "sequence_classification")
    out, back = sentences.parent / "out", sentences.parent / "back"
    merge_files(sentences, adapter, out)
    assert not (out / "modules.json").exists() and type(models.load(out)) is type(model)
    unmerge_files(out, back)
    assert files_in(back) == files_in(sentences)


def test_an_old_result_does_not_say_how_the_new_one_is_read(sentences):
    adapter, _ = trained(sentences, "sentence_classification")
    out, plain = sentences.parent / "out", sentences.parent / "plain"
    merge_files(sentences, adapter, out)
    models.save(BASES["bert"](), plain)
    adapter, model = trained(plain, "sequence_classification", out="other")
    merge_files(plain, adapter, out, overwrite=True)
    assert type(models.load(out)) is type(model)


def test_without_a_task_it_is_said_what_to_do(bert):
    adapter, _ = trained(bert, "sequence_classification", task=None)
    report = merge_files(bert, adapter, bert.parent / "out")
    assert config_of(bert.parent / "out") == config_of(bert)
    assert any('"task_type": "SEQ_CLS"' in note for note in report.notes)
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "task_type": "SEQ_CLS"}))  # as the note says
    merge_files(bert, adapter, bert.parent / "out", overwrite=True)
    assert models.load(bert.parent / "out").labels.names == tuple(NAMES)


@pytest.mark.parametrize("what, text", [
    ("no class", "write the class of the model there"),
    ("another module", "Transformer, Pooling, LayerNorm"),
    ("a place elsewhere", "in 2_Dense"),
    ("damaged", "it is damaged"),
])
def test_what_cannot_be_said_is_refused(sentences, what, text):
    adapter, _ = trained(sentences, "sentence_classification")
    path = sentences / "modules.json"
    modules = json.loads(path.read_text())
    if what == "no class":
        (sentences / "config.json").write_text(json.dumps({**config_of(sentences), "architectures": None}))
    elif what == "another module":
        modules[2]["type"] = "sentence_transformers.models.LayerNorm"
    elif what == "a place elsewhere":
        modules[2].update(type="sentence_transformers.models.Dense", path="../head")
    path.write_text("[{" if what == "damaged" else json.dumps(modules))
    before = files_in(sentences.parent)
    for dry_run in (False, True):
        with pytest.raises(FormatError, match=text):
            merge_files(sentences, adapter, sentences.parent / "out", dry_run=dry_run)
    assert files_in(sentences.parent) == before


@pytest.mark.parametrize("key, name", [("added", "../base/config.json"), ("texts", "../stolen"), ("texts", "/stolen"),
                                       ("added", 3), ("texts", "a/../../b"), ("texts", "..\\b")])
def test_a_patch_names_no_files_elsewhere(sentences, key, name):
    adapter, _ = trained(sentences, "sentence_classification")
    out = sentences.parent / "out"
    merge_files(sentences, adapter, out)
    patch = formats.open_state(out / PATCH)
    said = json.loads(patch.metadata["minilora_patch"])
    if key == "added":
        said["added"].append(name)
    else:
        said["texts"][name] = "0"
    tensors = {each: patch[each].copy() for each in patch}
    formats.save_state(out / PATCH, tensors, {"minilora_patch": json.dumps(said)})
    before = files_in(sentences.parent)
    with pytest.raises((FormatError, StateError), match="no patch of version"):
        unmerge_files(out, sentences.parent / "back")
    assert files_in(sentences.parent) == before
