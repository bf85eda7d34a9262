"""adapter_config.json and lora.Config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ....errors import ConfigError, FormatError
from ....lora.config import Config
from ....lora.config_checks import KNOWN_ELSEWHERE, is_off
from ..faults import shortened
from ..methods import cure_for

__all__ = ["read_settings"]


def read_settings(path: Path, data: Mapping[str, Any], allow: Iterable[str] = ()) -> tuple[Config, tuple[str, ...]]:
    """The config that a file says, and notes on settings that are off and unknown, or passed over because the caller says so.

    Raises
    ------
    FormatError
        With one line for every setting that is on and unknown, that is a feature minilora lacks, or that is out of its range.
    """
    allow = set(allow)
    known = {field for field in Config.__dataclass_fields__ if field != "extra"} | {"peft_type", "runtime_config"}
    unknown = {name for name in data if name not in known and name not in KNOWN_ELSEWHERE}
    method = data.get("peft_type", "LORA")
    if method != "LORA":
        raise FormatError(f"{path}: peft_type is {shortened(repr(method))}, another method than LoRA, which minilora does not "
                          f"read. {cure_for(method)}")
    passed = {name for name in unknown & allow if not is_off(data[name])}
    try:
        config = Config.from_dict({name: value for name, value in data.items() if name not in passed})
    except ConfigError as error:
        lines = [shortened(line.strip(), 400) for line in str(error).splitlines()[1:]]
        on = [name for name in unknown - passed if not is_off(data[name])]
        cure = [f"to read it without them: allow_settings={sorted(map(shortened, on))}"] if on and len(on) == len(lines) else []
        raise FormatError("\n  ".join([f"{path}: adapter_config.json: {len(lines)} problem{'s' if len(lines) > 1 else ''}",
                                       *lines, *cure])) from None
    notes = []
    off = sorted(name for name in unknown - passed)
    if off:
        notes.append(f"settings that minilora does not know, and that are off: {', '.join(map(shortened, off))}")
    if passed:
        notes.append(f"settings passed over, as asked: {', '.join(map(shortened, sorted(passed)))}")
    return config, tuple(notes)
