"""One vector for a text: the vectors of its tokens pooled into one, whose direction says what the text is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from ... import ops
from ...engine import no_grad
from ...errors import ConfigError
from ...parallel import advised_threads, spread_out
from ...settings import whole
from ...tensor import Tensor
from ..checks import one_padding
from .classifier import Headed
from .pooled import check_pooling, pooled, width_of

__all__ = ["SentenceEncoder"]

Array = Any


class SentenceEncoder(Headed):
    """An encoder that gives one vector for a text, as sentence-transformers does.

    Parameters
    ----------
    model : Module
        The encoder, from ids (..., T) to hidden states (..., T, d), such as `Bert`.
    pooling : {"mean", "cls"}
        The mean over the tokens that are not padding, or the first token's vector.
    normalize : bool
        Whether vectors get length 1: their products then are cosines.
    max_tokens : int, optional
        Longer texts are cut by `embed`. By default as many as the model has positions for.

    Attributes
    ----------
    model : Module
    pooling, normalize, max_tokens
        As given.

    Raises
    ------
    ConfigError
        If a setting is out of range.

    Notes
    -----
    With the mask m of 1 for tokens and 0 for padding: v = sum_t m_t h_t / sum_t m_t, and then v / max(||v||, 1e-12).
    Source: Reimers and Gurevych 2019, arXiv 1908.10084, section 3.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.BertConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
    ...                                 intermediate_size=8, max_position_embeddings=8)
    >>> encoder = minilora.models.SentenceEncoder(minilora.nn.Bert(config, rng=0))
    >>> encoder([[1, 2, 3], [4, 5, 0]], attention_mask=[[1, 1, 1], [1, 1, 0]]).shape
    (2, 4)
    >>> encoder.embed([[1, 2, 3], [4, 5]]).shape
    (2, 4)
    """

    body_name = "model"
    names_elsewhere = {"model.": ""}  # in adapter files: there the encoder is transformers' model itself

    def __init__(self, model: Any, pooling: str = "mean", normalize: bool = True, max_tokens: int | None = None) -> None:
        check_pooling(pooling)
        if not isinstance(normalize, bool):
            raise ConfigError(f"normalize must be True or False, got {normalize!r}")
        super().__init__(model)
        self.pooling, self.normalize = pooling, normalize
        self.max_tokens = None if max_tokens is None else whole("max_tokens", max_tokens)

    def forward(self, ids: Any, key_padding: Any = None, *, attention_mask: Any = None, **more: Any) -> Tensor:
        """A vector for every text.

        Parameters
        ----------
        ids : array, Tensor, or nested lists of int, shape (..., T)
        key_padding : array or nested lists of bool, or of 0 and 1, shape (..., T), optional
            True or 1 for tokens, False or 0 for padding, which nobody sees, and which is not in the mean.
        attention_mask : the same, optional
            Another name of key_padding: that of transformers.
        **more
            What else the encoder takes.

        Returns
        -------
        Tensor, shape (..., d)
        """
        key_padding = one_padding(key_padding, attention_mask)
        v = pooled(self.hidden(ids, key_padding, **more), key_padding, self.pooling)
        if not self.normalize:
            return v
        squares = ops.sum(v * v, axis=-1, keepdims=True)
        return v / ops.sqrt(ops.maximum(squares, 1e-24))

    def embed(self, texts: Sequence[Sequence[int]], batch_size: int = 32, threads: int | None = None) -> Array:
        """Vectors of many texts of different lengths, without a graph: sorted by length, so that little is padded.

        Parameters
        ----------
        texts : sequence of sequences of int
            Token ids, unpadded, with the tokens that begin and end a text.
        batch_size : int
            Texts at a time.
        threads : int, optional
            How many batches are computed at a time, each with single-threaded BLAS; `parallel.advised_threads` by default. In
            training mode, where dropout counts its calls, it is one.

        Returns
        -------
        array, shape (len(texts), d)
            On the host, in the order of the texts.

        Raises
        ------
        ConfigError
            If a text is empty, or batch_size or threads is not an int >= 1.
        """
        whole("batch_size", batch_size)
        cut = [list(text)[:self.max_tokens] for text in texts]
        if not all(cut):
            raise ConfigError(f"embed: text {next(i for i, text in enumerate(cut) if not text)} has no tokens")
        order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))  # the longest first: what does not fit shows at once
        pad = self.config.pad_token_id or 0
        vectors: Array = numpy.empty((len(cut), self.width), next(iter(self.parameters())).dtype)

        def compute(start: int) -> None:
            chosen = order[start:start + batch_size]
            lengths = [len(cut[i]) for i in chosen]
            ids = numpy.full((len(chosen), max(lengths)), pad)
            for row, i in zip(ids, chosen):
                row[:len(cut[i])] = cut[i]
            mask = numpy.arange(ids.shape[1]) < numpy.array(lengths)[:, None]
            with no_grad():
                vectors[chosen] = self(ids, None if mask.all() else mask).numpy()

        threads = advised_threads(self.parameters()) if threads is None else whole("threads", threads)
        spread_out(compute, range(0, len(order), batch_size), 1 if self.training else threads)
        return vectors

    @property
    def width(self) -> int:
        """d, the length of a vector."""
        return width_of(self.config)
