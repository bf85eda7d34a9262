"""A few steps of a training, written down: who was read, got a gradient, was stepped, and moved."""

from __future__ import annotations

import linecache
import traceback
from typing import Any

import numpy

from ... import backend
from ...errors import DivergedError, MiniloraError
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import layers_of
from ...lora.merging.arithmetic import Update
from ...nn.module import Module
from ...nn.state import as_host, state_names
from ...stored import dense
from ...tensor import Parameter, Tensor
from ..run import LossFunction, Run
from ..settings import Settings
from .few_rows import run_of
from .passes import Seen, watched
from .picked import Picked

__all__ = ["Course", "norm_of"]

Array = Any


class Course:
    """Some steps from the start; to be made within a rehearsal.

    Attributes
    ----------
    parameters : list of (str, Parameter)
    seen : Seen
        What the first pass read.
    gradients : dict of str to (float or None)
        The largest norm of the gradient of each trained parameter in any pass; None: none arrived.
    starts : dict of str to numpy.ndarray
        What is trained, as it was at the start.
    sizes : dict of str to float
        The norm of each of them at the start.
    moves : dict of str to list of float
        How far each of them went in each step.
    rates : dict of int to float
        For the identity of each parameter that the optimizer holds, its learning rate.
    frozen : list of str
        Frozen parameters that have moved.
    state : list of (str, str)
        Arrays beside the parameters that have moved: the path of the module, and the name.
    layers_now : dict of str to AdaptedLayer
    layers : dict of str to tuple
        Those that are active, with their update before and after: what `stored_update` gives.
    steps : int
        That were made.
    error : str
        What ended it; "" if nothing did.
    """

    def __init__(self, model: Module) -> None:
        self.model = model
        self.parameters: list[tuple[str, Parameter]] = list(model.named_parameters())
        self.seen = Seen()
        self.gradients: dict[str, float | None] = {}
        self.starts = {path: as_host(p) for path, p in self.trained}
        self.sizes = {path: norm_of(array) for path, array in self.starts.items()}
        self.moves: dict[str, list[float]] = {path: [] for path in self.starts}
        self.rates: dict[int, float] = {}
        self.frozen: list[str] = []
        self.state: list[tuple[str, str]] = []
        self.layers: dict[str, tuple[AdaptedLayer, Update, Update]] = {}
        self.layers_now = layers_of(model)
        self.steps = 0
        self.error = ""

    @property
    def trained(self) -> list[tuple[str, Parameter]]:
        return [(path, p) for path, p in self.parameters if p.trainable]

    def make(self, picked: Picked, settings: Settings, loss: LossFunction, optimizer: Any, steps: int) -> Course:
        """A pass that is looked at, and so many steps; what goes wrong is written down too."""
        still = [(path, p, kept(p)) for path, p in self.parameters if not p.trainable]
        state = self.arrays()
        try:
            run = run_of(self.model, picked, settings, loss, optimizer, steps)
            self.rates = {id(p): float(g.settings["lr"]) for g in run.optimizer.groups for p in g.parameters}
            before = self.updates()
            self.model.train()
            with watched() as self.seen, numpy.errstate(all="ignore"):
                run.backward(picked.batches[0])
            self.note(picked.batches[0].targets * (1.0 if run.scaling is None else run.scaling.value))
            for _ in range(steps):
                self.step(run)
            after = self.updates()
            self.layers = {path: (*before[path], after[path][1]) for path in before if path in after}
        except DivergedError as error:
            self.error = f"The steps diverge: {error.advice or error}."
        except MiniloraError as error:
            self.error = str(error)
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            self.error = f"Something writes into a frozen weight, which is lent read only here: {place_of(error)}"
        self.frozen = [path for path, p, before_ in still if not is_still(p, before_)]
        self.state = [key for key, array in self.arrays().items() if key in state and not equal(array, state[key])]
        return self

    def step(self, run: Run) -> None:
        before = {path: as_host(p) for path, p in self.trained}
        run.update()
        self.steps += 1
        self.note()
        for path, p in self.trained:
            self.moves[path].append(norm_of(as_host(p).astype("float64") - before[path]))

    def note(self, times: float = 1.0) -> None:
        """Write down which gradients have arrived, of a loss that is so many times the mean."""
        for path, p in self.trained:
            norm = None if p.gathered is None else norm_of(backend.to_host(p.gathered)) / times
            old = self.gradients.get(path)
            self.gradients[path] = norm if old is None else max(old, norm or 0.0)

    def arrays(self) -> dict[tuple[str, str], Array]:
        """Copies of the arrays of floating-point numbers that modules keep beside their parameters."""
        found = {}
        for path, module in self.model.named_modules():
            for name in state_names(module):
                value: Any = getattr(module, name, None)
                value = value.data if isinstance(value, Tensor) else value
                if getattr(value, "shape", ()) and value.dtype.kind == "f":
                    found[path, name] = as_host(value)
        return found

    def updates(self) -> dict[str, tuple[AdaptedLayer, Update]]:
        """What the adapters add to each layer's weight now."""
        return {path: (layer, layer.stored_update()) for path, layer in self.layers_now.items()
                if layer.active and not layer.merged}


def norm_of(array: Any) -> float:
    """The Frobenius norm of an array of any device or store."""
    host = numpy.ravel(backend.to_host(dense(array)))
    wide = host.astype("float64") if host.dtype.itemsize < 4 or host.dtype.kind == "V" else host
    with numpy.errstate(all="ignore"):
        return float(numpy.linalg.norm(wide))


def kept(p: Parameter) -> tuple[Any, Array]:
    """What a frozen parameter holds; where others may write into it, a copy too."""
    return p.data, None if isinstance(p.data, numpy.ndarray) or not hasattr(p.data, "fill") else as_host(p)


def is_still(p: Parameter, before: tuple[Any, Array]) -> bool:
    """Whether a frozen parameter holds the same numbers."""
    array, copy = before
    if copy is None:
        return p.data is array or equal(backend.to_host(dense(p.data)), backend.to_host(dense(array)))
    return equal(as_host(p), copy)


def equal(a: Array, b: Array) -> bool:
    return bool(a.shape == b.shape and a.tobytes() == b.tobytes())


def place_of(error: BaseException) -> str:
    """The line in which an error arose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f"{frame.filename.rpartition('/')[2]}, line {frame.lineno}" + (f": {line}" if line else "")
