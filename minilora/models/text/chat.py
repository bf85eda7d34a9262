"""Chat templates: a small program in the files of a model, which writes messages as the text that the model was trained on.

The program comes from a file, and files are untrusted. It runs in jinja2's sandbox, which keeps it from Python's inside and
from changing what it is given; with the filters, methods and functions that templates use and no others; and on an allowance:
every turn of a loop, every call, and every character and list item that it makes are counted, and when they are more than any
template needs it is stopped. So it can neither hang nor fill the memory.

There is no clock in it: the same messages give the same text on every day, unless the caller says what time it is.
"""

from __future__ import annotations

import datetime
import contextvars
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FileError, FormatError
from ..checkpoints.fields import MOST

__all__ = ["render", "templates_in"]

LONGEST = 1 << 18  # characters of a template: the longest known have some 20,000


def templates_in(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a model by name: those in chat_template.jinja and beside it, else those in tokenizer_config.json."""
    found: dict[str, str] = {}
    given = settings.get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        for one in given:
            if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) for key in ("name", "template")):
                raise FormatError(f"{folder / 'tokenizer_config.json'}: chat_template is a list, and not of named templates, "
                                  "{\"name\": ..., \"template\": ...}")
            found[one["name"]] = one["template"]
    elif given is not None:
        raise FormatError(f"{folder / 'tokenizer_config.json'}: chat_template is no text, but {type(given).__name__}")
    files = {"default": folder / "chat_template.jinja"}
    more = folder / "additional_chat_templates"
    files.update({file.stem: file for file in sorted(more.glob("*.jinja"))} if more.is_dir() else {})
    for name, file in files.items():
        if file.is_file():
            found[name] = _text(file)
    return found


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > min(MOST, 4 * LONGEST):
            raise FormatError(f"{file}: {file.stat().st_size:,} bytes are too many for a chat template")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: no text in UTF-8: {error}") from error


def render(templates: Mapping[str, str], name: str | None, variables: dict[str, Any]) -> str:
    """The text that a template makes of the variables, of which `messages` is one; see `Tokenizer.chat`."""
    if not templates:
        raise FormatError("the tokenizer's files have no chat template (chat_template in tokenizer_config.json, or a file "
                          "chat_template.jinja): the model is none for chats, or write the text by hand")
    if name is None:
        name = "tool_use" if variables.get("tools") and "tool_use" in templates else "default"
    if name not in templates:
        raise ConfigError(f"there is no chat template {name!r}, but {', '.join(map(repr, templates))}: give template=...")
    now = variables.pop("now", None)
    if now is not None and not isinstance(now, datetime.date):
        raise ConfigError(f"now must be a datetime.datetime or datetime.date, got {now!r}")
    if len(templates[name]) > LONGEST:
        raise FormatError(f"chat template {name!r}: {len(templates[name]):,} characters are too many for a chat template")
    return _run(name, templates[name], variables, now)


def _run(name: str, source: str, variables: dict[str, Any], now: datetime.date | None) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise FileError("chat templates need jinja2, which is not installed: pip install jinja2. Or write the text by "
                        "hand") from error
    from .templates import Allowance, TooMuch, environment, spending

    def refuse(message: object = "") -> None:
        raise ConfigError(f"the chat template refuses these messages: {message}")

    functions: dict[str, Any] = {"raise_exception": refuse}
    if now is not None:
        functions["strftime_now"] = lambda form: now.strftime(str(form))
    allowance = Allowance(variables)

    def rendered() -> str:
        spending(allowance)
        text: str = _compiled(environment, source).render({**functions, **variables})
        return text

    try:
        return contextvars.copy_context().run(rendered)
    except ConfigError:
        raise
    except TooMuch as error:
        raise FormatError(f"chat template {name!r}: does more work than a template needs ({error}), and was stopped: it is "
                          "broken, or hostile") from None
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise FormatError(f"chat template {name!r}: calls itself without an end") from None
    except Exception as error:
        cure = "Does it need messages of other roles or keys, or another variable?"
        if "strftime_now" in str(error):
            cure = "It asks for the date: give now=datetime.datetime.now()"
        raise FormatError(f"chat template {name!r}: {type(error).__name__}: {error}. {cure}") from error


@functools.lru_cache(maxsize=16)
def _compiled(environment: Any, source: str) -> Any:
    return environment().from_string(source)
