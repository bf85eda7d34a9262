"""What may stand in each field of a Config: one check a field, which says what is wrong with a value, or ""."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from ..nn.linear import check_size
from ..ops.dropout import check_dropout
from .gradient import scaling

__all__ = ["CHECKS", "nearest"]

BIASES = ("none", "all", "lora_only")
INITS = (True, "gaussian", "pissa", "olora", "orthogonal")


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to n of the known names that look like `name`, the nearest first."""
    import difflib  # for error messages only

    names = list(dict.fromkeys(known))
    return difflib.get_close_matches(name, names, n, 0.5) or [k for k in names if name.lower() in k.lower()][:n]


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        return f"{text!r} is not a regular expression: {error}"
    return ""


def _rank(value: Any) -> str:
    check_size("r", value)
    return ""


def _alpha(value: Any) -> str:
    scaling(value, 1)
    return ""


def _dropout(value: Any) -> str:
    check_dropout(value)
    return ""


def _names(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple, set, frozenset)):
        return f"expected a list of names, got {value!r}"
    if not value:
        return "the list is empty: leave it out, or name something"
    wrong = [v for v in value if not isinstance(v, str) or not v]
    return f"expected names, got {wrong} in the list" if wrong else ""


def _names_or_regex(value: Any) -> str:
    if isinstance(value, str):
        return _regex(value) if value else "the string is empty"
    return _names(value)


def _layers(value: Any) -> str:
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [] if value is None else [value]
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int) or v < 0]
    if wrong:
        return f"expected layer numbers >= 0, got {wrong}"
    return "the list is empty: leave it out, or name a layer" if value is not None and not values else ""


def _layers_pattern(value: Any) -> str:
    text = _names_or_regex(value)
    return text or next((t for v in value or () if not isinstance(value, str) and (t := _regex(v))), "")


def _pattern(check: Callable[[Any], str]) -> Callable[[Any], str]:
    def problems(value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, Mapping):
            return f"expected a dict from names to values, got {value!r}"
        lines = []
        for key, number in value.items():
            if not isinstance(key, str) or not key:
                lines.append(f"expected names as keys, got {key!r}")
                continue
            try:
                text = _regex(key) or check(number)
            except ConfigError as error:
                text = f"{key!r}: {error}"
            lines += [text] if text else []
        return "; ".join(lines)
    return problems


def _one_of(*allowed: Any) -> Callable[[Any], str]:
    def problems(value: Any) -> str:
        sound = any(value is known or (isinstance(known, str) and value == known) for known in allowed)
        return "" if sound else f"expected one of {', '.join(map(repr, allowed))}, got {value!r}"
    return problems


_flag = _one_of(True, False)
CHECKS: dict[str, Callable[[Any], str]] = {
    "r": _rank, "lora_alpha": _alpha, "lora_dropout": _dropout,
    "target_modules": _names_or_regex, "exclude_modules": _names_or_regex,
    "layers_to_transform": _layers, "layers_pattern": _layers_pattern,
    "rank_pattern": _pattern(_rank), "alpha_pattern": _pattern(_alpha),
    "bias": _one_of(*BIASES), "modules_to_save": _names,
    "use_rslora": _flag, "use_dora": _flag, "lora_bias": _flag,
    "init_lora_weights": _one_of(*INITS), "fan_in_fan_out": _flag,
}
