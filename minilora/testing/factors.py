"""One factor between what a gradient is and what it should be: what may it stand for?"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["about", "is_plain"]


def is_plain(factor: float) -> bool:
    """Whether a factor, or its inverse, is a whole number: on a single element any other factor proves nothing."""
    return bool(factor) and any(abs(f - round(f)) < 1e-6 * abs(f) for f in (factor, 1.0 / factor))


def about(factor: float, ratio: str, lengths: Sequence[tuple[int, str]] = (), settings: Sequence[tuple[float, str]] = (),
          everywhere: str = " everywhere") -> str:
    """What a factor may stand for.

    Parameters
    ----------
    factor : float
        Right / mine.
    ratio : str
        The name of right / mine.
    lengths : sequence of (int, str)
        Lengths of axes, and their names: a mean may have been taken for a sum.
    settings : sequence of (float, str)
        Numbers that the operations were given, and their names: one may have been left out.
    everywhere : str
        Where it was found.
    """
    if abs(factor + 1.0) < 1e-6:
        return "sign flipped"
    digits = ".3f" if 0.01 < abs(factor) < 1e4 and abs(factor - 1.0) > 0.01 else ".12g"
    text = f"{ratio} = {factor:{digits}}{everywhere}"
    causes = _settings(factor, settings) + _lengths(factor, lengths)
    if abs(factor) > 1.5 and is_plain(factor):
        text += f": a missing factor {round(factor)}?"
    elif abs(factor) < 0.7 and is_plain(factor):
        text += f": a factor {round(1.0 / factor)} too many?"
    elif not causes:
        return f"{text}: scaled by a constant that is missing, such as s or 1/n?"
    else:
        text += ": scaled by a constant."
    return " ".join([text, *causes[:2]])


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)


def _settings(factor: float, settings: Sequence[tuple[float, str]]) -> list[str]:
    found = []
    for value, name in settings:
        if not math.isfinite(value) or value in (0.0, 1.0, -1.0):
            continue
        if _near(factor, value):
            found.append(f"{name} is {value:.6g}: is it left out?")
        elif _near(factor, 1.0 / value):
            found.append(f"{name} is {value:.6g}: is it there once too often?")
        elif 0.0 < value < 1.0 and _near(factor, 1.0 / (1.0 - value)):
            found.append(f"{name} is {value:.6g}: is 1 / (1 - {value:.6g}) left out?")
        elif 0.0 < value < 1.0 and _near(factor, 1.0 - value):
            found.append(f"{name} is {value:.6g}: is 1 / (1 - {value:.6g}) there once too often?")
    return found


def _lengths(factor: float, lengths: Sequence[tuple[int, str]]) -> list[str]:
    """A sum over n elements is n times their mean; the square root of n scales scores and starts."""
    size = abs(factor)
    for n, name in lengths:
        if n < 3:  # a factor 2 is the 2 of a square, far more often
            continue
        if _near(size, n):
            return [f"{n} is also {name}: a mean where the sum is wanted?"]
        if _near(size, 1.0 / n):
            return [f"{n} is also {name}: a sum where the mean is wanted?"]
    for n, name in lengths:
        if n >= 2 and not is_plain(size) and (_near(size * size, n) or _near(size * size, 1.0 / n)):
            return [f"Its square is {n if size > 1.0 else f'1 / {n}'}, and {n} is {name}: is its root left out, or too many?"]
    return []
