"""What may stand in a line: five forms of rows, and how a file is found to have one of them.

    {"text"}                    a text to continue: all of it is learned
    {"prompt", "completion"}    the completion is learned, where the prompt was given
    {"messages"}                a chat; "tools" besides, if its template knows them
    {"text", "label"}           a text, and the class that it belongs to
    {"text", "score"}           a text, and a number

A file has one form, and that is decided by all of its lines: the form of most. A line of another form is a fault of that line.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .problems import Problems, short

__all__ = ["FORMS", "Row", "checked", "form_of"]

# form: the keys that it must have, and those that it may have
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "completion": (("prompt", "completion"), ()),
    "messages": (("messages",), ("tools",)),
    "label": (("text", "label"), ()),
    "score": (("text", "score"), ()),
}
LARGEST = 3.4e38  # of float32
TAGGED = ({"tokens", "words"}, {"labels", "tags", "ner_tags", "pos_tags"})  # what rows of token classification have


class Row(NamedTuple):
    """An object of a file: where it stands, and what it holds."""

    path: Path
    line: int
    fields: dict[str, Any]


def form_of(rows: Sequence[Row], ignore: Iterable[str], problems: Problems) -> str:
    """The form of most rows; the others, and what no form has, go to `problems`. "" if no row has a form."""
    ignored = set(ignore)
    kinds = Counter(frozenset(row.fields) - ignored for row in rows)
    known = {keys: form for keys in kinds for form, (must, may) in FORMS.items() if set(must) <= keys <= {*must, *may}}
    counts = Counter({form: 0 for form in FORMS})
    for keys, form in known.items():
        counts[form] += kinds[keys]
    form = max(FORMS, key=lambda name: counts[name])
    if not counts[form]:
        form = max(FORMS, key=lambda name: (sum(count * likeness(name, keys) for keys, count in kinds.items())))
    for row in rows:
        keys = frozenset(row.fields) - ignored
        if known.get(keys) != form:
            problems.add(row.path, row.line, misfit(form, keys, f"{counts[form]:,} of {len(rows):,} rows"))
    return form


def likeness(form: str, keys: frozenset[str]) -> float:
    """How many of a form's keys there are, less what is too much."""
    must, may = FORMS[form]
    return len(keys & set(must)) - 0.1 * len(keys - {*must, *may}) - 0.1 * len(set(must) - keys)


def misfit(form: str, keys: frozenset[str], share: str) -> str:
    """What is wrong with the keys of a row."""
    if all(keys & names for names in TAGGED):
        return ("rows of tokens with a label each are not read here: what can be trained on is a text, " + ", ".join(
            "{" + ", ".join(f'"{key}"' for key in must) + "}" for must, _ in FORMS.values()))
    must, may = FORMS[form]
    lacking, extra = sorted(set(must) - keys), sorted(keys - {*must, *may})
    parts = [f"{' and '.join(map(repr, lacking))} missing"] if lacking else []
    for key in extra[:5]:
        near = difflib.get_close_matches(key, lacking, 1)
        parts.append(f"the key {short(key)} is not known" + (f" (did you mean {near[0]!r}?)" if near else ""))
    parts += [f"and {len(extra) - 5} more keys"] if len(extra) > 5 else []
    cure = "" if lacking else f". To pass over it: ignore={extra!r}"
    return f"expected {' and '.join(map(repr, must))}, as {share} have it: {', '.join(parts)}{cure}"


def checked(form: str, rows: Iterable[Row], train_on: str, problems: Problems) -> list[Row]:
    """The rows of this form whose values are what they should be; the faults of the others go to `problems`."""
    good = []
    for row in rows:
        if not set(FORMS[form][0]) <= set(row.fields):
            continue  # noted already
        faults = list(faults_of(form, row.fields, train_on))
        for fault in faults:
            problems.add(row.path, row.line, fault)
        if not faults:
            good.append(row)
    return good


def faults_of(form: str, fields: dict[str, Any], train_on: str) -> Iterator[str]:
    for key in ("text", "prompt", "completion"):
        if key in FORMS[form][0]:
            yield from text_faults(key, fields[key])
    if form == "label" and (isinstance(fields["label"], bool) or not isinstance(fields["label"], (str, int))
                            or fields["label"] == ""):
        yield f"'label' must be a text that is not empty, or a whole number, got {short(fields['label'])}"
    elif form == "label" and isinstance(fields["label"], int) and not 0 <= fields["label"] < 1 << 20:
        yield f"'label' must be the number of a class, from 0, got {short(fields['label'])}"
    elif form == "score" and not is_number(fields["score"]):
        yield f"'score' must be a finite number, got {short(fields['score'])}"
    elif form == "messages":
        yield from message_faults(fields["messages"], train_on)
        if not isinstance(fields.get("tools"), (list, type(None))):
            yield f"'tools' must be a list, got {short(fields['tools'])}"


def text_faults(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{name!r} must be a text, got {short(value)}"
    elif not value:
        yield f"{name!r} is empty"
    else:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            yield f"{name!r} has half a character (a lone surrogate) at {error.start}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST  # NaN is not


def message_faults(messages: Any, train_on: str) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield f"'messages' must be a list with a message in it, got {short(messages)}"
        return
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            yield f"message {number} must be an object with a 'role' and a 'content'"
            return
        if not (message.get("content") is None and message.get("tool_calls")):
            yield from (f"message {number}: {fault}" for fault in text_faults("content", message.get("content")))
    roles = [message["role"] for message in messages]
    if train_on == "completion" and roles[-1] != "assistant":
        yield (f"the last message has the role {short(roles[-1])}, and what is learned is the last one of the assistant. "
               "train_on='all' learns all")
    if train_on == "assistant" and "assistant" not in roles:
        yield "there is no message of the assistant, and only those are learned: train_on='all' learns all"
