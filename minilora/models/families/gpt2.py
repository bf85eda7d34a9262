"""GPT-2's checkpoints: matrices stored (in, out), masks among the tensors, and a hub file without the usual prefix."""

from __future__ import annotations

from ..bodies.gpt2 import GPT2, GPT2Body, GPT2Config
from ..heads.gpt2 import GPT2Classifier, GPT2TokenClassifier
from .contract import Family, Head

__all__ = ["GPT2_FAMILY"]

GPT2_FAMILY = Family(
    model_type="gpt2",
    config=GPT2Config,
    prefix="transformer.",
    heads={
        "base": Head("GPT2Model", GPT2Body),
        "causal_lm": Head("GPT2LMHeadModel", GPT2, tied={"lm_head.weight": "transformer.wte.weight"},
                          aliases=("GPT2DoubleHeadsModel",)),
        "sequence_classification": Head("GPT2ForSequenceClassification", GPT2Classifier, labelled=True, body="transformer."),
        "token_classification": Head("GPT2ForTokenClassification", GPT2TokenClassifier, labelled=True, body="transformer."),
    },
    layers="n_layer",
    others=("lm_head.", "score.", "classifier.", "qa_outputs.", "multiple_choice_head."),
    defaults={"embd_pdrop": 0.1, "resid_pdrop": 0.1, "classifier_dropout": 0.1},
    fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    lacking=("attn_pdrop",),
    transposed=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
    buffers=((r"\.attn\.bias", r"\w+ \(1, 1, (\d+), \1\)"), (r"\.attn\.masked_bias", r"\w+ \(\)")),
)
