"""RoBERTa, and XLM-RoBERTa: BERT whose positions count from the padding's id on, and skip padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy

from ...errors import ConfigError, ShapeError
from ...nn.embedding import Embedding
from ..checks import check_positions
from ..group import initialise
from .bert import Bert, BertConfig

__all__ = ["Roberta", "RobertaConfig", "XLMRobertaConfig"]


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The shape of a RoBERTa, with the names and, dropout apart, the defaults of its config.json.

    Parameters
    ----------
    max_position_embeddings : int
        Rows of the table of positions: pad_token_id + 1 more than the largest T. 514 in the files.
    pad_token_id : int
        Positions begin behind it.

    The others are those of `BertConfig`.
    """

    vocab_size: int = 50265
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None or self.pad_token_id + 1 >= self.max_position_embeddings:
            raise ConfigError(f"{type(self).__name__}: pad_token_id must be an int below max_position_embeddings - 1 = "
                              f"{self.max_position_embeddings - 1}, as positions begin behind it, got {self.pad_token_id!r}")


@dataclasses.dataclass(frozen=True)
class XLMRobertaConfig(RobertaConfig):
    """The shape of an XLM-RoBERTa: the same model under another model_type."""

    vocab_size: int = 30522


class Roberta(Bert):
    """RoBERTa as an encoder: a vector for every token, and one for the text.

    Parameters
    ----------
    config : RobertaConfig
    add_pooling_layer, dtype, rng
        As of `Bert`.

    Notes
    -----
    The k-th token of a text that is not padding, k = 1, 2, ..., stands at the position pad_token_id + k, padding at
    pad_token_id: so a text has the same positions on whichever side it is padded. Source: Liu et al. 2019, arXiv 1907.11692;
    the positions are those of fairseq, whose files were the first.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.models.RobertaConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
    ...                                        intermediate_size=8, max_position_embeddings=8)
    >>> model = minilora.models.Roberta(config, rng=0)
    >>> model.positions(minilora.tensor([[1, 0, 5, 7], [0, 5, 7, 1]]).data)
    array([[1, 2, 3, 4],
           [2, 3, 4, 1]])
    """

    config: RobertaConfig

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True, *, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        super().__init__(config, add_pooling_layer, dtype=dtype, rng=rng)
        table = Embedding(config.max_position_embeddings, config.hidden_size, config.pad_token_id, dtype=dtype, rng=rng)
        initialise(table, config.initializer_range, rng)
        self.embeddings.position_embeddings = table

    @property
    def first_position(self) -> int:
        return int(self.config.pad_token_id or 0) + 1

    def positions(self, ids: Any, position_ids: Any = None) -> Any:
        limit, pad = self.config.max_position_embeddings - self.taken, self.first_position - 1
        if position_ids is not None:
            return check_positions(ids, position_ids, limit, "max_position_embeddings")
        kept = ids != pad
        positions = kept.cumsum(axis=-1) * kept + pad
        T = ids.shape[-1]
        if T + pad >= limit and not (isinstance(positions, numpy.ndarray) and positions.max() < limit):
            raise ShapeError(f"{T} tokens, but the model has a vector for {limit - pad - 1} positions ("
                             "max_position_embeddings - pad_token_id - 1): cut the text, or process it in pieces")
        return positions
