"""Checks of what a transformer is made with, and of the ids it is given."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..backend import device_of
from ..errors import ConfigError, ShapeError
from ..nn.linear import check_size
from ..ops.dropout import check_dropout
from ..ops.indices import integers

__all__ = [
    "check_config", "check_multiple", "check_pad", "check_positions", "check_tied", "one_padding", "token_ids",
    "token_types",
]


def positive(name: str, value: Any) -> None:
    """Raise `ConfigError` unless value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < float("inf"):
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")


def dropout(name: str, value: Any) -> None:
    """Raise `ConfigError` unless value is a probability in [0, 1)."""
    try:
        check_dropout(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_config(config: Any, sizes: Sequence[str], numbers: Sequence[str], dropouts: Sequence[str] = ()) -> None:
    """Check fields of a frozen dataclass, and make its sizes Python ints.

    Parameters
    ----------
    config : dataclass
    sizes, numbers, dropouts : sequence of str
        Fields that must be ints >= 1, finite numbers above 0, and probabilities in [0, 1).

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.
    """
    problems = []
    for check, names in ((check_size, sizes), (positive, numbers), (dropout, dropouts)):
        for name in names:
            try:
                check(name, getattr(config, name))
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{type(config).__name__}: {count}", *problems]))
    for name in sizes:
        object.__setattr__(config, name, int(getattr(config, name)))  # the ops know no numpy.int64


def check_multiple(config: Any, first: str, second: str) -> None:
    """Raise `ConfigError` unless the field `first` is a multiple of the field `second`."""
    a, b = getattr(config, first), getattr(config, second)
    if a % b:
        raise ConfigError(f"{type(config).__name__}: {first} must be a multiple of {second}, got {a} and {b}")


def check_tied(config: Any) -> None:
    """Raise `ConfigError` unless the field tie_word_embeddings is a bool."""
    if not isinstance(config.tie_word_embeddings, bool):
        raise ConfigError(f"{type(config).__name__}: tie_word_embeddings must be True or False, got "
                          f"{config.tie_word_embeddings!r}")


def check_pad(config: Any) -> None:
    """Raise `ConfigError` unless the field pad_token_id is None or a token."""
    pad = config.pad_token_id
    if pad is not None and not (type(pad) is int and 0 <= pad < config.vocab_size):
        raise ConfigError(f"{type(config).__name__}: pad_token_id must be None or an int in [0, {config.vocab_size}), got "
                          f"{pad!r}")


def token_ids(ids: Any, vocab_size: int) -> Any:
    """Token ids (..., T) as an array, checked where they lie on the host; see `ops.embedding`."""
    ids = integers("token id", ids, vocab_size)
    if not ids.shape or ids.shape[-1] < 1:
        raise ShapeError(f"expected token ids (..., T) with T >= 1, got shape {ids.shape}: is a text empty?")
    return ids


def one_padding(key_padding: Any, attention_mask: Any) -> Any:
    """The padding under either of its two names; `ConfigError` if it is given under both."""
    if key_padding is not None and attention_mask is not None:
        raise ConfigError("key_padding and attention_mask are two names of one thing, true or 1 for tokens: give one of them")
    return attention_mask if key_padding is None else key_padding


def token_types(ids: Any, given: Any, number: int) -> Any:
    """The segments of ids (..., T), checked; if none are given one 0 for all, where the ids are."""
    if given is None:
        return device_of(ids).xp.zeros((1,) * ids.ndim, dtype="int64")
    segments = integers("token type", given, number)
    if segments.shape != ids.shape:
        raise ShapeError(f"expected token_type_ids of the shape of the ids, {ids.shape}, got {segments.shape}")
    return segments


def check_positions(ids: Any, position_ids: Any, limit: int, setting: str, start: int = 0) -> Any:
    """The positions of ids (..., T): T from `start` on, unless given, (T,) or the shape of ids. With as many axes as ids."""
    T = ids.shape[-1]
    alike = (1,) * (ids.ndim - 1) + (T,)  # one row of positions: their first axis is the batch's, not the time's
    if position_ids is None:
        if start + T > limit:
            held = f" after {start} in the cache" if start else ""
            raise ShapeError(f"{T} tokens{held}, but the model has a vector for {limit} positions ({setting}): cut the text, "
                             "or process it in pieces")
        return device_of(ids).xp.arange(start, start + T).reshape(alike)  # where the ids are
    positions = integers("position", position_ids, limit)
    if positions.shape not in (ids.shape, (T,)):
        raise ShapeError(f"expected position_ids {(T,)} or {ids.shape}, like the token ids, got {positions.shape}")
    return positions if positions.shape == ids.shape else positions.reshape(alike)
