"""DistilBERT's checkpoints."""

from __future__ import annotations

from ..bodies.distilbert import DistilBert, DistilBertConfig
from ..heads.distilbert import DistilBertClassifier, DistilBertMaskedLM, DistilBertTokenClassifier
from .bert import BUFFERS, RENAMED
from .contract import Family, Head

__all__ = ["DISTILBERT_FAMILY"]

DISTILBERT_FAMILY = Family(
    model_type="distilbert",
    config=DistilBertConfig,
    prefix="distilbert.",
    heads={
        "base": Head("DistilBertModel", DistilBert),
        "masked_lm": Head("DistilBertForMaskedLM", DistilBertMaskedLM, body="distilbert.",
                          fixed={"tie_word_embeddings": (True,)},
                          tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}),
        "sequence_classification": Head("DistilBertForSequenceClassification", DistilBertClassifier, labelled=True,
                                        body="distilbert."),
        "token_classification": Head("DistilBertForTokenClassification", DistilBertTokenClassifier, labelled=True,
                                     body="distilbert."),
    },
    layers="n_layers",
    others=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", "classifier.", "qa_outputs."),
    defaults={"dropout": 0.1, "seq_classif_dropout": 0.2},
    lacking=("attention_dropout",),
    renamed=RENAMED,
    buffers=BUFFERS,
)
