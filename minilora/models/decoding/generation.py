"""Text from a causal model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from ... import backend
from ...engine import no_grad
from ...errors import ConfigError, DTypeError, ShapeError
from ...nn.mode import in_mode
from ...ops.indices import integers
from ...ops.masks import truths
from ...settings import whole
from ..causal import CausalLM
from ..checks import token_ids
from .cache import Cache
from .sampling import Sampler

__all__ = ["Generated", "generate"]

Array = Any


class Generated(NamedTuple):
    """What `generate` gives, on the host.

    Attributes
    ----------
    ids : numpy.ndarray of int64, shape (B, n)
        The new tokens of each prompt, a stop id included; behind it pad_id. n is max_new_tokens, or less if all have stopped.
    lengths : numpy.ndarray of int64, shape (B,)
        How many of them are the text's.
    stopped : numpy.ndarray of bool, shape (B,)
        Whether the text ended with a stop id; else it was cut off.
    """

    ids: numpy.ndarray[Any, Any]
    lengths: numpy.ndarray[Any, Any]
    stopped: numpy.ndarray[Any, Any]

    def texts(self) -> list[list[int]]:
        """The new tokens of each prompt, without pads, as lists."""
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths)]


def generate(model: CausalLM, ids: Any, max_new_tokens: int, *, attention_mask: Any = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float | None = None,
             stop_ids: int | Sequence[int] = (), pad_id: int | None = None,
             seed: int | numpy.random.Generator | None = None, stream: Callable[[Array], object] | None = None,
             use_cache: bool = True) -> Generated:
    """Continue texts, each by the token that the model predicts next, and again.

    Parameters
    ----------
    model : CausalLM
        Dropout is off meanwhile, and no gradient is recorded.
    ids : array, Tensor, or lists of int
        The prompts: (B, T), or a list of lists of different lengths, or one prompt (T,), which is a batch of one.
    max_new_tokens : int
    attention_mask : array of bool, or of 0 and 1, shape (B, T), optional
        False or 0 for padding in ids, which must be at the left. Prompts of different lengths in a list are padded here.
    temperature : float
        0: the most probable token. Else tokens are drawn, with logits divided by the temperature.
    top_k : int, optional
        Draw among the k most probable tokens.
    top_p : float in (0, 1], optional
        Draw among the most probable tokens that together have this probability. After top_k, if both are given.
    repetition_penalty : float > 0, optional
        Logits of tokens that the text has, its prompt included, are divided by it if above 0, else multiplied. Padding is no
        token of the text.
    stop_ids : int or sequence of int
        Tokens that end a text.
    pad_id : int, optional
        What stands behind the end of a text; the first stop id by default.
    seed : int or numpy.random.Generator, optional
        What is drawn, on the host: one seed gives one text on every device, and row i gets the same numbers in every batch.
    stream : callable, optional
        Called after each step with its tokens, (B,); pad_id for texts that have ended.
    use_cache : bool
        With False the whole text is computed at every step: slow, and to rounding the same.

    Returns
    -------
    Generated
        The new tokens; see there.

    Raises
    ------
    DTypeError
        If the model is no CausalLM, or the ids are not integers.
    OutOfRangeError
        If an id is not in the vocabulary.
    ShapeError
        If a prompt is empty, the mask does not fit or pads at the right, or the text would get too long for the model.
    ConfigError
        If a setting is out of range.
    StateError
        If the logits are NaN.

    Notes
    -----
    The definitions of temperature, top_k, top_p and repetition_penalty, and their order, are those of transformers; see
    `minilora.models.decoding.sampling`. Prompts are computed at once, but logits are made for the last token of each only.

    A context that gives each row of a batch something of its own, opened around the call, holds for all its steps.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.models.GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    >>> model = minilora.models.GPT2(config, rng=0)
    >>> made = minilora.models.generate(model, [[1, 2, 3], [4]], 5, temperature=1.0, seed=0, stop_ids=10)
    >>> made.ids.shape, made.lengths, made.stopped
    ((2, 5), array([1, 5]), array([ True, False]))
    """
    if not isinstance(model, CausalLM):
        raise DTypeError(f"generate needs a model that predicts the next token (a CausalLM), got {type(model).__name__}")
    n, vocab_size = whole("max_new_tokens", max_new_tokens), model.embedding.num_embeddings
    stops = integers("stop id", [stop_ids] if isinstance(stop_ids, (int, numpy.integer)) else list(stop_ids), vocab_size) \
        if numpy.size(stop_ids) else numpy.zeros(0, "int64")
    pad = int(stops[0]) if pad_id is None and stops.size else int(integers("pad id", [pad_id or 0], vocab_size)[0])
    texts, tokens = prompts(ids, attention_mask, pad, vocab_size)
    check_room(model, texts.shape[1], n)
    sampler = Sampler(len(texts), vocab_size, temperature, top_k, top_p, repetition_penalty, seed)
    if stream is not None and not callable(stream):
        raise ConfigError(f"stream must be a function of the tokens of a step, (B,), got {stream!r}")
    with no_grad(), in_mode(model, training=False):
        return _continued(model, texts, tokens, n, sampler, stops, pad, stream, use_cache)


def _continued(model: CausalLM, texts: Array, tokens: Array, n: int, sampler: Sampler, stops: Array, pad: int,
               stream: Callable[[Array], object] | None, use_cache: bool) -> Generated:
    made = numpy.full((len(texts), n), pad, dtype="int64")
    lengths, stopped = numpy.zeros(len(texts), "int64"), numpy.zeros(len(texts), bool)
    cache = Cache(texts.shape[1] + min(n, texts.shape[1])) if use_cache else None
    new, padding = texts, None if tokens.all() else tokens
    sampler.read(texts, tokens)
    places = tokens.cumsum(axis=1) - 1  # of each token in its own text
    for step in range(n):
        more: dict[str, Any] = {} if padding is None else dict(position_ids=places.clip(0))
        if cache is not None:
            more["cache"] = cache
        h = model.hidden(new, key_padding=padding, **more)
        chosen = sampler(on_host(model.logits(h[..., -1:, :])))
        chosen[stopped] = pad
        made[:, step] = chosen
        lengths += ~stopped
        stopped |= numpy.isin(chosen, stops)
        if stream is not None:
            stream(chosen.copy())
        if stopped.all():
            return Generated(made[:, :step + 1], lengths, stopped)
        chosen, next_places = chosen[:, None], places[:, -1:] + 1
        sampler.read(chosen)
        if use_cache:
            new, places = chosen, next_places
            padding = None if padding is None else numpy.ones(chosen.shape, bool)
        else:
            new, places = numpy.concatenate([new, chosen], axis=1), numpy.concatenate([places, next_places], axis=1)
            padding = None if padding is None else numpy.pad(padding, ((0, 0), (0, 1)), constant_values=True)
    return Generated(made, lengths, stopped)


def on_host(logits: Any) -> Array:
    """The logits (B, 1, V) of one step as (B, V) on the host, float32 or more. On a GPU the sync point of the step."""
    array = backend.to_host(logits.data)[:, -1]
    return array if array.dtype.char in "fd" else array.astype("float32")


def prompts(ids: Any, attention_mask: Any, pad: int, vocab_size: int) -> tuple[Array, Array]:
    """The prompts (B, T) on the host, padded at the left, and where their tokens stand."""
    listed = isinstance(ids, (list, tuple))
    nested = listed and len(ids) > 0 and isinstance(ids[0], (list, tuple, numpy.ndarray))
    if listed and not all(len(row) for row in (ids if nested else [ids])):
        raise ShapeError("a prompt is empty: a text begins with a token, such as the model's bos id")
    if nested:
        rows = [token_ids(row, vocab_size) for row in ids]
        if any(row.ndim != 1 for row in rows):
            raise ShapeError(f"expected prompts of one axis each, got {[row.shape for row in rows]}")
        T = max(map(len, rows))
        if attention_mask is not None and any(len(row) < T for row in rows):
            raise ConfigError("prompts of different lengths are padded here: leave out attention_mask, or give an array of ids")
        texts, tokens = numpy.full((len(rows), T), pad, dtype="int64"), numpy.zeros((len(rows), T), bool)
        for row, text, own in zip(rows, texts, tokens):
            text[T - len(row):], own[T - len(row):] = row, True
    else:
        texts = backend.to_host(token_ids(ids, vocab_size))
        texts = token_ids(texts[None] if texts.ndim == 1 else texts, vocab_size)  # ids from a GPU are checked here
        tokens = numpy.ones(texts.shape, bool)
    if texts.ndim != 2 or not texts.size:
        raise ShapeError(f"expected prompts (B, T) with B and T >= 1, got {texts.shape}")
    return texts, tokens if attention_mask is None else checked_mask(attention_mask, texts)


def checked_mask(attention_mask: Any, texts: Array) -> Array:
    """The mask as booleans on the host; `ShapeError` unless it has the shape of the prompts, and a token at the end of each."""
    mask = truths(attention_mask)
    mask = backend.to_host(mask.reshape(1, -1) if mask.ndim == 1 else mask)
    if mask.shape != texts.shape or mask.dtype.kind != "b":
        raise ShapeError(f"expected an attention_mask of booleans, or of 0 and 1, of the shape of the ids, {texts.shape}, got "
                         f"{mask.dtype} {mask.shape}")
    if not mask[:, -1].all():
        rows = numpy.flatnonzero(~mask[:, -1]).tolist()
        raise ShapeError(f"the prompts in rows {rows[:5]} end with padding, but a text goes on at its right: pad at the left, "
                         "or give a list of prompts without padding")
    return mask


def check_room(model: CausalLM, T: int, n: int) -> None:
    """Raise `ShapeError` if a prompt of T tokens and n - 1 more do not fit; the last token is not read."""
    if model.positions is not None and T + n - 1 > model.positions:
        raise ShapeError(f"a prompt of {T} tokens and {n} new ones, the last of which is not read, need {T + n - 1} positions, "
                         f"but the model has {model.positions}: cut the prompt, or give max_new_tokens <= "
                         f"{max(0, model.positions - T + 1)}")
