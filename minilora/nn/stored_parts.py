"""A parameter that is held in low precision, in state dicts: several arrays, each under the path and an ending of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import DTypeError
from ..stored import Stored
from ..tensor import Parameter

__all__ = ["StoredPart", "parts", "put", "refuse_training", "torn"]

Array = Any


class StoredPart(NamedTuple):
    """One of the arrays that a stored parameter consists of."""

    parameter: Parameter
    ending: str
    data: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> Any:
        return self.data.dtype


def parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of an ordinary entry of a state dict; of a stored parameter each of its arrays.

    Endings follow the path as they are: ``fc.weight`` and ``fc.weight.absmax``.
    """
    if not (isinstance(value, Parameter) and isinstance(value.data, Stored)):
        yield path, value
        return
    for ending, array in value.data.arrays().items():
        yield f"{path}.{ending}" if ending else path, StoredPart(value, ending, array)


def torn(own: Mapping[str, tuple[Any, str, Any]], given: Mapping[str, Any]) -> list[str]:
    """A line for each stored parameter of which some arrays are given and others are not: together they would mean nothing."""
    names: dict[int, list[str]] = {}
    for path, (_, _, value) in own.items():
        if isinstance(value, StoredPart):
            names.setdefault(id(value.parameter), []).append(path)
    return [f"incomplete {paths[0]}: without {', '.join(lacking)}" for paths in names.values()
            if 0 < len(lacking := [path for path in paths if path not in given]) < len(paths)]


def put(module: Any, name: str, value: Any, new: Any) -> None:
    """Put what was loaded in the place of a value that a module has; see `Module.load_state_dict`."""
    if isinstance(value, StoredPart):  # whoever shares the old arrays keeps them
        stored = value.parameter.data
        value.parameter.data = stored.with_arrays({**stored.arrays(), value.ending: new})
    elif not isinstance(value, Parameter):
        setattr(module, name, new)
    elif value.room is None:  # a new array: the old one may be shared, as lora.adapt shares a base's
        value.data = new.data
    else:
        value.data[...] = new.data  # a view of the optimizer's flat array
        value.version += 1


def refuse_training(named: Iterable[tuple[str, Parameter]]) -> None:
    """Raise `DTypeError` if one of the parameters is held in low precision, and hence read only."""
    held = [(path, p.data.kind) for path, p in named if isinstance(p.data, Stored)]
    if held:
        (path, kind), *more = held
        raise DTypeError(f"{path}{f' and {len(more)} more' if more else ''}: held as {kind}, which is read only, and cannot be "
                         "trained: train adapters beside it, lora.inject(model, config); or decode the model first, "
                         "quant.dequantize(model)")
