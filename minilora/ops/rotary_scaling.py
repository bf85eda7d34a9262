"""Frequencies of rotary positions for texts longer than those of the first training: how each published kind changes them.

Let f_i = theta^(-2 i / hd) be the frequencies of `rotary_frequencies`, s the factor, L the length of the first training (where
it is not given: max_position_embeddings), N the length of the text at hand.

    linear    f_i / s: all positions pressed together.                             Chen et al. 2023, arXiv 2306.15595
    dynamic   the f_i of theta (s N / L - s + 1)^(hd / (hd - 2)), where N > L:
              the longer the text, the slower the turns.                           Peng et al. 2023, arXiv 2309.00071, B.2
    yarn      (1 - g_i) f_i / s + g_i f_i: fast turns stay, slow ones are pressed together, a ramp g between them;
              and cos and sin are multiplied by a factor a = 0.1 ln(s) + 1.        the same, sections 3.2 and 3.4
    llama3    the same form with another ramp, over the number of turns within L.  Grattafiori et al. 2024, arXiv 2407.21783

The ramps: let i(n) = hd ln(L / (2 pi n)) / (2 ln theta), the place whose frequency makes n turns within L. yarn's g falls
from 1 at i(beta_fast) to 0 at i(beta_slow), both rounded outwards unless `truncate` is false. llama3's g_i is
(L f_i / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor), cut at 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from ..settings import number, whole
from .rotary import rotary_frequencies

__all__ = ["check_rotary_scaling", "scaled_rotary_frequencies"]

Frequencies = tuple[tuple[float, ...], float]

FACTOR = {"factor": (1.0, 1e6, "[]")}
LENGTH = {"original_max_position_embeddings": None}
RAMP = {"beta_fast": (0.0, math.inf, "()"), "beta_slow": (0.0, math.inf, "()")}
MSCALE = {"mscale": (0.0, math.inf, "[)"), "mscale_all_dim": (0.0, math.inf, "[)")}
# kind: (fields that it needs, fields that it may have)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "linear": (FACTOR, {}),
    "dynamic": (FACTOR, {}),
    "yarn": ({}, {**FACTOR, **LENGTH, **RAMP, **MSCALE, "attention_factor": (0.0, math.inf, "()"), "truncate": bool}),
    "llama3": ({**FACTOR, "low_freq_factor": (0.0, math.inf, "()"), "high_freq_factor": (0.0, math.inf, "()")}, LENGTH),
}


def check_rotary_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Check a `rope_scaling`: it comes back with Python's own numbers and without fields that are None; None if plain.

    Parameters
    ----------
    scaling : mapping or None
        As in config.json: ``{"rope_type": "llama3", "factor": 8.0, ...}``; older files say ``type``.

    Raises
    ------
    ConfigError
        With one line for every field that is missing, unknown or out of range.

    Examples
    --------
    >>> check_rotary_scaling({"type": "linear", "factor": 4})
    {'rope_type': 'linear', 'factor': 4.0}
    """
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise ConfigError("rotary scaling: expected a mapping such as {'rope_type': 'linear', 'factor': 4.0}, got "
                          f"{scaling!r}")
    given = {name: value for name, value in scaling.items() if value is not None}
    named = [given.pop(name) for name in ("rope_type", "type") if name in given]
    kind = named[0] if named else "default"
    if any(name != kind for name in named):
        raise ConfigError(f"rotary scaling: rope_type {named[0]!r} and type {named[1]!r} are two names of one field, and "
                          "disagree")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"rotary scaling: the kind {kind!r} is not offered, only {', '.join(KINDS)}: with other angles the "
                          "model would give other numbers")
    needed, possible = KINDS[kind]
    problems = [f"{name} is missing" for name in needed if name not in given]
    problems += [f"{name!r} is unknown: {kind} has {', '.join([*needed, *possible]) or 'no fields'}"
                 for name in given if name not in needed and name not in possible]
    checked: dict[str, Any] = {"rope_type": kind}
    for name, limits in {**needed, **possible}.items():
        if name in given:
            try:
                checked[name] = check_field(name, given[name], limits)
            except ConfigError as error:
                problems.append(str(error))
    if not problems and kind == "llama3" and checked["high_freq_factor"] <= checked["low_freq_factor"]:
        problems.append(f"high_freq_factor must be above low_freq_factor, got {checked['high_freq_factor']} and "
                        f"{checked['low_freq_factor']}")
    if problems:
        raise ConfigError("\n  ".join([f"rotary scaling of kind {kind}: {len(problems)} problem{'s' * (len(problems) > 1)}",
                                       *problems]))
    return None if kind == "default" else checked


def check_field(name: str, value: Any, limits: Any) -> Any:
    """A field's value as a Python number; `ConfigError` if it is none, or out of its limits."""
    if limits is None:
        return whole(name, value)
    if limits is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
        return value
    low, high, ends = limits
    return number(name, value, low, high, ends=ends)


def scaled_rotary_frequencies(head_dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None,
                              max_positions: int | None = None, length: int = 1) -> Frequencies:
    """Frequencies for long contexts, and the factor of cos and sin; see the top of this file.

    Parameters
    ----------
    head_dim : int
    theta : float
    scaling : mapping, optional
        The kind and its numbers, see `check_rotary_scaling`; by default the frequencies are those of `rotary_frequencies`.
    max_positions : int, optional
        max_position_embeddings of a config.json. dynamic needs it; yarn and llama3 do where they do not say
        original_max_position_embeddings.
    length : int
        Of the text at hand: its last position + 1. It counts for dynamic alone.

    Returns
    -------
    tuple of float, float

    Raises
    ------
    ConfigError
        If a number is missing, unknown or out of range.

    Examples
    --------
    >>> scaled_rotary_frequencies(4, scaling={"rope_type": "linear", "factor": 4.0})
    ((0.25, 0.0025), 1.0)
    """
    plain = rotary_frequencies(head_dim, theta)
    scaling = check_rotary_scaling(scaling)
    if scaling is None:
        return plain, 1.0
    trained = scaling.get("original_max_position_embeddings", max_positions)
    if trained is None and scaling["rope_type"] != "linear":
        raise ConfigError(f"rotary scaling of kind {scaling['rope_type']} depends on the length of the first training: give "
                          "max_positions, the max_position_embeddings of the config")
    return MAKERS[scaling["rope_type"]](plain, float(theta), scaling, trained, max_positions, length)


def linear(plain: tuple[float, ...], theta: float, scaling: Mapping[str, Any], *lengths: Any) -> Frequencies:
    return tuple(f / scaling["factor"] for f in plain), 1.0


def dynamic(plain: tuple[float, ...], theta: float, scaling: Mapping[str, Any], trained: int, most: Any,
            length: int) -> Frequencies:
    hd, s = 2 * len(plain), scaling["factor"]
    if hd <= 2:
        raise ConfigError("rotary scaling of kind dynamic: hd / (hd - 2) needs a head_dim of 4 or more, got 2")
    stretch = s * max(length, trained) / trained - (s - 1.0)
    return rotary_frequencies(hd, theta * stretch ** (hd / (hd - 2.0))), 1.0


def yarn(plain: tuple[float, ...], theta: float, scaling: Mapping[str, Any], trained: int, most: int | None,
         length: int) -> Frequencies:
    hd = 2 * len(plain)
    if theta <= 1.0:
        raise ConfigError(f"rotary scaling of kind yarn needs a theta above 1, got {theta}: its ramp counts in powers of theta")
    s = scaling.get("factor", None if most is None else most / trained)
    if s is None:
        raise ConfigError("rotary scaling of kind yarn: factor is missing, and there is no max_positions to take it from")
    low, high = (hd * math.log(trained / (2.0 * math.pi * scaling.get(name, turns))) / (2.0 * math.log(theta))
                 for name, turns in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, hd - 1)
    high += 0.001 * (low == high)  # a ramp of no length is a step

    def kept(i: int) -> float:
        return 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)

    def loudness(weight: float) -> float:
        return 0.1 * weight * math.log(s) + 1.0 if s > 1.0 else 1.0

    a = scaling.get("attention_factor")
    if a is None:
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        a = loudness(scaling["mscale"]) / loudness(scaling["mscale_all_dim"]) if both else loudness(1.0)
    return tuple((1.0 - kept(i)) * f / s + kept(i) * f for i, f in enumerate(plain)), a


def llama3(plain: tuple[float, ...], theta: float, scaling: Mapping[str, Any], trained: int, *lengths: Any) -> Frequencies:
    s, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    ramp = [min(max((trained * f / (2.0 * math.pi) - low) / (high - low), 0.0), 1.0) for f in plain]
    return tuple((1.0 - g) * f / s + g * f for g, f in zip(ramp, plain)), 1.0


MAKERS: dict[str, Callable[..., Frequencies]] = {"linear": linear, "dynamic": dynamic, "yarn": yarn, "llama3": llama3}
