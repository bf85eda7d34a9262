"""`draw`: a picture of what was computed, of the gradients that flow back through it, and of what is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy

from .. import backend
from ..calls import answered
from ..errors import ConfigError, DTypeError, GraphError
from ..recording import recording
from ..settings import whole
from ..tensor import Parameter, Tensor
from .backwards import Arrived, walked
from .graph import Graph, shortened
from .reading import Known, Step, Trace, graph_of, kept_by, steps_behind
from .svg import svg
from .text import text

__all__ = ["Drawing", "draw"]

Array = Any


class Drawing:
    """A picture of a graph. Printed it is text; a notebook shows it as SVG. It holds no array of the graph.

    Attributes
    ----------
    graph : Graph
        What is shown: `nodes` and `edges`.

    Examples
    --------
    >>> import minilora
    >>> drawing = minilora.draw(lambda x: x * x, x=[3.0])
    >>> isinstance(drawing, Drawing), drawing.svg()[:4]
    (True, '<svg')
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def svg(self) -> str:
        """The picture as one self-contained SVG text; ``Path("graph.svg").write_text(drawing.svg(), "utf-8")`` stores it."""
        return svg(self.graph)

    def _repr_svg_(self) -> str:
        return self.svg()

    def __str__(self) -> str:
        return text(self.graph)

    __repr__ = __str__  # what a console shows


@answered
def draw(what: Tensor | Callable[..., Any], names: Any = None, *, gradient: Array | None = None, backward: bool = True,
         limit: int = 300, **inputs: Any) -> Drawing:
    """Draw a graph: its operations, their outputs' shapes, the bytes kept, and the gradients that flow back.

    Nothing is changed: a graph that was drawn can still be walked, and no `grad` is touched. A backward pass is computed on a
    copy of the graph, which takes the time of one, and once more the memory of its gradients.

    Parameters
    ----------
    what : Tensor or callable
        A loss, or any tensor with a graph, before its `backward`. Or a function, which is called with `inputs` as keyword
        arguments and gives a tensor, or a dict of tensors by their names, the last of which is the end: all that it computes is
        drawn then, constants too, with the numbers of small arrays beside their gradients. A module is such a function.
    names : dict or Module, optional
        Names of tensors, ``{"A": A, "z": z}``, or the module whose parameters have names.
    gradient : array, optional
        The gradient to start from, in the shape of the end. Without it, ones: the gradient of the sum.
    backward : bool
        False: no gradients, and nothing is computed.
    limit : int
        Of more nodes than these the middle ones are left out; how many is said.
    **inputs
        For the function. Lists and floating-point arrays become parameters, so that their gradients are shown. Tensors go in as
        they are, and everything else too (whole numbers in an array, such as token ids).

    Returns
    -------
    Drawing

    Raises
    ------
    GraphError
        If there is no graph, or it was used by a `backward`.
    ConfigError, DTypeError
        If `what`, `names` or what the function gives back is something else.

    Examples
    --------
    >>> import minilora
    >>> from minilora import ops
    >>> def layer(x, A, B):
    ...     z = ops.linear(x, A)
    ...     return {"z": z, "y": ops.linear(z, B)}
    >>> print(minilora.draw(layer, x=minilora.tensor([[1.0, 2.0]]), A=[[3.0, 4.0]], B=[[5.0]]))
      ○ x: constant                                      (1, 2)
        value 1 2
      ○ A: parameter                                     (1, 2)
        value 3 4    grad 5 10
    ● z = Linear(x, A)                                   (1, 1)        keeps 8 B
    │   value 11    grad 5
    │ ○ B: parameter                                     (1, 1)
    │   value 5    grad 11
    ● y = Linear(z, B)                                   (1, 1)        keeps 4 B
        ↑  z 5
        value 55    grad 1
    <BLANKLINE>
    grad: the gradient of y.sum()
    ↑: the norm of the gradient that goes back to each input
    keeps: bytes held until backward
    """
    limit = whole("limit", limit, 4)
    if isinstance(what, Tensor):
        found = _graph_behind(what, names, inputs)
    elif callable(what):
        found = _computed(what, names, inputs)
    else:
        raise DTypeError(f"draw: expected a tensor with a graph, or a function, got {type(what).__name__}")
    end, arrived, kept, caption = found.end, Arrived({}, {}), {}, ""
    if end.node is not None:
        kept = kept_by(end)
        if backward:
            arrived = walked(end, _start(end, gradient))
            caption = "({} * gradient).sum()" if gradient is not None else "{}.sum()" if end.shape else "{}"
    known = Known(found.names, found.chosen, found.values, arrived, kept)
    return Drawing(shortened(graph_of(found.steps, found.root, known, caption), limit))


class _Found(NamedTuple):
    end: Tensor
    root: Any  # what stands for it: an Op, a Parameter or a Constant
    steps: list[Step]
    names: dict[Any, str]
    chosen: set[Any]
    values: dict[Any, Array]


def _graph_behind(end: Tensor, names: Any, inputs: Mapping[str, Any]) -> _Found:
    if inputs:
        raise ConfigError(f"draw: {', '.join(inputs)} are inputs of a function, and a tensor has none: draw(f, ...) calls f, "
                          "and names={...} names the tensors of a graph")
    if end.node is None:
        raise GraphError("draw: this tensor has no graph: no trainable parameter took part in it, or it was made under "
                         "no_grad(). To see what there is, constants too, let draw compute it: minilora.draw(f, x=x)")
    of_modules, chosen = _named(names)
    named = [(t, name) for t, name in of_modules + chosen if t.node is not None]
    return _Found(end, end.node, steps_behind(end), {t.node: name for t, name in named}, {t.node for t, _ in chosen},
                  {t.node: t.data for t in (*(t for t, _ in named), end)})


def _computed(function: Callable[..., Any], names: Any, inputs: Mapping[str, Any]) -> _Found:
    given = {name: _input(value) for name, value in inputs.items()}
    of_modules, chosen = _named(names)
    if hasattr(function, "named_parameters"):
        of_modules = _named(function)[0] + of_modules
    trace = Trace()
    with recording(), trace.looking():
        result = function(**given)
    outputs = dict(result) if isinstance(result, Mapping) else {"": result}
    wrong = [f"{name or 'what it gave'} is {type(t).__name__}" for name, t in outputs.items() if not isinstance(t, Tensor)]
    if wrong or not outputs:
        raise DTypeError("draw: the function must give a tensor, or a dict of tensors by their names, the last of which is the "
                         f"end; {', '.join(wrong) or 'the dict is empty'}")
    end = list(outputs.values())[-1]
    mine = [(x, name) for name, x in given.items() if hasattr(x, "shape")]
    mine += [(t, str(name)) for name, t in outputs.items() if name] + chosen
    root = trace.made(end)
    return _Found(end, root, trace.steps_to(root), {trace.made(t): name for t, name in of_modules + mine},
                  {trace.made(t) for t, _ in mine}, {root: end.data})


Labels = list[tuple[Any, str]]


def _named(names: Any) -> tuple[Labels, Labels]:
    """(tensor, name) of what modules give names to, and of what the user does."""
    if hasattr(names, "named_parameters"):
        return [(p, name) for name, p in names.named_parameters()], []
    if not isinstance(names, Mapping):
        if names is None:
            return [], []
        raise DTypeError(f"draw: names must be a dict, such as {{'A': A}}, or a module, got {type(names).__name__}")
    of_modules: Labels = []
    chosen: Labels = []
    for name, value in names.items():
        if isinstance(value, Tensor):
            chosen.append((value, str(name)))
        elif hasattr(value, "named_parameters"):
            of_modules += [(p, f"{name}.{path}") for path, p in value.named_parameters()]
        else:
            raise DTypeError(f"draw: names[{name!r}] is of type {type(value).__name__}: expected a tensor or a module")
    return of_modules, chosen


def _input(value: Any) -> Any:
    """What a function gets: parameters for numbers that a gradient can move by fractions, and all else as it is."""
    if isinstance(value, list):
        try:
            return Parameter(value) if numpy.asarray(value).dtype.kind in "iuf" else value
        except ValueError:  # rows of several lengths
            return value
    array = not isinstance(value, (Tensor, numpy.generic)) and getattr(getattr(value, "dtype", None), "kind", "") == "f"
    return Parameter(value) if array and hasattr(value, "shape") else value


def _start(end: Tensor, gradient: Any) -> Array:
    if gradient is None:
        return end.device.xp.ones_like(end.data)
    return backend.asarray(gradient, end.dtype) if isinstance(gradient, (list, float)) else gradient
