"""BERT's checkpoints: old files call a norm's weight and bias gamma and beta, and hold the logits' table twice."""

from __future__ import annotations

from ..bodies.bert import Bert, BertConfig
from ..heads.bert import BertClassifier, BertMaskedLM, BertTokenClassifier
from .contract import Family, Head

__all__ = ["BERT_FAMILY", "BUFFERS", "RENAMED"]

RENAMED = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
BUFFERS = ((r"\bembeddings\.(position_ids|token_type_ids)", r"(I64|I32) \((1, )?\d+,?\)"),)

BERT_FAMILY = Family(
    model_type="bert",
    config=BertConfig,
    prefix="bert.",
    heads={
        "base": Head("BertModel", Bert, optional={"bert.pooler.": "pooler"}),
        "masked_lm": Head("BertForMaskedLM", BertMaskedLM, body="bert.", fixed={"tie_word_embeddings": (True,)}, tied={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias"}, aliases=("BertForPreTraining",)),
        "sequence_classification": Head("BertForSequenceClassification", BertClassifier, labelled=True, body="bert."),
        "token_classification": Head("BertForTokenClassification", BertTokenClassifier, labelled=True, body="bert."),
    },
    others=("bert.pooler.", "cls.", "classifier.", "qa_outputs."),
    defaults={"hidden_dropout_prob": 0.1},
    lacking=("attention_probs_dropout_prob",),
    renamed=RENAMED,
    buffers=BUFFERS,
)
