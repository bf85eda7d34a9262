"""Adapters of whole transformers between PEFT and here. Run with -m parity, where torch, transformers and peft are installed.

PEFT wraps a model of transformers; its folder is loaded into `models.load` of the same checkpoint: the same outputs. The same
adapter written here loads in PEFT again, without a warning that PEFT's own file does not cause.
"""
import numpy as np
import pytest
import twins
from checkpoint_cases import ARCHITECTURES, batch
from in_double import import_transformers
from test_models_load import theirs
from test_torch import torch  # noqa: F401  (a fixture)

from conftest import fetch
from minilora import formats, lora, models

pytestmark = pytest.mark.parity

CASES = {
    "GPT2LMHeadModel": dict(target_modules=["c_attn", "mlp.c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=True),
    "GPT2LMHeadModel, tokens": dict(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True,
                                    trainable_token_indices=[3, 7]),
    "GPT2LMHeadModel, table": dict(target_modules=["wte"], task_type="CAUSAL_LM"),
    "GPT2ForSequenceClassification": dict(target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True, bias="all"),
    "GPT2ForTokenClassification": dict(target_modules=["c_fc"], task_type="TOKEN_CLS", fan_in_fan_out=True, use_dora=True),
    "BertForSequenceClassification": dict(target_modules=["query", "value"], task_type="SEQ_CLS", use_rslora=True),
    "BertForTokenClassification": dict(target_modules=["query", "dense"], task_type="TOKEN_CLS", bias="lora_only"),
    "BertModel": dict(target_modules=["key", "word_embeddings"], task_type="FEATURE_EXTRACTION"),
    "RobertaForSequenceClassification": dict(target_modules=["query", "value"], task_type="SEQ_CLS", lora_bias=True),
    "DistilBertForSequenceClassification": dict(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS", use_dora=True),
    "XLMRobertaForTokenClassification": dict(target_modules=["dense"], task_type="TOKEN_CLS",
                                             rank_pattern={"intermediate.dense": 4}),
    "BertForMaskedLM": dict(target_modules=["query"], trainable_token_indices={"word_embeddings": [2, 5]},
                            init_lora_weights="olora"),
}


@pytest.fixture(scope="module")
def transformers(torch):  # noqa: F811
    return import_transformers()


def first_of(result):
    return result[0] if isinstance(result, tuple) else result.logits if hasattr(result, "logits") else result.last_hidden_state


def run(torch, model, ids, mask):  # noqa: F811
    with torch.no_grad():
        return first_of(model(torch.tensor(ids), attention_mask=torch.tensor(mask))).numpy()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_both_ways(torch, transformers, tmp_path, case, dtype):  # noqa: F811
    peft = pytest.importorskip("peft")
    architecture = case.partition(",")[0]
    settings = {"r": 2, "lora_alpha": 3, **CASES[case]}
    if dtype == "float64" and settings.get("init_lora_weights") == "olora":
        settings["init_lora_weights"] = True  # which PEFT refuses in float64
    ids, mask = batch(ARCHITECTURES[architecture][0], "right")
    base = theirs(torch, transformers, architecture, dtype)
    twins.quietly(base.save_pretrained, tmp_path / "base")
    model, _ = twins.quietly(peft.get_peft_model, base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
    # With rows of a tied table PEFT 0.21.2 computes the head without its bias (trainable_tokens/layer.py, line 267).
    lost = model.base_model.model.cls.predictions.bias.detach().numpy() if case == "BertForMaskedLM" else 0.0
    expected = run(torch, model.eval(), ids, mask) + lost
    twins.quietly(model.save_pretrained, tmp_path / "theirs")

    own = models.load(tmp_path / "base", dtype=dtype).eval()
    plain = fetch(first(own(ids, attention_mask=mask)))
    report = formats.load_adapter(own, tmp_path / "theirs")
    got = fetch(first(own(ids, attention_mask=mask)))
    tolerance = {"float64": 1e-10, "float32": 1e-5}[dtype] * np.abs(expected).max()
    real = mask.astype(bool) if got.ndim == 3 else slice(None)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=tolerance, err_msg=str(report))
    assert np.abs(got - plain).max() > 1e-3 and not any("does not name" in note for note in report.notes), report

    formats.save_adapter(own, tmp_path / "ours")
    fresh = [theirs(torch, transformers, architecture, dtype) for _ in range(2)]
    _, usual = twins.quietly(peft.PeftModel.from_pretrained, fresh[0], tmp_path / "theirs")
    again, said = twins.quietly(peft.PeftModel.from_pretrained, fresh[1], tmp_path / "ours")
    assert set(said) <= set(usual), set(said) - set(usual)
    np.testing.assert_allclose((run(torch, again.eval(), ids, mask) + lost)[real], got[real], rtol=0, atol=tolerance)
    if "table" in case:  # tied: PEFT's update of the table is not in the logits, and merged it would be
        return
    lora.merge(own)
    np.testing.assert_allclose(fetch(first(own(ids, attention_mask=mask)))[real], expected[real], rtol=0, atol=10 * tolerance)
    lora.unmerge(own)
    np.testing.assert_allclose(fetch(first(own(ids, attention_mask=mask)))[real], got[real], rtol=0, atol=tolerance)
    base = models.load(tmp_path / "base", dtype=dtype).state_dict()
    lora.remove(own, "default")
    changed = {path for path, array in own.state_dict().items() if not np.array_equal(array, base[path])}
    assert all(path.endswith("bias") for path in changed) and (not changed or "bias" in settings)


@pytest.mark.parametrize("architecture, target", [("GPT2LMHeadModel", "wte"), ("BertForMaskedLM", "word_embeddings"),
                                                  ("RobertaForMaskedLM", "word_embeddings"),
                                                  ("DistilBertForMaskedLM", "word_embeddings")])
def test_a_tied_table_trained_here(torch, transformers, tmp_path, architecture, target):  # noqa: F811
    """In the file it is an update of the table and one of the head: the same logits there."""
    peft = pytest.importorskip("peft")
    ids, mask = batch(ARCHITECTURES[architecture][0], "right")
    base = theirs(torch, transformers, architecture, "float64")
    twins.quietly(base.save_pretrained, tmp_path / "base")
    own = models.load(tmp_path / "base", dtype="float64").eval()
    lora.inject(own, lora.Config(r=2, lora_alpha=3, target_modules=[target]), rng=0)
    own.embedding.lora_A.data += 0.3
    got = fetch(own(ids, attention_mask=mask))
    formats.save_adapter(own, tmp_path / "ours")
    again, _ = twins.quietly(peft.PeftModel.from_pretrained, base, tmp_path / "ours")
    expected, real = run(torch, again.eval(), ids, mask), mask.astype(bool)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-10 * np.abs(expected).max())
    fresh = models.load(tmp_path / "base", dtype="float64").eval()
    assert "logits too" in str(formats.load_adapter(fresh, tmp_path / "ours"))
    np.testing.assert_array_equal(fetch(fresh(ids, attention_mask=mask)), got)


def first(result):
    return result[0] if isinstance(result, (tuple, list)) else result
