"""Text to token ids and back, through the tokenizers library (extra `models`). Files only: nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ...errors import ConfigError, DTypeError, FileError, FormatError
from ...settings import whole
from ..checkpoints.fields import read_json
from .vocabularies import from_file, from_older_files, library

__all__ = ["Encoded", "Tokenizer"]

SIDES = ("left", "right")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Encoded(NamedTuple):
    """Texts as token ids.

    Attributes
    ----------
    ids, attention_mask, token_type_ids : list of list of int, or numpy.ndarray of int64, shape (B, T)
        A list for each text; arrays, if they were padded. attention_mask is 1 for tokens, 0 for padding; token_type_ids is 1
        for the second text of a pair.
    cut : list of int
        How many tokens of each text were cut off to keep to max_length.
    """

    ids: Any
    attention_mask: Any
    token_type_ids: Any
    cut: list[int]


class Tokenizer:
    """The tokenizer of a model.

    Parameters
    ----------
    path : str or Path
        A folder with a tokenizer.json, or that file. Where a folder has only the older files, vocab.json and merges.txt or
        vocab.txt, those of GPT-2, RoBERTa and BERT are read. Beside it tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json are looked at for special tokens and chat templates.

    Attributes
    ----------
    bos_id, pad_id : int or None
        The token that a text begins with, and that of padding, where the files name one.
    eos_ids : tuple of int
        The tokens that end a text: those of generation_config.json, else of config.json; and the eos_token.
    special_tokens : dict of str to str
        bos_token, eos_token and so on, as far as the files name them.
    vocab_size : int
        Tokens, added ones included. The model's table may have more rows.

    Raises
    ------
    FileError
        If there is no file, or no library to read it with: ``pip install 'minilora[models]'``.
    FormatError
        If a file is not what it should be.

    Notes
    -----
    Padding and truncation that tokenizer.json asks for are not done unless `encode` is told to: nothing is cut unseen.

    Examples
    --------
    >>> tokenizer = Tokenizer("gpt2/")                                                     # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello world").ids[0])                           # doctest: +SKIP
    'Hello world'
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        file = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise FileError(f"{path}: there is no such file or folder: give the folder of a checkpoint, or its tokenizer.json")
        self.settings = self._settings("tokenizer_config.json")
        fields = self._settings("config.json")
        self._library = from_file(file) if file.is_file() else from_older_files(self.folder, self.settings, fields)
        self._library.no_padding()
        self._library.no_truncation()
        self.vocab_size = int(self._library.get_vocab_size(with_added_tokens=True))
        self.special_tokens = self._special_tokens()
        said = [("generation_config.json", self._settings("generation_config.json")), ("config.json", fields)]
        self.bos_id = self._one_id("bos", said)
        self.pad_id = self._one_id("pad", said)
        given = next((ids for name, found in said if (ids := self._ids(name, found, "eos_token_id"))), ())
        own = self.id_of(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None
        self.eos_ids = given if own is None or own in given else (*given, own)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, bos_id={self.bos_id}, eos_ids={self.eos_ids}, pad_id={self.pad_id})"

    def __len__(self) -> int:
        return self.vocab_size

    # -- files ------------------------------------------------------------------------------------------------------

    def _settings(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    def _special_tokens(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in (self.settings, self._settings("special_tokens_map.json")):
            for name in SPECIAL:
                value = source.get(name)
                value = value.get("content") if isinstance(value, Mapping) else value
                if isinstance(value, str):
                    found.setdefault(name, value)
        return found

    def _one_id(self, name: str, said: list[tuple[str, dict[str, Any]]]) -> int | None:
        token = self.special_tokens.get(f"{name}_token")
        own = None if token is None else self.id_of(token)
        if own is not None:
            return own
        return next((ids[0] for file, fields in said if (ids := self._ids(file, fields, f"{name}_token_id"))), None)

    def _ids(self, file: str, fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
        value = fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None or value == -1 else [value]  # -1: none, in old files
        for one in ids:
            if type(one) is not int or not 0 <= one < self.vocab_size:
                raise FormatError(f"{self.folder / file}: {name} is {one!r}, and the tokenizer has the ids 0 to "
                                  f"{self.vocab_size - 1}: is this another model's tokenizer?")
        return tuple(dict.fromkeys(ids))

    # -- tokens -----------------------------------------------------------------------------------------------------

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._library.token_to_id(token)
        return found

    def token_of(self, id: int) -> str | None:
        """The token of an id as the vocabulary writes it, or None."""
        found: str | None = self._library.id_to_token(id)
        return found

    def encode(self, texts: str | Iterable[str | tuple[str, str]], *, padding: str | None = None, max_length: int | None = None,
               special_tokens: bool = True, cut_side: str = "right") -> Encoded:
        """Texts to ids.

        Parameters
        ----------
        texts : str, or list of str or of pairs of str
            A single text is a batch of one. A pair becomes one row, as the model's kind joins two texts.
        padding : {"left", "right"}, optional
            Make arrays, with pad_id (or where there is none, an eos id or 0) at this side. `generate` wants "left", or none.
        max_length : int, optional
            Cut what is longer: of a pair the longer text first. `Encoded.cut` says how much was lost; without it nothing is.
        special_tokens : bool
            Put the tokens around a text that its model expects. False for a text that has them, such as a chat's.
        cut_side : {"right", "left"}
            Where to cut.

        Returns
        -------
        Encoded
        """
        if isinstance(texts, tuple):
            raise DTypeError("encode: a tuple could be a pair or two texts: give a list, [(first, second)] or [first, second]")
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_side("cut_side", cut_side)
        if padding is not None:
            check_side("padding", padding)
        parts = [as_parts(text) for text in texts]
        flat = self._library.encode_batch([part for pair in parts for part in pair], add_special_tokens=False)
        encodings, cut = iter(flat), []
        rows = []
        for pair in parts:
            own = [next(encodings) for _ in pair]
            cut.append(0 if max_length is None else self._cut(own, whole("max_length", max_length), special_tokens, cut_side))
            rows.append(self._library.post_process(*own, add_special_tokens=special_tokens))
        columns = [row.ids for row in rows], [[1] * len(row.ids) for row in rows], [row.type_ids for row in rows]
        if padding is None:
            return Encoded(*columns, cut)
        pad = self.pad_id if self.pad_id is not None else next(iter(self.eos_ids), 0)
        return Encoded(padded(columns[0], pad, padding), padded(columns[1], 0, padding), padded(columns[2], 0, padding), cut)

    def _cut(self, pair: Sequence[Any], most: int, special_tokens: bool, side: str) -> int:
        """Cut the encodings of one or two texts so that they fit, special tokens included; how many tokens that loses."""
        room = most - (self._library.num_special_tokens_to_add(len(pair) == 2) if special_tokens else 0)
        lengths = [len(one.ids) for one in pair]
        if sum(lengths) <= room:
            return 0
        if room < 0:
            raise ConfigError(f"max_length={most} has no room for the special tokens: give {most - room} or more")
        kept = list(lengths)
        while sum(kept) > room:  # of equal ones the second
            longest = max(range(len(kept)), key=lambda i: (kept[i], i))
            kept[longest] -= 1
        for one, n in zip(pair, kept):
            one.truncate(n, direction=side)
        return sum(lengths) - sum(kept)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """One row of ids to text."""
        text: str = self._library.decode(self._row(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_batch(self, rows: Iterable[Any], skip_special_tokens: bool = True) -> list[str]:
        """Rows of ids to texts: those of ``generate(...).texts()``."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def _row(self, ids: Any) -> list[int]:
        row = numpy.asarray(ids)
        if row.size and (row.ndim != 1 or row.dtype.kind not in "iu" or row.min() < 0):
            raise DTypeError(f"decode: expected one row of ids >= 0, got {row.dtype} {row.shape}: for several rows take "
                             "decode_batch")
        return [int(i) for i in row]

    def streaming(self, write: Callable[[str], object]) -> Callable[[Any], None]:
        """For the argument `stream` of `generate` with one prompt: writes the text as soon as its characters are whole."""
        decoder = library().decoders.DecodeStream(skip_special_tokens=True)

        def step(ids: Any) -> None:
            if len(ids) != 1:
                raise ConfigError(f"streaming writes one text, and here are {len(ids)}: give generate one prompt")
            piece = decoder.step(self._library, int(ids[0]))
            if piece:
                write(piece)
        return step

    # -- chats ------------------------------------------------------------------------------------------------------

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, template: str | None = None,
             **variables: Any) -> str:
        """Messages as the text that the model was trained on, by the chat template of its files.

        Parameters
        ----------
        messages : sequence of mapping
            As ``[{"role": "user", "content": "Hello"}]``.
        add_generation_prompt : bool
            End where the model's answer begins.
        template : str, optional
            The name of one of several templates; by default "default", or with `tools` "tool_use", if there is one.
        **variables
            What else the template knows: tools, documents, enable_thinking, ... With ``now=datetime.datetime(...)`` it can ask
            for the date; without, it cannot: the same messages give the same text on every day.

        Returns
        -------
        str
            With the special tokens in it: encode it with ``special_tokens=False``.

        Raises
        ------
        FormatError
            If there is no template, it is not right, or it does more work than a template needs.
        ConfigError
            If the template refuses the messages.
        FileError
            If jinja2 is not installed.
        """
        from .chat import render, templates_in

        found = templates_in(self.folder, self.settings)
        given = {**self.special_tokens, **variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return render(found, template, given)


def check_side(name: str, side: Any) -> None:
    """`ConfigError` unless it is "left" or "right"."""
    if side not in SIDES:
        raise ConfigError(f"{name} must be 'left' or 'right', got {side!r}")


def as_parts(text: Any) -> tuple[str, ...]:
    """A text, or a pair of texts, as a tuple of one or two."""
    parts = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, (tuple, list)) else ()
    if not parts or len(parts) > 2 or not all(isinstance(part, str) for part in parts):
        raise DTypeError(f"encode: expected a text or a pair of texts, got {text!r}")
    return parts


def padded(rows: Sequence[Sequence[int]], value: int, side: str) -> numpy.ndarray[Any, Any]:
    """Rows of different lengths as one array (B, T) of int64."""
    T = max(map(len, rows), default=0)
    table = numpy.full((len(rows), T), value, dtype="int64")
    for line, row in zip(table, rows):
        start = T - len(row) if side == "left" else 0
        line[start:start + len(row)] = row
    return table
