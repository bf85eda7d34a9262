"""Why a parameter that should move stands still: the cause, and the line to type."""

from __future__ import annotations

from collections.abc import Iterator

from ...lora.layers.adapter import Adapter
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.places import layers_of
from ...nn.module import Module
from ...tensor import Parameter
from .course import Course

__all__ = ["Blame"]


class Blame:
    """Looks for causes in the steps that were made.

    Parameters
    ----------
    course : Course
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.layers = layers_of(course.model)
        self.adapters: dict[int, tuple[AdaptedLayer, str, Adapter, str]] = {
            id(p): (layer, name, adapter, part) for layer in self.layers.values() for name, adapter in layer.adapters.items()
            for part, p in adapter.own_parameters()}

    def of(self, path: str, p: Parameter, gradient: float | None, moved: bool) -> str:
        """What is the matter with a parameter; "" if nothing is."""
        if not p.trainable:
            return self.frozen(p, moved)
        if moved:
            return ""
        if self.course.rates and id(p) not in self.course.rates:
            return ("trainable, and not in the optimizer, which was made before it was there: make it again, after "
                    "lora.inject: optimizer = optim.AdamW(model.named_parameters())")
        if self.course.error and gradient is None:
            return ""  # the error says more
        if gradient is None:
            return self.without_gradient(p)
        if gradient == 0:
            return self.zero_gradient(path, p)
        if self.course.steps == 0:
            return ""
        if self.course.rates[id(p)] == 0:
            return "has a gradient, and its learning rate is 0: give lr (learning_rate) a value above 0"
        if p.dtype.itemsize < 4:
            return (f"has a gradient, and its steps are lost in the rounding of {p.dtype}: keep what is trained in float32, "
                    "model.to(dtype='float32'), and train with precision='mixed'")
        return ("has a gradient, and comes out of a step as it was: the step is too small for its numbers (a larger "
                "learning_rate), or something puts the old values back")

    def frozen(self, p: Parameter, moved: bool) -> str:
        if moved:
            return ("frozen, and moves: something writes into it: look for .data[...] = and .data = in the model, the loss "
                    "and the optimizer")
        place = self.adapters.get(id(p))
        if place is None:
            return ""
        layer, name, adapter, part = place
        if name not in layer.active or layer.merged or part.startswith("start") or adapter.keeps_A and part == "lora_A":
            return ""
        return (f"a part of the active adapter {name!r}, and frozen (requires_grad(False) after lora.inject?): "
                f"lora.activate(model, {name!r})")

    def without_gradient(self, p: Parameter) -> str:
        place = self.adapters.get(id(p))
        if place is not None and place[1] not in place[0].active:
            return f"no gradient: its adapter {place[1]!r} is not active: lora.activate(model, {place[1]!r})"
        if id(p) not in self.course.seen.read:
            return ("no gradient: no operation reads it: forward does not use it, or reads its bare .data: hand the "
                    "parameter itself to the operation")
        if id(p) not in self.course.seen.recorded:
            return "no gradient: it is read within no_grad() only: compute the loss outside of it"
        return ("no gradient: it is read, and the graph is cut between there and the loss: look for .detach(), .data, "
                ".numpy() and no_grad() behind it")

    def zero_gradient(self, path: str, p: Parameter) -> str:
        place = self.adapters.get(id(p))
        if place is not None and place[3] in ("lora_A", "lora_B"):
            adapter = place[2]
            if not any(self.size_of(each) for each in (adapter.lora_A, adapter.lora_B)):
                return ("gradient 0: A and B are both 0, and dA = s B^T G and dB = s G A^T with them: nothing can begin. "
                        "Inject again with rng=..., which draws A: lora.remove(model), lora.inject(model, config, rng=0)")
        if self.course.seen.dead:
            shape = self.course.seen.dead[0]
            return (f"gradient 0: a ReLU gives 0 everywhere, {shape}, and lets no gradient through: smaller weights and biases "
                    "at the start, inputs of mean 0, or GELU in its place")
        return "gradient 0 everywhere: does the loss depend on it, and is what it is multiplied by not 0?"

    def size_of(self, p: Parameter) -> float:
        """The norm of a parameter at the start."""
        path = next(path for path, other in self.course.parameters if other is p)
        return self.course.sizes.get(path, 1.0)

    def error(self) -> str:
        """What ended the steps, and what of the adapters may be the reason."""
        text = self.course.error
        if not any(p.trainable for _, p in self.course.parameters):
            merged = [path for path, layer in self.layers.items() if layer.merged]
            idle = sorted({name for layer in self.layers.values() for name in layer.adapters if name not in layer.active})
            if merged:
                return f"Nothing is trained: {len(merged)} layers are merged. lora.unmerge(model), and train then"
            if idle:
                return (f"Nothing is trained: the adapter {idle[0]!r} is there and not active. "
                        f"lora.activate(model, {idle[0]!r})")
        return text

    def notes(self) -> Iterator[str]:
        """What is no fault by itself."""
        owners = dict(self.course.model.named_modules())
        for path, name in self.course.state:
            if not any(p.trainable for p in owners[path].parameters()):
                yield (f"{path + '.' if path else ''}{name} moves, and nothing beside it is trained: the file of an adapter "
                       "will not hold it. Let forward leave it alone where the layer is frozen, or save the whole model")
        for name, head in heads_of(self.course.model):
            if self.layers and not any(p.trainable for p in head.parameters()):
                yield (f"The head {name!r} is frozen: right if it was trained before. If it is new, its numbers are drawn "
                       f"at random, and stay so: lora.Config(..., modules_to_save=[{name!r}])")


def heads_of(model: Module) -> Iterator[tuple[str, Module]]:
    """What stands on the body of a classifier."""
    body = getattr(model, "body_name", None)
    if isinstance(body, str) and hasattr(model, "labels"):
        for name, child in model.children():
            if name != body and next(child.parameters(), None) is not None:
                yield name, child
