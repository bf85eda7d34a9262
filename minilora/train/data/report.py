"""What was read: counts, and what is worth a look."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from .encoding import Tokenizer, end_of_text
from .tokens import Tokens

__all__ = ["Part", "Report", "notes_on"]


@dataclasses.dataclass(frozen=True)
class Part:
    """What became of the rows of a part.

    Attributes
    ----------
    rows : int
        That are there.
    tokens, targets, longest : int
    cut, lost : int
        Rows that were cut at max_length, and tokens that this cost.
    left_out : int
        Rows of which nothing would be learned: their whole completion was cut, or they are a single token.
    shared : int
        Rows whose prompt and completion would share a token if they were written as one text.
    """

    rows: int
    tokens: int
    targets: int
    longest: int
    cut: int
    lost: int
    left_out: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read.

    Attributes
    ----------
    path : str
    form : str
        Of the rows: "text", "completion", "messages", "label" or "score".
    train_on : str
    max_length : int
    labels : tuple of str, optional
        The classes, in order.
    parts : dict of str to Part
        By "train", "valid", "test".
    notes : list of str
        What is no error and worth a look.
    """

    path: str
    form: str
    train_on: str
    max_length: int
    labels: tuple[str, ...] | None
    parts: dict[str, Part]
    notes: list[str]

    @property
    def learned(self) -> str:
        """What of a row is learned, in words."""
        if self.form in ("label", "score"):
            return "a text's class is learned" if self.form == "label" else "a text's score is learned"
        if self.form == "text" or self.train_on == "all":
            return "all tokens are learned"
        if self.form == "messages" and self.train_on == "assistant":
            return "all messages of the assistant are learned, the others are masked"
        return "the prompt is masked, " + ("the completion" if self.form == "completion" else "the last answer") + " is learned"

    @property
    def header(self) -> str:
        """One line about all of it."""
        parts = ", ".join(f"{name} {part.rows:,} rows ({part.targets:,} of {part.tokens:,} tokens learned)"
                          if self.labels is None and self.form != "score" else f"{name} {part.rows:,} rows"
                          for name, part in self.parts.items())
        classes = "" if self.labels is None else f"; {len(self.labels)} classes"
        return f"data: {parts}; rows of {self.form}: {self.learned}{classes}"

    def as_dict(self) -> dict[str, Any]:
        """All of it, and the header, as numbers, texts, lists and dicts."""
        return {**dataclasses.asdict(self), "header": self.header}


def notes_on(report: Report, data: dict[str, Tokens], answers: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What is worth a look."""
    notes = []
    for name, part in report.parts.items():
        if part.cut:
            notes.append(f"{name}: {part.cut:,} rows were cut to {report.max_length} tokens, {part.lost:,} tokens in all")
        if part.left_out:
            notes.append(f"{name}: {part.left_out:,} rows were left out: nothing would be learned of them, since they have a "
                         f"single token, or {report.max_length} tokens have no room for their completion")
        if part.shared:
            notes.append(f"{name}: in {part.shared:,} rows prompt and completion would share a token: the prompt keeps the "
                         "tokens it has alone. A blank belongs at the beginning of the completion")
    seen = set(map(row_key(data["train"]), range(len(data["train"]))))
    for name in ("valid", "test"):
        if name in data:
            key = row_key(data[name])
            twice = sum(key(i) in seen for i in range(len(data[name])))
            notes += [f"{name}: {twice:,} of {len(data[name]):,} rows are in train too"] if twice else []
    wanted = answers["train"]
    if wanted is not None and len(set(wanted.tolist())) == 1:
        notes.append(f"every training row has the same {report.form}: there is nothing to learn from it")
    if report.labels is not None and wanted is not None:
        counts = Counter(wanted.tolist())
        unused = [name for i, name in enumerate(report.labels) if not counts[i]]
        notes += [f"no training row has the label {', '.join(map(repr, unused[:5]))}"] if unused else []
    if report.form in ("text", "completion") and end_of_text(tokenizer) is None:
        notes.append("the tokenizer has no token that ends texts: the model does not learn where to stop")
    return notes


def row_key(data: Tokens) -> Callable[[int], bytes]:
    return lambda i: data.row(i).tobytes()
