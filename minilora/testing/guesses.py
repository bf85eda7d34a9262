"""What kind of mistake would make just the difference that was found.

The simplest mistake that explains every element comes first; then one that explains a part; then only where it is wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy

from . import factors, places
from .evidence import EXPLAINED, Difference, Known

__all__ = ["guess"]

Array = Any  # numpy.ndarray: everything here is on the host

ROWS = 300  # whose order is looked at: each is compared with each


def guess(found: Difference, known: Known = Known()) -> str:
    """One line about why a gradient is wrong, the likeliest cause first."""
    with numpy.errstate(all="ignore"):  # what overflows explains nothing
        for look in LOOKS:
            if found.target.size and (text := look(found, known)):
                return text
    text = f"wrong in {int((found.wrong & found.sure).sum())} of {found.target.size}"
    square = [name for name, x in _values(found, known) if x.ndim == 2 and x.shape[0] == x.shape[1] > 1]
    return text + (f". {square[0]} is square: choose sizes that differ, and a missing .T does not fit" if square else "")


def _values(found: Difference, known: Known) -> list[tuple[str, Array]]:
    """The inputs that are known, this one first."""
    return [(found.name, known.x)][known.x is None:] + [(other.name, other.x) for other in known.others]


# -- in the order in which they are tried ----------------------------------------------------------------------------------


def _numbers(found: Difference, known: Known) -> str:
    """Not a number, or zero, on one of the sides."""
    gradient = "analytic" in known.ratio
    bad = ~numpy.isfinite(found.shown)
    if bad.any():
        where = places.place((~numpy.isfinite(found.mine)), known.x, found.name) if found.along is None else ""
        return f"not finite: NaN or inf in {int(bad.sum())} of {bad.size}" + (f", {where}" if where else "")
    if not numpy.isfinite(found.target).all():
        return "the reference itself is not finite here: choose another point"
    if not found.mine.any():
        return "gradient is zero" if gradient else "all zero"
    if not found.target.any():
        return "not zero, although f does not depend on it" if gradient else "the reference is zero"
    return ""


def _swapped(found: Difference, known: Known) -> str:
    for i, other in enumerate(known.others):
        if other.passed:
            continue
        theirs = other.difference
        one, two = (other.name, found.name) if i < known.before else (found.name, other.name)
        for turned in (False, True):
            if turned and found.mine.ndim < 2:
                continue
            given, taken = (theirs.mine.T, found.mine.T) if turned else (theirs.mine, found.mine)
            if given.shape == found.mine.shape and found.explained(given) and theirs.explained(taken):
                names = f"d{one} and d{two}" if max(len(one), len(two)) < 3 else f"the gradients of {one} and {two}"
                return (f"{names} look swapped{' and transposed' if turned else ''}: each equals "
                        f"{'the transpose of ' if turned else ''}the other's numerical gradient")
    return ""


def _factor(found: Difference, known: Known) -> str:
    factor = _ratio(found.shown, found.target)
    if factor is None:
        return ""
    return factors.about(factor, known.ratio, known.lengths, known.settings)


def _ratio(mine: Array, right: Array) -> float | None:
    """The one factor that makes `mine` right, if there is one; a single element proves no more than a plain factor."""
    size = float(abs(right).max()) if right.size else 0.0
    if not size or not numpy.isfinite(size):
        return None
    mine, right = mine / size, right / size  # sizes near 1, so that squares stay in range
    factor = float(mine @ right / (mine @ mine))
    off = float(abs(mine - right).max())
    if not numpy.isfinite(factor) or not factor or not abs(factor * mine - right).max() <= EXPLAINED * off:
        return None
    return factor if mine.size > 1 or factors.is_plain(factor) else None


def _chain(found: Difference, known: Known) -> str:
    """dy, which a backward multiplies by: forgotten, there twice, or returned as it is."""
    dy = known.dy
    if dy is not None and dy.ndim == found.mine.ndim + 1 and dy.shape[1:] == found.mine.shape and len(dy) > 1:
        for i in (0, len(dy) - 1):
            if abs(found.mine - dy[i]).max() <= 1e-9 * abs(dy[i]).max():
                return f"it is dy[{i}] alone: is the sum over axis 0 left out?"
    if dy is None or dy.shape != found.mine.shape:
        return ""
    if abs(found.mine - dy).max() <= 1e-9 * abs(dy).max():
        return "it is dy itself: is the derivative of the operation left out?"
    if found.explained(found.mine * dy):
        return "times dy it would be right: is dy left out?"
    return "divided by dy it would be right: is dy in it twice?" if found.explained(found.mine / dy) else ""


def _transposed(found: Difference, known: Known) -> str:
    mine = found.mine
    if mine.ndim < 2 or sum(n > 1 for n in mine.shape) < 2:
        return ""
    if k := found.sign(mine.reshape(mine.shape[::-1]).T):
        return "equals the transpose" + (", sign flipped" if k < 0 else "")
    if mine.ndim == 2:
        factor = _ratio(found.seen(mine.reshape(mine.shape[::-1]).T), found.target)
        if factor is not None and found.target.size > 3:
            return f"equals the transpose up to a factor: {factors.about(factor, known.ratio, known.lengths, known.settings)}"
    if 2 < mine.ndim <= 4:
        for order in itertools.permutations(range(mine.ndim)):
            shape = tuple(mine.shape[order.index(axis)] for axis in range(mine.ndim))
            if k := found.sign(mine.reshape(shape).transpose(order)):
                return f"its axes are in another order: transpose{order} makes it right" + (", sign flipped" if k < 0 else "")
    return ""


def _of_another(found: Difference, known: Known) -> str:
    """It is the gradient of another input, or another input got this one's."""
    for other in known.others:
        theirs = other.difference
        right = theirs.mine if other.passed else theirs.whole
        for turned in ("", "the transpose of "):
            if turned and found.mine.ndim < 2:
                continue
            for array, text in ((right, f"it equals {turned}the gradient of {other.name}"),
                                (theirs.mine, f"{turned or 'just '}what was returned for {other.name} would be right here")):
                if array is None or not array.any():
                    continue
                array = array.T if turned else array
                if array.shape != found.mine.shape:
                    continue
                same = abs(found.mine - array).max() <= 1e-6 * abs(array).max()
                if same if array is right or text.startswith("it ") else found.explained(array):
                    return text
    return ""


def _offset(found: Difference, known: Known) -> str:
    ones = found.seen(numpy.ones(found.mine.shape))
    if found.target.size < 2:
        return ""
    constant = float(ones @ (found.shown - found.target) / (ones @ ones))
    if not found.off_by(found.shown - constant * ones - found.target):
        return ""
    return f"differs by a constant {constant:.6g} everywhere: a term too many, or one left out?"


def _offsets(found: Difference, known: Known) -> str:
    """A term that is the same along an axis, such as the mean of dy in the backward of a norm."""
    right = found.whole
    for axis in range(found.mine.ndim - 1, -1, -1) if right is not None and found.mine.ndim > 1 else ():
        rest = found.mine - right
        if found.mine.shape[axis] < 2 or not found.wrong.all() or not found.off_by(rest - rest.mean(axis=axis, keepdims=True)):
            continue
        each = ("column", "row")[axis] if found.mine.ndim == 2 else f"line along axis {axis}"
        if rest.size > found.mine.shape[axis]:
            return f"differs by a constant in each {each}: a sum or a mean over axis {axis} left out, or one too many?"
    return ""


def _digits(found: Difference, known: Known) -> str:
    """Nearly right."""
    share = found.off / float(abs(found.target).max())
    if not 0.0 < share < 3e-6:
        return ""
    return f"right to {-math.log10(share):.0f} digits: is something in it float32, or a small eps left out?"


def _summed(found: Difference, known: Known) -> str:
    """A sum or a mean over an axis, spread out again where none should be, or the other way round."""
    mine, right = found.mine, found.whole
    for axis in range(mine.ndim) if mine.ndim > 1 else ():
        if mine.shape[axis] < 2:
            continue
        n = mine.shape[axis]
        for what, part in (("sum", 1.0), ("mean", 1.0 / n)):
            if right is not None:
                total = part * right.sum(axis=axis, keepdims=True)
                if abs(mine - total).max() <= 1e-6 * abs(total).max():
                    return f"it is the {what} over axis {axis} of what is right, spread over that axis: a {what} too many?"
            if found.explained(part * mine.sum(axis=axis, keepdims=True)):
                return f"its {what} over axis {axis}, spread over that axis, would be right"
    return ""


def _ordered(found: Difference, known: Known) -> str:
    mine, right = found.mine, found.whole
    for axis in range(mine.ndim):
        n = mine.shape[axis]
        if n < 2 or n == mine.size < 3:
            continue
        noun = "elements" if mine.ndim == 1 else ("rows", "columns")[axis] if mine.ndim == 2 else f"slices along axis {axis}"
        if found.explained(numpy.flip(mine, axis)):
            return f"its {noun} are in reverse order"
        for by in (1, -1):
            if found.explained(numpy.roll(mine, by, axis)):
                return f"its {noun} are shifted by one: {noun.split(' ')[0][:-1]} 0 belongs to {by % n}"
        if right is None or n > ROWS:
            continue
        a, b = (numpy.moveaxis(side, axis, 0).reshape(n, -1) for side in (mine, right))
        nearest = [int(abs(a - row).max(axis=1).argmin()) for row in b]
        if len(set(nearest)) == n and found.explained(numpy.take(mine, nearest, axis)):
            return f"its {noun} are in another order: those of {places.numbers(numpy.array(nearest))} belong here"
    return ""


def _product(found: Difference, known: Known) -> str:
    """The values of an input are missing as a factor, or there once too often."""
    for name, x in _values(found, known):
        if x.shape != found.mine.shape or x.size < 2 or not x.any() or _constant(x):
            continue
        for candidate, text in ((found.mine * x, f"times {name}"), (found.mine / x, f"divided by {name}")):
            if found.explained(candidate):
                return f"{text}, element by element, it would be right"
            k = _ratio(found.seen(candidate), found.target) if found.target.size > 2 else None
            if k is not None and factors.is_plain(k):
                return f"{text}, element by element, and times {k:.4g} it would be right"
    return ""


def _constant(x: Array) -> bool:
    return bool(abs(x - x.reshape(-1)[0]).max() <= 1e-12 * abs(x).max())


def _places(found: Difference, known: Known) -> str:
    wrong = found.lies_wrong
    if wrong is None or wrong.ndim == 0:
        return ""
    active = (found.mine != 0.0) | (found.right.reshape(wrong.shape) != 0.0)  # where both are 0 nothing was learnt
    text = places.sentence(wrong, known.x, found.name)
    if not active.all() and known.x is not None and "just where" not in text:
        for words, mask in ((f"where {found.name} < 0", known.x < 0), (f"where {found.name} > 0", known.x > 0)):
            if (wrong == (mask & active)).all() and not (wrong == active).all():
                text = f"wrong in {int(wrong.sum())} of {wrong.size}, just {words}"
    if not text:
        return _halves(found, known) if wrong[active].all() else ""
    return text if text.startswith("only one element") else text + _there(found, wrong, known)


def _halves(found: Difference, known: Known) -> str:
    """All is wrong, in one way where the leaf is negative and in another where it is positive."""
    x = known.x
    if x is None or min(int((x < 0).sum()), int((x > 0).sum())) < 2:
        return ""
    negative, positive = (_there(found, mask, known) for mask in (x < 0, x > 0))
    if not negative or not positive or negative == positive:
        return ""
    return f"where {found.name} < 0{negative}. Where {found.name} > 0{positive}"


def _there(found: Difference, wrong: Array, known: Known) -> str:
    """What is wrong in that part."""
    mine, right = found.mine[wrong], found.right.reshape(wrong.shape)[wrong]
    if not mine.any():
        return ": it is 0 there"
    if not right.any():
        dy = known.dy
        same = dy is not None and dy.shape == wrong.shape and abs(mine - dy[wrong]).max() <= 1e-9 * abs(mine).max()
        return f": there it should be 0{', and is dy' if same else ''}"
    factor = _ratio(mine, right)
    if factor is not None:
        return f": {factors.about(factor, known.ratio, known.lengths, known.settings, '')}"
    off = mine - right
    if off.size > 1 and abs(off - off[0]).max() <= EXPLAINED * abs(off).max():
        return f": there it differs by a constant {off[0]:.6g}"
    return ""


def _factors(found: Difference, known: Known) -> str:
    """A factor of its own for each row, or for each column."""
    mine, right = found.mine, found.whole
    if right is None:
        return ""
    a, b = mine / abs(right).max(), right / abs(right).max()
    for axis in range(mine.ndim) if mine.ndim > 1 else ():
        n, rest = mine.shape[axis], tuple(other for other in range(mine.ndim) if other != axis)
        if n < 2 or mine.size // n < 2:
            continue
        k = (a * b).sum(axis=rest, keepdims=True) / (a * a).sum(axis=rest, keepdims=True)
        others = k[abs(k - 1.0) > 1e-6]  # of the rows that are wrong: one factor for all of them is a simpler guess
        differ = others.size > 1 and float(numpy.ptp(others)) > 1e-6 * float(abs(others).max())
        if differ and numpy.isfinite(k).all() and found.explained(k * mine):
            noun = ("row", "column")[axis] if mine.ndim == 2 else f"slice along axis {axis}"
            return f"each {noun} has a factor of its own: is one of shape {k.shape} left out, or too many?"
    return ""


LOOKS: tuple[Callable[[Difference, Known], str], ...] = (
    _numbers, _swapped, _factor, _chain, _transposed, _of_another, _offset, _offsets, _summed,
    _ordered, _product, _digits, _factors, _places)
