"""Calls whose arguments do not fit: Python's bare TypeError becomes an error that says what to type.

A public function is wrapped, which costs a call 0.3 us and no more than that as long as all is well. What is wrong is found out
afterwards, from the signature.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar

from .errors import ArgumentError

__all__ = ["answered", "answered_class", "answered_names", "answered_value", "called", "misfit", "refused"]

F = TypeVar("F", bound=Callable[..., Any])
BY_PLACE_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
SHORT = 40  # letters of a value that is repeated in a line to type
ROOMS = ("formats", "lora", "models", "nn", "ops", "optim", "quant", "testing", "train", "tuners")
OWN = __package__ or "minilora"


def answered(function: F) -> F:
    """The same function, whose calls with arguments that do not fit raise `ArgumentError`."""
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            told = misfit(function, args, kwargs, error)
            try:
                if told is error:
                    raise
                raise told from None
            finally:
                del told  # a frame that holds its error is a circle, and keeps all arguments

    call.answered = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def answered_class(cls: type, methods: Iterable[str] | None = None) -> None:
    """The same for making an instance of a class of this package, and for some of its methods, all public ones by default.

    A module has none by default: models call those too often.
    """
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != OWN or issubclass(base, (tuple, BaseException)):
            continue
        named = [name for name in vars(base) if not name.startswith("_")] if methods is None else methods
        named = () if methods is None and hasattr(base, "forward") else named
        for name in ("__init__", *named):
            function = vars(base).get(name)
            if isinstance(function, FunctionType) and plain(function):
                setattr(base, name, answered(function))


def answered_names(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """The same for what these names of a package stand for, here and where it is defined."""
    for name in names:
        namespace[name] = answered_value(namespace[name])


def answered_value(value: Any) -> Any:
    """A function that answers, in the file that defines it too: it is pickled by its name there. A class is changed itself."""
    if isinstance(value, type):
        answered_class(value)
    elif isinstance(value, FunctionType) and value.__module__.split(".")[0] == OWN and plain(value):
        home, known = sys.modules[value.__module__], value
        value = answered(value)
        if getattr(home, value.__name__, None) is known:
            setattr(home, value.__name__, value)
    return value


def plain(function: FunctionType) -> bool:
    """Whether it does not answer yet."""
    return not hasattr(function, "answered")


def misfit(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], error: TypeError,
           where: str = "") -> TypeError:
    """The error of a call: the one that it raised, or if it is about these arguments one with all that is wrong with them."""
    if isinstance(error, ArgumentError):
        return error
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        pass
    else:
        return error  # raised inside of a call that fits
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name == "self" and args and "." in getattr(function, "__qualname__", ""):
        parameters, args, where = parameters[1:], args[1:], where or method(function, args[0])
    return refused(where or place(function), parameters, args, kwargs)


def refused(where: str, parameters: Sequence[inspect.Parameter], args: Sequence[Any],
            kwargs: Mapping[str, Any]) -> ArgumentError:
    """The error for a call with arguments that do not fit these parameters."""
    lines = problems(where, parameters, args, kwargs)
    took = f"It is called as {where}{inspect.Signature([shown(p) for p in parameters])}"
    if len(lines) == 1:
        return ArgumentError(f"{where}: {lines[0]}. {took}")
    return ArgumentError("\n  ".join([f"{where}: {len(lines)} arguments do not fit. {took}", *lines]))


def shown(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter without its type, and its default only if that is short."""
    default = parameter.default
    if default is not inspect.Parameter.empty:
        default = Written(repr(default) if short(repr(default)) else "...")
    return parameter.replace(annotation=inspect.Parameter.empty, default=default)


def short(text: str) -> bool:
    return len(text) <= SHORT and "\n" not in text and "<" not in text


class Written(str):
    """A text that is its own repr."""

    def __repr__(self) -> str:
        return str(self)


def problems(where: str, parameters: Sequence[inspect.Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A line for everything that is wrong with the arguments of a call."""
    from .elsewhere import BY_PLACE, MISSING

    kinds = {p.kind for p in parameters}
    by_place = [p.name for p in parameters if p.kind in BY_PLACE_KINDS]
    names = [p.name for p in parameters if p.kind in NAMED_KINDS]
    given, lines = set(by_place[:len(args)]), []
    if len(args) > len(by_place) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        most = f"at most {len(by_place)}" if by_place else "none"
        came = "an argument" if len(args) == 1 else f"{len(args)} arguments"
        lines.append(f"{came} without a name, and it takes {most}" + after(BY_PLACE.get(where) or BY_PLACE.get(tail(where))))
    free = [name for name in names if name not in given and name not in kwargs]
    for name, value in kwargs.items():
        if name in names:
            lines += [f"{name} is given twice, in its place and by its name"] if name in given else []
            continue
        ours = renamed(name, free if inspect.Parameter.VAR_KEYWORD in kinds else names)
        given |= {ours} if ours else set()
        if inspect.Parameter.VAR_KEYWORD not in kinds or ours:
            lines.append(f"there is no {name}" + after(cure(where, name, value, ours, names)))
    empty = inspect.Parameter.empty
    missing = [p.name for p in parameters if p.default is empty and p.kind in (*BY_PLACE_KINDS, inspect.Parameter.KEYWORD_ONLY)
               and p.name not in given and p.name not in kwargs]
    if missing:
        lines.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" + after(MISSING.get(where)))
    return lines


def after(text: str | None) -> str:
    return f": {text}" if text else ""


def renamed(name: str, names: Sequence[str]) -> str:
    """What an argument of another library is called here, if it is one of these names."""
    from .elsewhere import RENAMED

    return next((ours for ours in RENAMED.get(name, ()) if ours in names), "")


def cure(where: str, name: str, value: Any, ours: str, names: Sequence[str]) -> str:
    """What to write in the place of an argument that is not there."""
    from .elsewhere import LEFT_OUT

    text = repr(value)
    text = text if short(text) else "..."
    if ours:
        return f"write {ours}={text}"
    for known in (f"{where}.{name}", f"{tail(where)}.{name}", f"{where.split('.')[0]}.{name}", name):
        if known in LEFT_OUT:
            return LEFT_OUT[known].replace("{name}", name).replace("{value}", text)
    from difflib import get_close_matches

    near = get_close_matches(name, names, 1)
    return f"is {near[0]} meant?" if near else ""


def place(function: Callable[..., Any]) -> str:
    """What a function is called by who uses it: ``ops.softmax``, ``minilora.tensor``."""
    name = getattr(function, "__name__", type(function).__name__)
    return f"{room(function.__module__)}.{name}"


def method(function: Callable[..., Any], owner: Any) -> str:
    """The same of a method, and of a class whose instance is being made."""
    cls, name = type(owner), getattr(function, "__name__", "")
    return called(cls) if name == "__init__" else f"{cls.__name__}.{name}"


def called(cls: type) -> str:
    """What a class is called by who uses it: ``nn.Linear``; its name alone, if it is no class of this package."""
    return f"{room(cls.__module__)}.{cls.__name__}" if cls.__module__.split(".")[0] == OWN else cls.__name__


def tail(where: str) -> str:
    """``.step``, by which the tables know a method of any class."""
    return f".{where.rsplit('.', 1)[-1]}"


def room(module: str) -> str:
    parts = module.split(".")
    if parts[0] != OWN:
        return module
    if parts[1:3] == ["train", "data"]:
        return "train.data"
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else OWN
