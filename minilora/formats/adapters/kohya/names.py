"""kohya's names and module paths: an underscore may have been a dot, and only the list of modules can tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ....lora.config_checks import nearest

__all__ = ["COMPONENTS", "Names", "lora_names"]

Array = Any
# A prefix, and the part of a diffusion pipeline that it stands for; lycoris is that of a single model.
COMPONENTS = {"lora_unet": "unet", "lora_transformer": "transformer", "lora_te": "text_encoder", "lora_te1": "text_encoder",
              "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3", "lycoris": ""}
NAME = re.compile(rf"(?P<prefix>{'|'.join(COMPONENTS)})_(?P<rest>[^.]+)")


class Names:
    """Which module a name of kohya's means.

    Parameters
    ----------
    names : iterable of str
        All names of the file.
    modules : model, iterable of str, mapping of str to one of them, or None
        As in `Kohya.read`.
    problems : list of str
        Lines are added for what has no answer, or several.
    """

    def __init__(self, names: Iterable[str], modules: Any, problems: list[str]) -> None:
        self.problems, self.notes = problems, []
        self.parts = {name: (COMPONENTS[found["prefix"]], found["rest"]) if (found := NAME.fullmatch(name)) else ("", name)
                      for name in names}
        self.known = modules is not None
        self.table: dict[tuple[str, str], list[str]] = {}
        self.axes: dict[str, int | None] = {}
        components = {component for component, _ in self.parts.values()}
        if isinstance(modules, Mapping):
            for component, given in modules.items():
                for path, axes in _paths(given):
                    self.add(component, path, f"{component}.{path}" if component else path, axes)
        elif self.known:
            self.add_all(modules, components)
        elif any(NAME.fullmatch(name) for name in self.parts):
            self.notes.append("the paths are kohya's names, in which underscores stand for dots too: read it with modules=, "
                              "the model or the paths of its modules, to have paths")

    def add_all(self, modules: Any, components: set[str]) -> None:
        """Modules of one model, or paths that begin with the part that they belong to."""
        only = components.pop() if len(components) == 1 else None
        for path, axes in _paths(modules):
            start, _, rest = path.partition(".")
            if start in COMPONENTS.values() and rest:
                self.add(start, rest, path, axes)
            if only is not None:
                self.add(only, path, path, axes)
        if only is None and self.known:
            self.notes.append("the file holds several parts of a pipeline: a list of modules must say which part each is of")

    def add(self, component: str, inner: str, path: str, axes: int | None) -> None:
        self.table.setdefault((component, inner.replace(".", "_")), []).append(path)
        self.axes[path] = axes

    def path(self, name: str) -> str | None:
        """The module that a name means: one path, or None and a line in `problems`."""
        component, rest = self.parts[name]
        if not self.known:
            return name
        found = self.table.get((component, rest.replace(".", "_")), [])
        if len(found) == 1:
            return found[0]
        if found:
            self.problems.append(f"{name}: this may be {' or '.join(found)}: leave the wrong ones out of modules")
            return None
        inner = {key[1]: paths[0] for key, paths in self.table.items() if key[0] == component}
        close = [inner[key] for key in nearest(rest.replace(".", "_"), inner, 2)]
        part = f" for {component!r}" if component and not inner else ""
        self.problems.append(f"{name}: no module of this name in modules{part}"
                             + (f"; the nearest: {', '.join(close)}" if close else ""))
        return None

    def shaped(self, path: str, A: Array, B: Array) -> tuple[Array, Array]:
        """A and B with as many axes as the weight of the module has, where they differ in axes of length 1 only.

        A linear layer and a 1 x 1 convolution have the same update, and files have either shape for either.
        """
        axes = self.axes.get(path)
        if axes is None or A.ndim == axes or min(axes, A.ndim, B.ndim) < 2 or any(n != 1 for n in A.shape[2:] + B.shape[2:]):
            return A, B
        ones = (1,) * (axes - 2)
        return A.reshape(*A.shape[:2], *ones), B.reshape(*B.shape[:2], *ones)


def _paths(given: Any) -> Iterable[tuple[str, int | None]]:
    """The paths of modules, and the number of axes of the weight of each where a model tells it."""
    if hasattr(given, "named_modules"):
        for path, module in given.named_modules():
            weight = getattr(module, "weight", None)
            if path:
                yield path, getattr(weight, "ndim", None)
    else:
        yield from ((str(path), None) for path in given)


def lora_names(paths: Iterable[str], prefix: str, problems: list[str]) -> dict[str, str]:
    """kohya's name for every path; lines are added to `problems` where two paths would get the same."""
    paths = list(paths)
    first = "lora_te1" if any(path.startswith("text_encoder_2.") for path in paths) else "lora_te"
    starts = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": first, "text_encoder_2": "lora_te2",
              "text_encoder_3": "lora_te3"}
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in paths:
        start, _, rest = path.partition(".")
        if NAME.fullmatch(path):
            name = path
        elif start in starts and rest:
            name = f"{starts[start]}_{rest.replace('.', '_')}"
        else:
            name = f"{prefix}_{path.replace('.', '_')}" if prefix else path.replace(".", "_")
        if name in taken:
            problems.append(f"{path}: kohya's name for it is {name}, and {taken[name]} has the same: write PEFT's dialect")
        names[path] = name
        taken.setdefault(name, path)
    return names
