"""Adapters that peft trained on transformers' models, on the checkpoints loaded here; and ours, loaded by peft."""
import warnings

import numpy as np
import pytest
from checkpoint_cases import ARCHITECTURES, batch, labels_of
from test_models_load import assert_close, theirs, transformers  # noqa: F401  (a fixture)
from test_torch import torch  # noqa: F401  (a fixture)

from conftest import fetch
from minilora import formats, lora, models, optim

pytestmark = pytest.mark.parity

CASES = {  # architecture: what is adapted, and what peft takes it for
    "GPT2LMHeadModel": (["c_attn", "c_proj"], "CAUSAL_LM"), "GPT2ForSequenceClassification": (["c_attn"], "SEQ_CLS"),
    "GPT2ForTokenClassification": (["c_attn"], "TOKEN_CLS"), "GPT2Model": (["c_fc"], "FEATURE_EXTRACTION"),
    "BertForSequenceClassification": (["query", "value"], "SEQ_CLS"), "BertForTokenClassification": (["key"], "TOKEN_CLS"),
    "BertForMaskedLM": (["query", "intermediate.dense"], None), "BertModel": (["query", "value"], "FEATURE_EXTRACTION"),
    "RobertaForSequenceClassification": (["query", "value"], "SEQ_CLS"), "RobertaForMaskedLM": (["value"], None),
    "XLMRobertaForTokenClassification": (["query"], "TOKEN_CLS"),
    "DistilBertForSequenceClassification": (["q_lin", "v_lin"], "SEQ_CLS"), "DistilBertForMaskedLM": (["q_lin"], None),
}


@pytest.fixture(scope="module")
def peft(transformers):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def outputs(torch, other, ids, mask):  # noqa: F811
    result = other(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    found = getattr(result, "logits", None)
    return result.last_hidden_state if found is None else found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", CASES)
def test_both_ways(architecture, tmp_path, torch, transformers, peft):  # noqa: F811
    """peft's file here, three steps of training here, and the file of that in peft: the same outputs each time."""
    targets, task = CASES[architecture]
    family, kind = ARCHITECTURES[architecture]
    other = theirs(torch, transformers, architecture, "float32")
    other.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type=task, init_lora_weights=False,
                               fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(other, settings).eval()
    for name, p in adapted.named_parameters():
        if p.requires_grad:  # heads that are saved with the adapter too
            p.data = p.data + 0.1 * torch.tensor(np.random.default_rng(6).normal(size=tuple(p.shape)), dtype=p.dtype)
    adapted.save_pretrained(tmp_path / "adapter")
    ids, mask = batch(family, "right")
    seen = slice(None) if kind == "text" else mask == 1

    own = models.load(tmp_path / "base")
    formats.load_adapter(own, tmp_path / "adapter", trainable=True)
    expected = outputs(torch, adapted, ids, mask).detach()
    assert_close(fetch(own(ids, attention_mask=mask))[seen], expected[torch.tensor(seen) if kind != "text" else seen], "out",
                 1e-5)

    labels = labels_of(kind, ids, mask)
    optimizer = optim.Adam(own.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        y = own(ids, attention_mask=mask)
        loss = (y * y).mean() if kind == "hidden" else own(ids, labels, attention_mask=mask)
        loss.backward()
        optimizer.step()
    formats.save_adapter(own, tmp_path / "trained")
    base = getattr(transformers, architecture).from_pretrained(tmp_path / "base")
    again = outputs(torch, peft.PeftModel.from_pretrained(base, tmp_path / "trained").eval(), ids, mask).detach()
    y = fetch(own(ids, attention_mask=mask))[seen]
    assert_close(y, again[torch.tensor(seen) if kind != "text" else seen], "trained", 1e-5)
    assert np.abs(y - expected[torch.tensor(seen) if kind != "text" else seen].numpy()).max() > 1e-3
    lora.bake(own)
    models.save(own, tmp_path / "baked")
    whole = outputs(torch, getattr(transformers, architecture).from_pretrained(tmp_path / "baked").eval(), ids, mask).detach()
    assert_close(y, whole[torch.tensor(seen) if kind != "text" else seen], "baked", 1e-5)
