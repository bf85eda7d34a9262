"""A table that makes the logits too: an adapter that changes one side of it is refused, or its head is written apart."""
import json

import numpy as np
import pytest
from merging_cases import adapter, drawn, files_in, update, write_base

from minilora import formats, lora, models
from minilora.errors import FormatError
from minilora.formats import TokenRows, Update, load_state, merge_files, unmerge_files, verify_files

TIED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 20}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
rng = np.random.default_rng(0)
W = drawn(rng, (20, 6))
of_table, of_head = update(rng, "embedding", (20, 6)), update(rng, "linear", (20, 6))
turned = Update("linear", np.ascontiguousarray(of_table.B.T), np.ascontiguousarray(of_table.A.T), of_table.s)
rows = TokenRows((3, 19), drawn(rng, (2, 6)))
whole = drawn(rng, (20, 6))
EMB = "model.embed_tokens"
D_table, D_head = of_table.s * (of_table.B @ of_table.A).T, of_head.s * of_head.B @ of_head.A


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", {TABLE: W, "model.norm.weight": np.ones(6, "float32")}, TIED)


def merged(base, one, **options):
    report = merge_files(base, one, base.parent / "out", **options)
    unmerge_files(base.parent / "out", base.parent / "back")
    assert files_in(base.parent / "back") == files_in(base)
    assert verify_files(base.parent / "out", base, one).sound
    return report, load_state(base.parent / "out" / "model.safetensors"), json.loads(
        (base.parent / "out" / "config.json").read_text())


ONE_SIDED = {
    "table": (adapter({EMB: of_table}), W + D_table, W),
    "head": (adapter({"lm_head": of_head}), W, W + D_head),
    "both, and not the same": (adapter({EMB: of_table, "lm_head": of_head}), W + D_table, W + D_head),
    "table as a whole": (adapter({}, saved={TABLE: whole}), whole, W),
    "head as a whole": (adapter({}, saved={HEAD: whole}), W, whole),
}


@pytest.mark.parametrize("which", ONE_SIDED)
def test_one_side(base, which):
    one, table, head = ONE_SIDED[which]
    with pytest.raises(FormatError, match=r"is tied to the head.*only one side.*--untie"):
        merge_files(base, one, base.parent / "out")
    assert not (base.parent / "out").exists()
    report, state, config = merged(base, one, untie=True)
    np.testing.assert_allclose(state[TABLE], table, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state[HEAD], head, rtol=1e-6, atol=1e-6)
    assert config["tie_word_embeddings"] is False and any("no longer tied" in note for note in report.notes)


BOTH = {
    "written as two": (adapter({EMB: of_table, "lm_head": turned}), W + D_table),
    "rows": (adapter({}, tokens={EMB: rows}), np.concatenate([W[:3], rows.rows[:1], W[4:19], rows.rows[1:]])),
    "as a whole twice": (adapter({}, saved={TABLE: whole, HEAD: whole}), whole),
}


@pytest.mark.parametrize("which", BOTH)
def test_both_sides_stay_tied(base, which):
    one, table = BOTH[which]
    _, state, config = merged(base, one)
    np.testing.assert_allclose(state[TABLE], table, rtol=1e-6, atol=1e-6)
    assert HEAD not in state and config == TIED


def test_a_head_in_the_file_that_loading_would_overwrite(tmp_path):
    """With tie_word_embeddings a head in the file is not read: merging into it alone would be lost."""
    base = write_base(tmp_path / "base", {TABLE: W, HEAD: W}, TIED)
    with pytest.raises(FormatError, match="is tied to the head"):
        merge_files(base, adapter({"lm_head": of_head}), tmp_path / "no")
    _, state, config = merged(base, adapter({EMB: of_table, "lm_head": turned}))
    assert state[TABLE].tobytes() == state[HEAD].tobytes() and config == TIED


@pytest.mark.parametrize("change", [dict(tie_word_embeddings=False), dict(architectures=["LlamaModel"])])
def test_not_tied(tmp_path, change):
    base = write_base(tmp_path / "base", {TABLE: W}, {**TIED, **change})
    _, state, _ = merged(base, adapter({EMB: of_table}))
    np.testing.assert_allclose(state[TABLE], W + D_table, rtol=1e-6, atol=1e-6)


def test_without_a_config_it_is_noted(tmp_path):
    base = write_base(tmp_path / "base", {TABLE: W})
    report = merge_files(base, adapter({EMB: of_table}), tmp_path / "out")
    assert any("without a config.json" in note for note in report.notes)


def test_a_longer_vocabulary(base):
    longer = drawn(rng, (22, 6))
    _, state, config = merged(base, adapter({}, saved={TABLE: longer, HEAD: longer}))
    assert state[TABLE].shape == (22, 6) and config["vocab_size"] == 22
    with pytest.raises(FormatError, match="the vocabulary must be one"):
        merge_files(base, adapter({}, saved={TABLE: longer, HEAD: whole}), base.parent / "no", untie=True)


def test_what_minilora_trains_on_a_tied_table(tmp_path):
    """Our own adapter of GPT-2's table takes part in the logits: merged it computes the same, and stays tied."""
    config = models.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = models.GPT2(config, rng=0)
    models.save(model, tmp_path / "base")
    lora.inject(model, lora.Config(r=2, target_modules=["wte", "c_fc"]), rng=1)
    for _, p in model.named_parameters():
        if p.trainable:
            p.data += 0.1
    formats.save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = np.array([[1, 2, 19]])
    model.eval()
    np.testing.assert_allclose(models.load(tmp_path / "out")(ids).data, model(ids).data, rtol=1e-4, atol=1e-5)
    states = [load_state(tmp_path / name / "model.safetensors") for name in ("out", "base")]
    assert states[0].keys() == states[1].keys()
