"""adapter_config.json and lora.Config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ....errors import ConfigError, FormatError
from ....lora.config import Config
from ....lora.config_checks import KNOWN_ELSEWHERE, is_off
from ..faults import shortened
from ..foreign import AS_PREFIX, RETRAIN, TO_LORA

__all__ = ["read_settings"]

LONGEST_REGEX = 20_000  # characters
WITHOUT_WEIGHTS = ("TUNING", "PROMPT", "IA3", "OFT", "CPT", "CARTRIDGE")  # methods of PEFT that have no update of a weight


def read_settings(path: Path, data: Mapping[str, Any], allow: Iterable[str] = ()) -> tuple[Config, tuple[str, ...]]:
    """The config that a file says, and notes on settings that are off and unknown, or passed over because the caller says so.

    Raises
    ------
    FormatError
        With one line for every setting that is on and unknown, that is a feature minilora lacks, or that is out of its range.
    """
    allow = set(allow)
    _refuse_endless(path, data)
    if data.get("init_lora_weights") == "loftq":
        raise FormatError(f"{path}: adapter_config.json: init_lora_weights: 'loftq' belongs to a quantised base of its own, "
                          "not to this one: merge it with PEFT, and extract it again. Where the base beside it is the one that "
                          "LoftQ made, the adapter is an ordinary one: write true in the place of \"loftq\"")
    known = {field for field in Config.__dataclass_fields__ if field != "extra"} | {"peft_type", "runtime_config"}
    unknown = {name for name in data if name not in known and name not in KNOWN_ELSEWHERE}
    method = data.get("peft_type", "LORA")
    if method != "LORA":
        cure = RETRAIN if any(word in str(method) for word in WITHOUT_WEIGHTS) else TO_LORA
        if method in ("PREFIX_TUNING", "PROMPT_TUNING"):
            raise FormatError(f"{path}: adapter_config.json: peft_type is {method!r}, which is not read {AS_PREFIX}")
        raise FormatError(f"{path}: adapter_config.json: peft_type is {shortened(repr(method))}, which minilora does not read: "
                          f"{cure}")
    passed = {name for name in unknown & allow if not is_off(data[name])}
    try:
        config = Config.from_dict({name: value for name, value in data.items() if name not in passed})
    except ConfigError as error:
        lines = [shortened(line.strip(), 400) for line in str(error).splitlines()[1:]]
        on = [name for name in unknown - passed if not is_off(data[name])]
        more = [f"to read it without them: allow_settings={sorted(map(shortened, on))}"] if on and len(on) == len(lines) else []
        raise FormatError("\n  ".join([f"{path}: adapter_config.json: {len(lines)} problem{'s' if len(lines) > 1 else ''}",
                                       *lines, *more])) from None
    notes = []
    off = sorted(name for name in unknown - passed)
    if off:
        notes.append(f"settings that minilora does not know, and that are off: {', '.join(map(shortened, off))}")
    if passed:
        notes.append(f"settings passed over, as asked: {', '.join(map(shortened, sorted(passed)))}")
    return config, tuple(notes)


def _refuse_endless(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a regular expression that repeats a group without end, such as ``(a+)+``, and one of thousands of characters.

    Trying such a one on a path may take longer than anybody waits, and a file is not to be trusted with that.
    """
    texts = [data.get(name) for name in ("target_modules", "exclude_modules")]
    texts += [key for name in ("rank_pattern", "alpha_pattern") if isinstance(data.get(name), dict) for key in data[name]]
    patterns = data.get("layers_pattern")
    texts += patterns if isinstance(patterns, list) else [patterns]
    for text in texts:
        if isinstance(text, str) and (len(text) > LONGEST_REGEX or _repeats_a_group(text)):
            what = "repeats a group without end, which can take for ever on a path" if len(text) <= LONGEST_REGEX else \
                f"has {len(text):,} characters"
            raise FormatError(f"{path}: adapter_config.json: the regular expression {shortened(repr(text))} {what}: name the "
                              "layers in a list instead")


def _repeats_a_group(regex: str) -> bool:
    """Whether a closing bracket of a group has ``*``, ``+`` or ``{n,}`` behind it."""
    at, in_set = 0, False
    while at < len(regex):
        if regex[at] == "\\":
            at += 1
        elif in_set:
            in_set = regex[at] != "]"
        elif regex[at] == "[":
            in_set = True
            at += 1 if regex[at + 1:at + 2] == "^" else 0
            at += 1 if regex[at + 1:at + 2] == "]" else 0  # the first one in a set is a character
        elif regex[at] == ")" and re.match(r"[*+]|\{\d*,\}", regex[at + 1:at + 12]):
            return True
        at += 1
    return False
