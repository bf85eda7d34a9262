"""Layers without parameters, and Sequential.

>>> import minilora
>>> from minilora import nn
>>> x = minilora.tensor([[-1.0, 0.0, 2.0]])
>>> [round(layer(x)[0, 2].item(), 3) for layer in (nn.Sigmoid(), nn.SiLU(), nn.Softmax(), nn.LogSoftmax())]
[0.881, 1.762, 0.844, -0.17]
>>> nn.MSELoss()(x, x - 2.0).item()
4.0
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import numpy

from .. import ops, replay
from ..errors import DTypeError
from ..ops.activation import check_gelu
from ..ops.cross_entropy import check_cross_entropy
from ..ops.dropout import check_dropout
from ..parts import seed_here, steps_of
from ..tensor import Tensor
from .contents import Entry
from .module import Module

__all__ = [
    "GELU", "CrossEntropyLoss", "Dropout", "LogSoftmax", "MSELoss", "ReLU", "Sequential", "SiLU", "Sigmoid", "Softmax", "Tanh",
]


class Sequential(Module):
    """Modules applied one after the other.

    Parameters
    ----------
    *modules : Module
        Or one list or tuple of them.

    Raises
    ------
    DTypeError
        If something else is given.

    Notes
    -----
    The modules are attributes called 0, 1, and so on; a subclass may assign others beside them.

    Examples
    --------
    >>> import numpy, minilora
    >>> rng = numpy.random.default_rng(0)
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(2, 3, rng=rng), minilora.nn.ReLU())
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
    )
    """

    def __init__(self, *modules: Module | list[Module] | tuple[Module, ...]) -> None:
        given = modules[0] if len(modules) == 1 and isinstance(modules[0], (list, tuple)) else modules
        for i, module in enumerate(given):
            setattr(self, str(i), _module("Sequential", i, module))

    def _steps(self) -> list[Module]:
        return [module for name, module in vars(self).items() if name.isdigit()]

    def forward(self, x: Any) -> Any:
        for module in self._steps():
            x = module(x)
        return x

    def __getitem__(self, index: int) -> Module:
        return self._steps()[index]

    def __setitem__(self, index: int, module: Module) -> None:
        place = range(len(self))[operator.index(index)]
        setattr(self, str(place), _module("Sequential", place, module))

    def __len__(self) -> int:
        return len(self._steps())


def _module(owner: str, i: int, module: Any) -> Module:
    if not isinstance(module, Module):
        a_class = f": {module.__name__} is the class, {module.__name__}() makes a layer" if isinstance(module, type) else ""
        raise DTypeError(f"{owner}: expected a module at {i}, got {type(module).__name__}{a_class}")
    return module


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Any) -> Tensor:
        return ops.relu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Any) -> Tensor:
        return ops.tanh(x)


class Sigmoid(Module):
    """1 / (1 + e^-x)."""

    def forward(self, x: Any) -> Tensor:
        return ops.sigmoid(x)


class GELU(Module):
    """Gaussian error linear unit, in its tanh form unless told otherwise: **PyTorch's default is the other one**.

    Parameters
    ----------
    approximate : {"tanh", "none"}
        ``"tanh"``, the default here, as in GPT-2; ``"none"``, exact, the default of ``torch.nn.GELU``, as in BERT.

    Raises
    ------
    ConfigError
        If `approximate` is neither.
    """

    def __init__(self, approximate: str = "tanh") -> None:
        check_gelu(approximate)
        self.approximate = approximate

    def forward(self, x: Any) -> Tensor:
        return ops.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """x / (1 + e^-x)."""

    def forward(self, x: Any) -> Tensor:
        return ops.silu(x)


class Softmax(Module):
    """Softmax along one axis."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis

    def forward(self, x: Any) -> Tensor:
        return ops.softmax(x, self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class LogSoftmax(Softmax):
    """Logarithm of the softmax along one axis."""

    def forward(self, x: Any) -> Tensor:
        return ops.log_softmax(x, self.axis)


class Dropout(Module):
    """In training, set each element to 0 with probability p and divide the others by 1 - p; in evaluation do nothing.

    Parameters
    ----------
    p : float
        In [0, 1).
    rng : numpy.random.Generator or int, optional
        Draws the seed of the layer's masks. The same int in two layers gives them the same masks: pass one Generator to all.

    Attributes
    ----------
    seed, step : int
        The mask of a forward pass is a function of both; `step` counts the passes in training. Both are state: a state dict
        holds them, so that a resumed run draws the masks that the uninterrupted one would have drawn. So does a copy
        (copy.deepcopy, pickle): it draws the same masks as the original would. With p = 0 there is no state.
    """

    state_names = ("seed", "step")
    fresh = frozenset({"step"})  # what a recorded step reads anew at every replay

    def __init__(self, p: float = 0.5, *, rng: numpy.random.Generator | int | None = None) -> None:
        check_dropout(p)
        rng = numpy.random.default_rng(rng)
        self.p = float(p)
        self.seed = int(rng.integers(2 ** 63))
        self.step = 0

    def own_state(self) -> Iterator[Entry]:
        return (entry for entry in super().own_state() if self.p or entry[0] not in Dropout.state_names)

    def forward(self, x: Any) -> Any:
        if not self.training or self.p == 0.0:
            return x
        draw = steps_of(self)
        (step,) = replay.changing(lambda: (draw(),), "uint64", lambda: functools.partial(setattr, self, "step", self.step))
        return ops.dropout(x, self.p, seed_here(self.seed), step)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class MSELoss(Module):
    """Mean squared error over all elements; the shapes must be equal."""

    def forward(self, prediction: Any, target: Any) -> Tensor:
        return ops.mse(prediction, target)


class CrossEntropyLoss(Module):
    """Mean of -log softmax(logits)[label] over the rows that count. The classes lie along the last axis.

    Parameters
    ----------
    ignore_index : int
        Rows with this label count nothing.
    label_smoothing : float
        In [0, 1]: this share of the target is spread evenly over all classes.

    Raises
    ------
    ConfigError
        If label_smoothing is outside [0, 1].

    Examples
    --------
    >>> import minilora
    >>> round(minilora.nn.CrossEntropyLoss()(minilora.tensor([[0.0, 0.0]]), [1]).item(), 6)  # log 2
    0.693147
    """

    def __init__(self, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        check_cross_entropy(ignore_index, label_smoothing)
        self.ignore_index = int(ignore_index)
        self.label_smoothing = float(label_smoothing)

    def forward(self, logits: Any, labels: Any) -> Tensor:
        return ops.cross_entropy(logits, labels, self.ignore_index, self.label_smoothing)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
