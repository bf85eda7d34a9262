"""Rows as token ids, and which of these are to be learned.

A row of tokens is what the model will see when it is used: a prompt has the tokens that it has alone, since that is how it is
given when the model is to answer; where a prompt and its completion, written as one text, would share a token, the row keeps
the prompt's own. A text ends with the token that ends texts, once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ...errors import ConfigError, FormatError
from .rows import Row

__all__ = ["Encoded", "Encoder", "Tokenizer"]

AT_A_TIME = 512  # rows that the tokenizer is given at once: it takes them on all cores


class Tokenizer(Protocol):
    """What is asked of a tokenizer: `minilora.models.Tokenizer` has it."""

    eos_ids: tuple[int, ...]
    pad_id: int | None
    special_tokens: dict[str, str]

    def id_of(self, token: str) -> int | None: ...
    def encode(self, texts: Any, *, special_tokens: bool = True) -> Any: ...
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str: ...
    def chat(self, messages: Any, *, add_generation_prompt: bool = True, **variables: Any) -> str: ...


class Encoded(NamedTuple):
    """A row as tokens.

    Attributes
    ----------
    ids : list of int
    learned : list of (int, int)
        From and to which place tokens are to be learned.
    lost : int
        How many tokens were cut off.
    shared : bool
        Whether prompt and completion would share a token.
    fault : str
        Why there are none.
    """

    ids: list[int]
    learned: list[tuple[int, int]]
    lost: int = 0
    shared: bool = False
    fault: str = ""


class Encoder:
    """Writes the rows of one form as tokens.

    Parameters
    ----------
    tokenizer : Tokenizer
    form : str
        One of `FORMS`.
    train_on : {"completion", "assistant", "all"}
    max_length : int
        Tokens; what is longer is cut at its end.
    """

    def __init__(self, tokenizer: Tokenizer, form: str, train_on: str, max_length: int) -> None:
        self.tokenizer, self.train_on, self.max_length = tokenizer, train_on, max_length
        self.of_form = {"completion": self._completions, "messages": self._chats, "text": self._texts}.get(form, self._whole)
        self.eos = end_of_text(tokenizer)
        self.before, self.after = around(tokenizer)
        if max_length <= len(self.before) + len(self.after):
            raise ConfigError(f"max_length={max_length} has room for the special tokens only: give "
                              f"{len(self.before) + len(self.after) + 1} or more")

    def encode(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        """Every row as tokens, in order."""
        for low in range(0, len(rows), AT_A_TIME):
            yield from self.of_form(rows[low:low + AT_A_TIME])

    # -- the forms --------------------------------------------------------------------------------------------------

    def _texts(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        for bare in self._bare([row.fields["text"] for row in rows]):
            ids = self._closed([*self.before, *bare])
            yield self._cut(ids, [(0, len(ids))]) if bare else Encoded([], [], fault="'text' has no tokens")

    def _whole(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        """Texts as a classifier sees them: with what the model expects around a text, also where it was cut."""
        room = self.max_length - len(self.before) - len(self.after)
        for bare in self._bare([row.fields["text"] for row in rows]):
            fault = "" if bare else "'text' has no tokens"
            yield Encoded([*self.before, *bare[:room], *self.after], [], max(0, len(bare) - room), fault=fault)

    def _completions(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        prompts, completions = [row.fields["prompt"] for row in rows], [row.fields["completion"] for row in rows]
        alone = self._bare([*prompts, *completions])
        wholes = self._bare([first + second for first, second in zip(prompts, completions)])
        for prompt, completion, whole in zip(alone, alone[len(rows):], wholes):
            tokens, place, shared = self._joined(prompt, completion, whole)
            ids = self._closed([*self.before, *tokens])
            learned = (0, len(ids)) if self.train_on == "all" else (len(self.before) + place, len(ids))
            fault = "" if len(tokens) > place else "'completion' has no tokens"
            yield Encoded([], [], fault=fault) if fault else self._cut(ids, [learned], shared)

    def _joined(self, prompt: list[int], completion: list[int], whole: list[int]) -> tuple[list[int], int, bool]:
        """Prompt and completion as one row, where the completion begins in it, and whether they would share a token.

        The tokens of the whole text, if they begin with those of the prompt; else those of the two, if they say the same text;
        else, with a tokenizer that writes a text otherwise when it stands alone, those of the whole text after all.
        """
        if whole[:len(prompt)] == prompt:
            return whole, len(prompt), False
        both, decode = [*prompt, *completion], self.tokenizer.decode
        if decode(both, skip_special_tokens=False) == decode(whole, skip_special_tokens=False):
            return both, len(prompt), True
        return whole, common(prompt, whole), True

    def _chats(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        for row in rows:
            try:
                yield self._chat(row.fields["messages"], {"tools": row.fields["tools"]} if row.fields.get("tools") else {})
            except ConfigError as error:  # these messages are refused
                yield Encoded([], [], fault=str(error))
            except FormatError as error:  # the template is wrong: so it would be for the next row
                raise FormatError(f"{row.path}:{row.line}: {error}") from error

    def _chat(self, messages: list[Any], extra: dict[str, Any]) -> Encoded:
        whole = self.tokenizer.chat(messages, add_generation_prompt=False, **extra)
        places, fault = self._answers(messages, whole, extra)
        ends = sorted({place for pair in places for place in pair})
        ids, *starts = self.tokenizer.encode([whole, *(whole[:end] for end in ends)], special_tokens=False).ids
        token = {end: common(start, ids) for end, start in zip(ends, starts)}
        learned = [(token[low], token[high]) for low, high in places]
        return Encoded([], [], fault=fault) if fault else self._cut(ids, learned)

    def _answers(self, messages: list[Any], whole: str, extra: dict[str, Any]) -> tuple[list[tuple[int, int]], str]:
        """Where, in the text of a chat, stands what is to be learned."""
        if self.train_on == "all":
            return [(0, len(whole))], ""
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        places = []
        for i in numbers if self.train_on == "assistant" else numbers[-1:]:
            last = i + 1 == len(messages)
            end = whole if last else self.tokenizer.chat(messages[:i + 1], add_generation_prompt=False, **extra)
            asked = self._question(messages[:i], end, extra)
            if asked is None or not whole.startswith(end):
                return [], (f"the chat template writes what comes before message {i + 1} otherwise once there is more: where "
                            "the answer begins cannot be told. train_on=" +
                            ("'all' learns all" if last else "'completion' learns the last answer only"))
            places.append((asked, len(end)))
        return places, ""

    def _question(self, messages: list[Any], text: str, extra: dict[str, Any]) -> int | None:
        """Where an answer begins: behind the generation prompt, if the text has that; None if it has not even the question."""
        for prompt in (True, False):
            asked = self.tokenizer.chat(messages, add_generation_prompt=prompt, **extra) if messages else ""
            if text.startswith(asked):
                return len(asked)
        return None

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _bare(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer.encode(texts, special_tokens=False).ids
        return ids

    def _closed(self, ids: list[int]) -> list[int]:
        """A text with its end: the tokens that the model expects behind a text, and that which ends texts, once."""
        if not (self.after and ids[-1:] == self.after[:1] and ids[-1] in self.tokenizer.eos_ids):
            ids = [*ids, *self.after]
        return ids if self.eos is None or ids[-1] in self.tokenizer.eos_ids else [*ids, self.eos]

    def _cut(self, ids: list[int], learned: list[tuple[int, int]], shared: bool = False) -> Encoded:
        most = self.max_length
        kept = [(low, min(high, most)) for low, high in learned if low < most]
        return Encoded(ids[:most], kept, max(0, len(ids) - most), shared)


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that ends a text: the eos_token, else the first of eos_ids; None where there is none."""
    token = tokenizer.special_tokens.get("eos_token")
    own = None if token is None else tokenizer.id_of(token)
    return own if own is not None else next(iter(tokenizer.eos_ids), None)


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a text begins and ends with."""
    bare, full = (tokenizer.encode(["a"], special_tokens=wanted).ids[0] for wanted in (False, True))
    for place in range(len(full) - len(bare) + 1):
        if full[place:place + len(bare)] == bare:
            return full[:place], full[place + len(bare):]
    raise FormatError(f"the tokenizer writes the text 'a' as the tokens {bare} and, with special tokens, as {full}: it does "
                      "not put them around the text, and where a prompt ends cannot be told")


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return len(os.path.commonprefix([list(a), list(b)]))
