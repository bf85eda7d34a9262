"""What may stand in each field of a Config: one check a field, which says what is wrong with a value, or ""."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from ..nn.linear import check_size
from ..ops.dropout import check_dropout
from .gradient import scaling

__all__ = ["BIASES", "CHECKS", "INITS", "KNOWN_ELSEWHERE", "ONLY_READ", "extra_problems", "fits", "is_init", "is_off",
           "key_regex", "layer_regex", "nearest"]

BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian", "pissa", "olora", "orthogonal", "loftq", "eva", "mica")
ONLY_READ = ("eva", "mica")  # the start of adapters that were trained elsewhere
# PEFT's starts that move the base by what no file keeps.
_CONVERT = ("{!r} moved the base by a start that cannot be rebuilt from it: save the adapter with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), which writes an ordinary one of rank 2 r")
# How training began. No part of what an adapter computes: kept as it is.
_STARTS = ("corda_config", "eva_config", "lora_ga_config")
# PEFT's settings that have no field in Config, and what PEFT writes where they are off.
KNOWN_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config",
                     "layer_replication", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
                     "use_bdlora", "velora_config")),
    "ensure_weight_tying": False, "megatron_core": "megatron.core", "qalora_group_size": 16,
    "use_qalora": False,
}


def is_off(value: Any) -> bool:
    """Whether a setting that nobody knows surely does nothing: None, False, or of length 0. Not 0, which may mean anything."""
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to n of the known names that look like `name`, the nearest first."""
    import difflib  # for error messages only

    names = list(dict.fromkeys(known))
    return difflib.get_close_matches(name, names, n, 0.5) or [k for k in names if name.lower() in k.lower()][:n]


def is_init(value: Any) -> bool:
    """Whether `init_lora_weights` may have this value: 1 is not True."""
    return _is_one_of(value, INITS)


def key_regex(key: str) -> str:
    """What a path must match for a key of rank_pattern or alpha_pattern to hold: PEFT's expression."""
    return rf"(.*\.)?({key})$"


@functools.lru_cache(maxsize=1 << 14)
def fits(key: str) -> Callable[[str], Any]:
    """The match of a path with a key: compiled once, since a file may have a key for each of a thousand layers."""
    return re.compile(key_regex(key)).match


def layer_regex(pattern: str) -> str:
    """What finds the number of a layer in its path, as the group ``idx``: the first one, or the first behind a pattern."""
    name = rf"(?:{pattern})\." if pattern else ""
    return rf"(?:^|.*?\.){name}(?P<idx>\d+)\."


def _regex(text: str, becomes: Callable[[str], str] | None = None) -> str:
    """What is wrong with a regular expression, by itself and as a part of the one that `becomes` makes of it."""
    try:
        re.compile(text)
    except re.error as error:
        return f"{text!r} is not a regular expression: {error}"
    flags = re.match(r"\(\?([aiLmsux]+)\)", text)
    if becomes and flags:  # here, because Python 3.10 only warns of it
        scoped = f"(?{flags[1]}:{text[flags.end():]})"
        return f"{text!r} becomes part of a longer expression, where flags must have a scope: write {scoped!r}"
    try:
        re.compile(becomes(text) if becomes else text)
    except re.error as error:
        return f"{text!r} becomes part of a longer expression, which it breaks: {error.msg}"
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
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, numbers.Integral) or v < 0]
    if wrong:
        return f"expected layer numbers >= 0, got {wrong}"
    return "the list is empty: leave it out, or name a layer" if value is not None and not values else ""


def _layers_pattern(value: Any) -> str:
    patterns = [value] if isinstance(value, str) and value else value
    return _names(patterns) or next((text for v in patterns or () if (text := _regex(v, layer_regex))), "")


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
                text = _regex(key, key_regex) or check(number)
            except ConfigError as error:
                text = f"{key!r}: {error}"
            lines += [text] if text else []
        return "; ".join(lines)
    return problems


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    return any(value is known or (isinstance(known, str) and isinstance(value, str) and value == known) for known in allowed)


def _one_of(*allowed: Any) -> Callable[[Any], str]:
    def problems(value: Any) -> str:
        return "" if _is_one_of(value, allowed) else f"expected one of {', '.join(map(repr, allowed))}, got {value!r}"
    return problems


def _init(value: Any) -> str:
    if isinstance(value, str) and (value in ("corda", "lora_ga") or value.startswith("pissa_niter_")):
        return _CONVERT.format(value)
    return _one_of(*INITS)(value)


def _loftq(value: Any) -> str:
    if not isinstance(value, Mapping):
        return "" if value is None else f"expected a dict with loftq_bits and loftq_iter, got {value!r}"
    unknown = [name for name in value if name not in ("loftq_bits", "loftq_iter")]
    if unknown:
        return f"the settings are loftq_bits and loftq_iter, got {', '.join(map(repr, unknown))}"
    if not _is_plain(value.get("loftq_bits", 4)) or value.get("loftq_bits", 4) not in (4, 8):
        return f"loftq_bits must be 4 (nf4) or 8 (int8), got {value['loftq_bits']!r}"
    turns = value.get("loftq_iter", 1)
    return "" if _is_plain(turns) and turns >= 1 else f"loftq_iter must be an int >= 1, got {turns!r}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, str) else f"expected a text or None, got {value!r}"


def _flat(value: Any) -> str:
    """What is wrong with a dict that is only kept: it must be flat, and JSON must be able to hold it."""
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return f"expected a dict, got {value!r}"
    wrong = [key for key, v in value.items() if not isinstance(key, str) or not (
        v is None or isinstance(v, (bool, int, str)) or (isinstance(v, float) and math.isfinite(v)))]
    return f"expected texts and finite numbers, got something else at {wrong}" if wrong else ""


def _tokens(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return _token_list(value)
    if not value:
        return "the dict is empty: leave it out, or name an embedding"
    lines = [f"expected names as keys, got {name!r}" for name in value if not isinstance(name, str) or not name]
    return "; ".join(lines + [f"{name!r}: {text}" for name, v in value.items() if (text := _token_list(v))])


def _token_list(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or not value:
        return f"expected a list of token numbers, got {value!r}"
    wrong = [v for v in value if isinstance(v, bool) or not isinstance(v, numbers.Integral) or not 0 <= int(v) < 2 ** 63]
    if wrong:
        return f"expected token numbers >= 0, got {wrong[:5]}"
    twice = [v for v, count in Counter(value).items() if count > 1]
    return f"a token has one row: {twice[:5]} come twice" if twice else ""


def extra_problems(value: Mapping[Any, Any]) -> list[str]:
    """A line for every setting that Config has no field for and that is neither off nor about how training began."""
    lines = []
    for name, v in value.items():
        if not isinstance(name, str) or name in CHECKS or name == "peft_type":
            lines.append(f"{name!r} has a place of its own")
        elif name in _STARTS:
            lines += [f"{name}: {text}" for text in [_flat(v)] if text]
        elif not is_off(v) and name in KNOWN_ELSEWHERE:
            lines.append(f"{name}: this feature of PEFT is not part of minilora, got {v!r}")
        elif not is_off(v):
            lines.append(f"{name}: there is no such setting, and it is on, got {v!r}")
    return lines


def _extra(value: Any) -> str:
    if value is not None and not isinstance(value, Mapping):
        return f"expected a dict of settings, got {value!r}"
    return "; ".join(extra_problems(value or {}))


_flag = _one_of(True, False)
CHECKS: dict[str, Callable[[Any], str]] = {
    "r": _rank, "lora_alpha": _alpha, "lora_dropout": _dropout,
    "target_modules": _names_or_regex, "exclude_modules": _names_or_regex,
    "layers_to_transform": _layers, "layers_pattern": _layers_pattern,
    "rank_pattern": _pattern(_rank), "alpha_pattern": _pattern(_alpha),
    "bias": _one_of(*BIASES), "modules_to_save": _names,
    "use_rslora": _flag, "use_dora": _flag, "lora_bias": _flag,
    "init_lora_weights": _init, "fan_in_fan_out": _flag, "trainable_token_indices": _tokens,
    "task_type": _text, "base_model_name_or_path": _text, "revision": _text, "peft_version": _text,
    "auto_mapping": _flat, "loftq_config": _loftq, "inference_mode": _flag, "extra": _extra,
}
