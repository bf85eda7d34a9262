"""A run whose numbers are not finite any more: which array was the first, and what to do."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy

from .. import backend
from ..errors import DivergedError
from ..flags import option
from ..lora.adapters.finite import nonfinite
from ..nn.module import Module
from ..recording import watcher
from ..tensor import Parameter, Tensor
from .distributed.agreement import first_told
from .standing import Standing

__all__ = ["diverged", "first_in_pass", "listed", "not_finite_input"]

Array = Any
NONE = "none by itself: the gradients are finite, and the sum of their squares is not"
SHOWN = 20  # rows that a message names


class Found(Exception):
    """Something that is not finite: ends the pass in which it was found. Its text says what it is."""


def diverged(run: Standing, loss: float, norm: float, rate: float) -> DivergedError:
    """Give the run's model back as it was before the update that failed, and say what was the first fault in it.

    The batches are computed once more, from the same weights, counters and masks, and each operation is looked at.

    Parameters
    ----------
    run : Standing
        Whose update ended in numbers that are not finite.
    loss, norm : float
        The update's.
    rate : float
        The learning rate it was made with.
    """
    after = not_finite_weights(run.model) if math.isfinite(loss) and math.isfinite(norm) else ""
    run.last_good.give_back()
    found, advice = (f"{after}, after a step of the optimizer from finite gradients", slower(run)) if after else cause(run)
    what = "a weight" if after else f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
    if run.scaling is not None and math.isfinite(loss) and not after:
        what += f" and {run.scaling.exhausted}"
    rows = [row for number in run.window for row in run.rows(number)[run.comm.rank::run.comm.size]]
    text = [f"diverged in step {run.step + 1}: {what}" + (" is not finite" if after else ""),
            f"The first array that is not finite: {found or NONE}",
            f"Rows {listed(rows)} of the data, learning rate {rate:.3g}. " + history(run), advice]
    words = ". ".join(text)
    told = first_told(run.comm, words if found else "") or words  # it may lie in one process's rows alone
    error = DivergedError(told)
    error.advice = advice if told.endswith(advice) else ""
    return error


def history(run: Standing) -> str:
    """What was good before, and what there is of it."""
    last = f"The last finite loss was {run.last.loss:.4g} in step {run.step}" if run.last else "No loss was finite before"
    kept = f"; the model is as it was after step {run.step}" if run.step else "; the model is as it was before"
    saved = sorted((run.folder / "checkpoints").glob("step-*")) if run.folder else []
    return last + kept + (f", and the last checkpoint stays: {saved[-1]}" if saved else "")


def slower(run: Standing) -> str:
    """What may help where the numbers grew by themselves."""
    rate = run.settings.learning_rate / 10
    clip = "" if run.settings.max_grad_norm else f", and clip gradients: {option('max_grad_norm=1.0', '--max-grad-norm 1')}"
    slow = option(f"learning_rate={rate:.3g}", f"--learning-rate {rate:.3g}")
    return f"Try a smaller learning rate: {slow}{clip}"


def cause(run: Standing) -> tuple[str, str]:
    """The first array that is not finite in this process's share of the next update, "" if none is, and what may help."""
    weight = not_finite_weights(run.model)
    advice = slower(run)
    if weight:
        return weight, "The model had it before the run began: load it again, and look into its file with minilora inspect"
    run.optimizer.zero_grad()
    for number in run.window:
        rows, batch = run.rows(number)[run.comm.rank::run.comm.size], run.batch(number)
        found = not_finite_input(batch.inputs, rows)
        if found:
            return found, "Mend that row, or leave it out"
        if batch.targets and (found := first_in_pass(run.model, lambda: run.backward(batch))):
            what = ("dtype='float32'", "--dtype float32") if run.scaling is None else ("precision='full'", "--precision full")
            room = option(*what)
            return found, advice + (f". float16 ends at 65504: {room} has room"
                                    if "float16" in found or run.scaling is not None else "")
    return "", advice


def first_in_pass(model: Module, compute: Callable[[], Array], gradients: bool = True) -> str:
    """What is the first array not to be finite in a pass through a model; "" if all are.

    Parameters
    ----------
    model : Module
    compute : callable
        Does the pass, and gives the loss.
    gradients : bool
        Whether the pass leaves gradients, which are looked at too.
    """
    seen = Seen()
    try:
        with numpy.errstate(all="ignore"), watched(model, seen):
            loss = compute()
    except Found as found:
        return str(found)
    if seen.handed_on and count(loss):
        return seen.handed_on[0]
    named = [(seen.last_use.get(id(p), 0), name, p) for name, p in model.named_parameters() if p.gathered is not None]
    for _, name, p in sorted(named, key=lambda each: -each[0]) if gradients else ():  # backward meets the last operation first
        if bad := count(p.gathered):
            return f"the gradient of {name} {tuple(p.shape)}, {bad}; its forward pass is finite"
    return ""


class Seen:
    """What a watched pass came by.

    Attributes
    ----------
    last_use : dict of int to int
        For the identity of each parameter, the number of the last operation that read it.
    handed_on : list of str
        Outputs that are not finite, of inputs that were not: masks of -inf are such, and do no harm.
    """

    def __init__(self) -> None:
        self.last_use: dict[int, int] = {}
        self.handed_on: list[str] = []
        self.number = itertools.count()


@contextmanager
def watched(model: Module, seen: Seen) -> Iterator[None]:
    """Within this context, an operation that makes something not finite of finite inputs raises `Found`, which says where."""
    where = threading.local()

    def within(path: str, forward: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            outer, where.path = getattr(where, "path", ""), path
            try:
                return forward(*args, **kwargs)
            finally:
                where.path = outer
        return called

    def look(op: Any, inputs: tuple[Any, ...], y: Array) -> None:
        number = next(seen.number)
        seen.last_use.update({id(x): number for x in inputs if isinstance(x, Parameter)})
        if bad := count(y):
            text = (f"the output of {(type(op).reference or type(op)).__name__} in {getattr(where, 'path', '') or 'the loss'}, "
                    f"{y.dtype} {tuple(y.shape)}, {bad}; ")
            if all(map(finite, inputs)):
                raise Found(text + largest(inputs))
            seen.handed_on.append(text + "of inputs that are not finite either")

    places = {id(module): (path, module) for path, module in reversed([*model.named_modules()])}
    own = {key: vars(module).get("forward") for key, (_, module) in places.items()}
    token = watcher.set(look)
    try:
        for path, module in places.values():
            vars(module)["forward"] = within(path or "the model", module.forward)
        yield
    finally:
        watcher.reset(token)
        for key, (_, module) in places.items():
            vars(module).pop("forward")
            if own[key] is not None:
                vars(module)["forward"] = own[key]


def finite(x: Any) -> bool:
    """Whether an input of an operation holds finite numbers only."""
    array = x.data if isinstance(x, Tensor) else x
    return not count(array) if hasattr(array, "dtype") else array is None or math.isfinite(array)


def count(array: Array) -> str:
    """How many numbers of an array are NaN or infinite, in words; "" if none is. A sync point."""
    if array.dtype.kind not in "fc":
        return ""
    xp = backend.device_of(array).xp
    nan, infinite = int(xp.isnan(array).sum()), int(xp.isinf(array).sum())
    words = [f"{number:,} of {array.size:,} {what}" for number, what in ((nan, "NaN"), (infinite, "infinite")) if number]
    return " and ".join(words)


def largest(inputs: Sequence[Any]) -> str:
    """How large the numbers are that an operation was given."""
    arrays = [getattr(x, "data", x) if isinstance(x, Tensor) else x for x in inputs]
    sizes = [float(abs(a).max()) for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f" and a.size]
    return f"its inputs are finite, the largest number in them is {max(sizes):.3g}" if sizes else "its inputs are finite"


def not_finite_weights(model: Module) -> str:
    """The first weight or other state of a model that is not finite; "" if all are."""
    for name, value in (*model.named_parameters(), *model.named_state()):
        array = value.data if isinstance(value, Tensor) else value
        if hasattr(array, "dtype") and not isinstance(array, numpy.generic) and nonfinite(name, {"": array}):
            kind = "weight" if isinstance(value, Parameter) else "state"
            return f"the {kind} {name} {tuple(array.shape)}, {count(array)}"
    return ""


def not_finite_input(inputs: Mapping[str, Any], rows: Sequence[int]) -> str:
    """The first number in a batch that is not finite; "" if all are."""
    for name, value in inputs.items():
        array = value.data if isinstance(value, Tensor) else value
        if not hasattr(array, "dtype") or not count(array):
            continue
        host = backend.to_host(array)
        place = tuple(int(i) for i in numpy.argwhere(~numpy.isfinite(host))[0])
        row = f"row {rows[place[0]]} of the data, " if place and len(rows) == len(host) else ""
        return f"the data: {row}{name}{list(place[1:]) if row else list(place)} is {host[place]}"
    return ""


def listed(rows: Sequence[int]) -> str:
    """Numbers of rows, the first few of them."""
    shown = ", ".join(map(str, rows[:SHOWN]))
    return shown if len(rows) <= SHOWN else f"{shown} and {len(rows) - SHOWN} more"
