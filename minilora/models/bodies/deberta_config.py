"""The shape of a DeBERTa of the second and third version."""

from __future__ import annotations

import dataclasses

from ... import ops
from ...errors import ConfigError
from ...settings import whole
from ..activations import check_activation
from ..checks import check_config, check_multiple, check_pad, check_tied

__all__ = ["DebertaV2Config"]

TERMS = ("c2p", "p2c")


@dataclasses.dataclass(frozen=True)
class DebertaV2Config:
    """The shape of a DeBERTa-v2 or v3, with the names and, dropout apart, the defaults of its config.json: deberta-v2-xlarge.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : int
        V, d, layers, heads, width of the MLP. d is a multiple of the heads.
    hidden_act : str
        Of the MLP, and of the head for masked tokens.
    max_position_embeddings : int
        The largest T, where there are vectors of positions (position_biased_input).
    type_vocab_size : int
        Segments; 0 for none.
    layer_norm_eps : float
    hidden_dropout_prob : float
        Dropout in training: after the embeddings, of the vectors of distances, before each residual addition. 0 here, 0.1 in
        the files.
    relative_attention : bool
        Whether attention counts how far apart two tokens stand.
    max_relative_positions : int
        The distance from which on all are alike; below 1 for max_position_embeddings.
    position_buckets : int
        Distances up to half of it have a vector each, greater ones share them (`ops.distance_buckets`); below 1 for a vector
        for every distance.
    pos_att_type : sequence of str, or str
        The terms of the scores with distances: ``"c2p"``, of queries with vectors of distances, ``"p2c"``, of keys with them;
        as a list, or as ``"p2c|c2p"``.
    share_att_key : bool
        Take the projections of the contents for the distances too, and none of their own.
    norm_rel_ebd : str
        ``"layer_norm"`` to normalise the vectors of distances, or ``"none"``.
    position_biased_input : bool
        Add vectors of positions to those of the tokens.
    conv_kernel_size, conv_groups : int
        Kernel, odd, and groups of a convolution beside the first layer, as in v2-xlarge; 0 for none.
    conv_act : str
        Of that convolution.
    pooler_hidden_act : str
    pooler_dropout : float
        Of the pooler of a classifier of texts.
    cls_dropout : float, optional
        Of its output; hidden_dropout_prob by default.
    legacy : bool
        Which head for masked tokens: transformers has two, with the same formula and other names.
    tie_word_embeddings : bool
        The logits of that head are products with the table of the tokens: nothing else is offered.
    pad_token_id : int, optional
        The id whose vector starts as zeros and is not trained.
    initializer_range : float
        Standard deviation of the initial weights.

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.

    Examples
    --------
    >>> config = DebertaV2Config(relative_attention=True, position_buckets=256, pos_att_type="p2c|c2p")
    >>> config.span, config.pos_att_type
    (256, ('p2c', 'c2p'))
    """

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    hidden_dropout_prob: float = 0.0
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    legacy: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        terms = self.pos_att_type or ()
        if isinstance(terms, str):
            terms = [part.strip() for part in terms.lower().split("|") if part.strip() not in ("", "none")]
        object.__setattr__(self, "pos_att_type", tuple(terms))
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "max_position_embeddings", "conv_groups"]
        dropouts = ["hidden_dropout_prob", "pooler_dropout"] + ["cls_dropout"] * (self.cls_dropout is not None)
        check_config(self, sizes, ["layer_norm_eps", "initializer_range"], dropouts)
        check_multiple(self, "hidden_size", "num_attention_heads")
        for name in ("hidden_act", "conv_act", "pooler_hidden_act"):
            check_activation(self, name)
        check_tied(self)
        check_pad(self)
        self._check_distances()
        for name, least in (("type_vocab_size", 0), ("conv_kernel_size", 0)):
            object.__setattr__(self, name, whole(f"DebertaV2Config: {name}", getattr(self, name), least))
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ConfigError(f"DebertaV2Config: conv_kernel_size must be odd, or 0 for none, got {self.conv_kernel_size}: an "
                              "even kernel gives a text of another length")
        if self.conv_kernel_size:
            check_multiple(self, "hidden_size", "conv_groups")

    def _check_distances(self) -> None:
        problems = [f"{name} must be True or False, got {getattr(self, name)!r}" for name in
                    ("relative_attention", "share_att_key", "position_biased_input", "legacy")
                    if not isinstance(getattr(self, name), bool)]
        strange = [term for term in self.pos_att_type if term not in TERMS]
        if strange or len(set(self.pos_att_type)) < len(self.pos_att_type):
            problems.append(f"pos_att_type may name c2p and p2c, each once, got {'|'.join(map(str, self.pos_att_type))}")
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            problems.append(f"norm_rel_ebd must be 'none' or 'layer_norm', got {self.norm_rel_ebd!r}")
        for name in ("max_relative_positions", "position_buckets"):
            try:
                object.__setattr__(self, name, whole(name, getattr(self, name), -1))
            except ConfigError as error:
                problems.append(str(error))
        if not problems and self.relative_attention:
            try:
                self.buckets(1)
            except ConfigError as error:
                problems.append(f"position_buckets and max_relative_positions do not go together: {error}")
        if problems:
            raise ConfigError("\n  ".join([f"DebertaV2Config: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))

    @property
    def span(self) -> int:
        """Half of the number of vectors of distances."""
        return self.position_buckets if self.position_buckets > 0 else self.farthest

    @property
    def farthest(self) -> int:
        """max_relative_positions, or what it means below 1."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    def buckets(self, T: int) -> object:
        """The row of the table of distances for each of those from -(T - 1) to T - 1; see `ops.distance_buckets`."""
        return ops.distance_buckets(T, self.span, self.farthest if self.position_buckets > 0 else None)
