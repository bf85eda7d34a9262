"""What is wrong with a backward that somebody wrote: in words, for the walk that met it and for the checks in `testing`.

Nothing here runs while all is well.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy

from .errors import GraphError
from .node import Node
from .typing import TensorLike

__all__ = ["check_gradients", "check_returned", "explain", "misfit", "name_of", "refuse_dtype", "refuse_used"]

Array = Any
Shape = tuple[int, ...]

MOST = 6  # gradients whose orders are all tried: 720 of them


def name_of(op: Node) -> str:
    """The name of an operation: that of the reference, where an override stands in its place."""
    return (op.reference or type(op)).__name__


def refuse_used(op: Node) -> NoReturn:
    """Say that this graph has had its backward."""
    raise GraphError(f"this graph was used by an earlier backward() and is gone (reached {name_of(op)} with output "
                     f"{op.shape}): run the forward pass again, or add the losses first and call backward() once")


def refuse_dtype(op: Node | None, given: Any, parameter: TensorLike) -> NoReturn:
    """Say that a gradient came in another dtype than its parameter has."""
    who = "an operation's backward" if op is None else f"{name_of(op)}.backward"
    raise GraphError(f"{who} gave a gradient of dtype {given} for a parameter of dtype {parameter.dtype}: write its "
                     "constants as Python floats, and make arrays with the dtype of dy")


# -- what backward returned ---------------------------------------------------------------------------------------------


def check_returned(op: Node, sources: Sequence[Any], gradients: Any) -> None:
    """Refuse what is no tuple or list of one gradient for each input.

    An array has a length too: its rows would be taken for the gradients.
    """
    name, n = name_of(op), len(sources)
    form = "(dx,), a tuple with" if n == 1 else f"a tuple of {n},"
    if not isinstance(gradients, (tuple, list)):
        if gradients is None:
            raise GraphError(f"{name}.backward returned None: is a return missing? Return {form} one gradient for each input")
        what = "an array" if hasattr(gradients, "shape") else _kind(gradients)
        raise GraphError(f"{name}.backward: {what} was returned: return {form} one gradient for each input")
    if len(gradients) != n:
        raise GraphError(f"{name}.backward returned {len(gradients)} gradients for {n} input{'' if n == 1 else 's'}: "
                         "return one, or None, for each")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def check_gradients(op: Node, sources: Sequence[Any], gradients: Sequence[Any], array_type: type) -> None:
    """Refuse gradients that do not fit their inputs: all that is wrong, and what may have happened."""
    pairs = [(i, source.shape, dx) for i, (source, dx) in enumerate(zip(sources, gradients)) if source is not None]
    wrong = [(i, wanted, dx) for i, wanted, dx in pairs if not _is_array(dx, array_type) or dx.shape != wanted]
    if not wrong:
        return
    order = _order([wanted for _, wanted, _ in pairs], [dx.shape if _is_array(dx, array_type) else None for _, _, dx in pairs])
    found = []
    for i, wanted, dx in wrong:
        if not _is_array(dx, array_type):
            found.append(f"input {i} has shape {wanted} and wants a gradient of that shape, got {_no_array(dx, array_type)}")
            continue
        hint = misfit(dx.shape, wanted) if order is None else ""
        found.append(f"input {i} has shape {wanted} and wants a gradient of that shape, got shape {dx.shape}"
                     + (f": {hint}" if hint else ""))
    text = f"{name_of(op)}.backward: {'. '.join(text[0].upper() + text[1:] if k else text for k, text in enumerate(found))}"
    if order is not None:
        came = ", ".join(str(pairs[j][0]) for j in order)
        text += f". The gradients are in the order of inputs {came}: are two swapped?"
    elif len(pairs) > 1 and text.endswith(")"):  # no cause was found
        text += ". Are the gradients in input order?"
    raise GraphError(text)


def _is_array(dx: Any, array_type: type) -> bool:
    return isinstance(dx, (array_type, numpy.generic))


def _no_array(dx: Any, array_type: type) -> str:
    if dx is None:
        return "None. None is for an input that wants no gradient, see self.needs"
    if hasattr(dx, "node"):
        return f"{_kind(dx)}: backward works on arrays and returns arrays"
    if hasattr(dx, "shape"):
        came, held = (f"{cls.__module__}.{cls.__name__}" for cls in (type(dx), array_type))
        return f"a {came} where the graph holds {held}"
    return f"{_kind(dx)}: return an array, such as self.xp.full_like(x, ...)"


def _order(wanted: list[Shape], came: list[Any]) -> tuple[int, ...] | None:
    """The inputs whose gradients came in the first, second ... place, if in another order all would fit."""
    n = len(wanted)
    if n > MOST or None in came:
        return None
    orders = (order for order in itertools.permutations(range(n)) if [wanted[j] for j in order] == came)
    return min(orders, key=lambda order: sum(i != j for i, j in enumerate(order)), default=None)


def misfit(got: Shape, wanted: Shape) -> str:
    """What may have happened to an array that came in another shape; empty if nothing is known."""
    if len(got) > 1 and got == wanted[::-1]:
        return "this is the transposed shape: is a .T missing, or one too many?"
    if len(got) == len(wanted) and len(got) <= MOST and sorted(got) == sorted(wanted):
        order = next(p for p in itertools.permutations(range(len(got))) if tuple(got[i] for i in p) == wanted)
        return f"these are its axes in another order: is a .transpose{order} missing?"
    if numpy.prod(got) == numpy.prod(wanted):
        return f"it has as many elements, reshape it: dx.reshape({wanted})"
    if (axes := summed(got, wanted)) is not None:
        added, stretched = axes
        where = ([f"over {_axes(added)}"] if added else []) + (
            [f"over {_axes(stretched)} with keepdims=True"] if stretched else [])
        return (f"was this input broadcast? Sum the gradient {' and '.join(where)}, as "
                "minilora.ops.elementwise.unbroadcast(dx, x.shape) does")
    if summed(wanted, got) is not None:
        return f"is one number meant for several elements? Spread it: self.xp.broadcast_to(dx, {wanted})"
    return ""


def summed(got: Shape, wanted: Shape) -> tuple[Shape, Shape] | None:
    """The axes over which broadcasting made `got` out of `wanted`: those added in front, those stretched from length 1."""
    added = len(got) - len(wanted)
    if added < 0 or any(n not in (1, got[added + i]) for i, n in enumerate(wanted)):
        return None
    return tuple(range(added)), tuple(added + i for i, n in enumerate(wanted) if n != got[added + i])


def _axes(axes: Shape) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"


# -- what went wrong inside ---------------------------------------------------------------------------------------------


def explain(op: Node, dy: Array, error: Exception) -> None:
    """Say where an error arose that was raised inside of a backward: a note on it (`__notes__`, which Python 3.11 prints).

    Raises
    ------
    GraphError
        In its place, if it is about `Op.saved`, which forward did not fill as backward expects.
    """
    if text := _about_saved(op, error):
        raise GraphError(f"{name_of(op)}.backward: {text}") from error
    inputs = [None if source is None else source.shape for source in op.sources or ()]
    note = (f"in {name_of(op)}.backward: dy {described(dy)}, inputs {_listed('-' if x is None else str(x) for x in inputs)}, "
            f"saved {_listed(map(described, op.saved))}")
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # add_note came with 3.11


def described(value: Any) -> str:
    """``float64 (3, 4)``, or the type of what is no array."""
    return f"{value.dtype} {value.shape}" if hasattr(value, "shape") and hasattr(value, "dtype") else type(value).__name__


def _listed(parts: Any) -> str:
    return ", ".join(parts) or "nothing"


def _about_saved(op: Node, error: Exception) -> str:
    """What is wrong with the saved arrays, if the line of `op` that raised this error takes them apart."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or step.tb_frame.f_locals.get("self") is not op:
        return ""
    lines = [linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno + k) for k in range(-2, 6)]
    if any(lines) and "saved" not in "".join(lines):  # without a source, as in a console, the message has to do
        return ""
    saved, reads = len(op.saved), ""
    unpacked = re.match(r"(not enough|too many) values to unpack \(expected (at least )?(\d+)", str(error))
    if isinstance(error, ValueError) and unpacked and (saved < int(unpacked[3])) == (unpacked[1] == "not enough"):
        reads = f"backward unpacks {unpacked[2] or ''}{unpacked[3]}"
    elif isinstance(error, IndexError) and str(error) == "tuple index out of range":
        reads = "backward asks for more"
    if not reads:
        return ""
    if not saved:
        return f"self.saved is empty: did forward call self.save(...)? ({reads})"
    kept = f"forward saved {saved} array{'' if saved == 1 else 's'}"
    return f"{kept}, {reads}: self.save(...) lists what backward reads, in that order"
