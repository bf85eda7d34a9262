"""The checkpoints of RoBERTa, and of XLM-RoBERTa, which is the same model under another name."""

from __future__ import annotations

import dataclasses

from ..bodies.roberta import Roberta, RobertaConfig, XLMRobertaConfig
from ..heads.roberta import RobertaClassifier, RobertaMaskedLM, RobertaTokenClassifier
from .bert import BUFFERS, RENAMED
from .contract import Family, Head

__all__ = ["ROBERTA_FAMILY", "XLM_ROBERTA_FAMILY"]

ROBERTA_FAMILY = Family(
    model_type="roberta",
    config=RobertaConfig,
    prefix="roberta.",
    heads={
        "base": Head("RobertaModel", Roberta, optional={"roberta.pooler.": "pooler"}),
        "masked_lm": Head("RobertaForMaskedLM", RobertaMaskedLM, body="roberta.", fixed={"tie_word_embeddings": (True,)}, tied={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}),
        "sequence_classification": Head("RobertaForSequenceClassification", RobertaClassifier, labelled=True, body="roberta."),
        "token_classification": Head("RobertaForTokenClassification", RobertaTokenClassifier, labelled=True, body="roberta."),
    },
    others=("roberta.pooler.", "lm_head.", "classifier.", "qa_outputs."),
    defaults={"hidden_dropout_prob": 0.1},
    lacking=("attention_probs_dropout_prob",),
    renamed=RENAMED,
    buffers=BUFFERS,
)

XLM_ROBERTA_FAMILY = dataclasses.replace(
    ROBERTA_FAMILY, model_type="xlm-roberta", config=XLMRobertaConfig,
    heads={name: dataclasses.replace(head, architecture=f"XLM{head.architecture}")
           for name, head in ROBERTA_FAMILY.heads.items()})
