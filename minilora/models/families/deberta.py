"""DeBERTa's checkpoints, of the second version and the third."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..bodies.deberta import DebertaV2
from ..bodies.deberta_config import DebertaV2Config
from ..heads.deberta import DebertaV2Classifier, DebertaV2MaskedLM, DebertaV2TokenClassifier
from .bert import BUFFERS, RENAMED
from .contract import Family, Head

__all__ = ["DEBERTA_FAMILY", "DebertaFamily"]


@dataclasses.dataclass(frozen=True)
class DebertaFamily(Family):
    """Fields that name others: widths, which must all be one."""

    def read(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        read = super().read(fields)
        d = read.get("hidden_size", self.config().hidden_size)
        heads = read.get("num_attention_heads", self.config().num_attention_heads)
        own = {"embedding_size": d, "pooler_hidden_size": d}
        if type(d) is int and type(heads) is int and heads:
            own["attention_head_size"] = d // heads
        wrong = [f"{name} is {fields[name]!r}: only {value} is computed here, which follows from hidden_size"
                 for name, value in own.items() if fields.get(name) not in (None, value)]
        if wrong:
            raise ConfigError("; ".join(wrong))
        named = str(read.get("norm_rel_ebd") or "none").lower().split("|")
        return {**read, "pos_att_type": read.get("pos_att_type") or (),
                "norm_rel_ebd": "layer_norm" if "layer_norm" in [name.strip() for name in named] else named[0].strip()}

    def write(self, config: Any) -> dict[str, Any]:
        return {**super().write(config), "pos_att_type": list(config.pos_att_type), "pooler_hidden_size": config.hidden_size}


DEBERTA_FAMILY = DebertaFamily(
    model_type="deberta-v2",
    config=DebertaV2Config,
    prefix="deberta.",
    heads={
        "base": Head("DebertaV2Model", DebertaV2),
        "masked_lm": Head("DebertaV2ForMaskedLM", DebertaV2MaskedLM, body="deberta.", fixed={"tie_word_embeddings": (True,)},
                          tied={"cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
                                "cls.predictions.decoder.bias": "cls.predictions.bias"}),
        "sequence_classification": Head("DebertaV2ForSequenceClassification", DebertaV2Classifier, labelled=True,
                                        body="deberta."),
        "token_classification": Head("DebertaV2ForTokenClassification", DebertaV2TokenClassifier, labelled=True,
                                     body="deberta."),
    },
    # The published v3 holds the heads of its own training (a mask predictor, a generator's), and old files vectors of positions
    # that the model does not use.
    others=("cls.", "lm_predictions.", "mask_predictions.", "pooler.", "classifier.", "qa_outputs.",
            "deberta.embeddings.position_embeddings."),
    defaults={"hidden_dropout_prob": 0.1},
    lacking=("attention_probs_dropout_prob",),
    renamed=RENAMED,
    buffers=BUFFERS,
)
