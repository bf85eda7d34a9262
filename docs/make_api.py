"""Writes docs/api.md, the public names at a glance, from ``__all__`` and docstrings: ``python docs/make_api.py``.

A row is a name, its signature in short, a link to its file, and the first sentence of its docstring. By hand are only the
order of the rooms and the headings inside them: what a sentence says badly is mended where it stands.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
COMMAND = "python docs/make_api.py"
WIDTH = 70  # characters of a signature; a longer one is cut

# The rooms in the order of the page. In each: a heading, and the files, or folders of files, whose names stand under it.
ROOMS: dict[str, dict[str, str]] = {
    "minilora": {"Tensors and gradients": "tensor engine walk recording drawing", "Devices": "backend", "Parts": "*"},
    "minilora.ops": {
        "Arithmetic": "elementwise choose cast", "Sums and extremes": "reduce", "Shape": "shape", "Products": "linear conv",
        "Activations": "activation softmax", "Norms and dropout": "norm dropout", "Tables and images": "embedding pool",
        "Losses": "loss cross_entropy",
        "Attention": "attention packed_attention prefix_attention disentangled rotary rotary_scaling",
        "Calls and vectors of weights": "recompute weights fastfood displace"},
    "minilora.nn": {
        "The base of all": "module", "Layers": "linear conv embedding pool norm", "Activations, dropout, losses": "layers",
        "Attention": "attention", "Models, which live in `models`": "models",
        "About models": "checkpointing initial summary"},
    "minilora.optim": {
        "Optimizers": "adam sgd optimizer group", "Learning rates": "schedule", "Mixed precision": "loss_scale"},
    "minilora.lora": {
        "What to adapt": "config", "Into a model, and out again": "adapters", "The update and its gradient": "gradient",
        "Layers": "layers", "Merging one weight": "merging", "What it would cost": "planning",
        "Updates as factors: add, cut, compare": "algebra"},
    "minilora.models": {
        "Files": "checkpoints text.tokenizer", "GPT-2": "bodies.gpt2 heads.gpt2",
        "Llama, Mistral, Qwen": "bodies.llama bodies.llama_configs heads.llama",
        "BERT": "bodies.bert heads.bert", "RoBERTa": "bodies.roberta heads.roberta",
        "DistilBERT": "bodies.distilbert heads.distilbert",
        "DeBERTa": "bodies.deberta bodies.deberta_config heads.deberta", "Text from a model": "decoding causal",
        "Vectors and classes of texts": "heads", "Images": "diffusion"},
    "minilora.formats": {
        "An adapter of a model": "placing", "An adapter without a model": "adapters",
        "Adapters compared and combined": "algebra",
        "Merging file into file": "merging", "Files of tensors": "tensors", "Subspaces": "subspaces"},
    "minilora.train": {},
    "minilora.testing": {},
    "minilora.quant": {},
    "minilora.tuners": {},
    "minilora.engine": {},
    "minilora.backend": {},
    "minilora.half": {},
    "minilora.parallel": {},
    "minilora.errors": {},
}
ONLY = {"minilora.half": ["mixed"]}  # a file, not a room: the rest of its names are for the library itself
# Values have no docstring of their own.
VALUES = {"minilora.__version__": "The version, as text.",
          "minilora.models.families.FAMILIES": "Every `Family`, by the `model_type` of its config.json.",
          "minilora.parallel.WIDE": "A layer this wide, in numbers, needs its cores for its own products."}


def packages() -> list[str]:
    """The rooms of the page: those above, and every other package with ``__all__``, behind the one that it is in."""
    found = []
    for path in sorted((ROOT / "minilora").rglob("__init__.py")):
        if re.search(r"^__all__\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(".".join(path.parent.relative_to(ROOT).parts))
    order = list(ROOMS)
    for name in (name for name in found if name not in ROOMS):
        outer = name.rpartition(".")[0]
        order.insert(order.index(outer) + 1 if outer in order[1:] else len(order), name)
    return order


def first_paragraph(thing: Any) -> str:
    """The first paragraph of a docstring on one line; wide gaps in a formula become commas."""
    text = inspect.getdoc(thing) or ""
    return re.sub(r"\s+", " ", re.sub(r"(?<=\S) {3,}(?=\S)", ",  ", text.split("\n\n")[0])).strip()


def first_sentence(text: str) -> str:
    """Up to the first full stop that a capital follows: behind that of ``y = x. dx = dy`` none does."""
    found = re.match(r"(.+?\.)(?=\s+[A-Z`*\"(])", text)
    return (found[1] if found else text).rstrip(":")


def formula(operation: Any) -> str:
    """What the docstring of an operation gives: y on its first lines, and the gradients, there or on a line further down."""
    first, _, rest = (inspect.getdoc(operation) or "").partition("\n\n")
    text = first_paragraph(operation).rstrip(":.")
    gradient = re.compile(r"\bd\w+(?:/d\w+)? = ")
    if not gradient.search(first):
        on_one_line = rest.replace("\n", " ")
        found = re.search(r"^ {4}(d\w+ = .+)$", rest, re.MULTILINE) or \
            re.search(rf"({gradient.pattern}.+?)(?:\. |\.$)", on_one_line)
        text += f". {re.sub(r' {3,}', ', ', found[1])}" if found else ""
    return f"{text}."


def says(name: str, thing: Any) -> str:
    """What the page says of a public name: the first sentence of its docstring, or the line of `VALUES`."""
    if name in VALUES:
        return VALUES[name]
    if type(thing) not in (type, ModuleType) and not callable(thing) or _docstring_is_borrowed(thing):
        return ""
    return first_sentence(first_paragraph(thing))


def _docstring_is_borrowed(thing: Any) -> bool:
    """Whether a class shows the docstring of the class that it derives from, which says something else."""
    return isinstance(thing, type) and not thing.__dict__.get("__doc__")


def signature(name: str, thing: Any) -> str:
    """The name with its parameters, without types; one that is too long ends with dots in the place of options."""
    given = parameters_of(thing)
    if given is None:
        return name
    keyword = [p for p in given if p.kind is p.KEYWORD_ONLY]
    positional = [p for p in given if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
    star = ["*"] if keyword and not any(p.kind is p.VAR_POSITIONAL for p in given) else []
    rest = [f"**{p.name}" for p in given if p.kind is p.VAR_KEYWORD]
    whole = [*map(_shown, positional), *star, *map(_shown, keyword), *rest]
    first = whole[:len(positional)] or whole  # what may be given without a name: it is cut behind that, or further in front
    for parts in (whole, *([*first[:count], "..."] for count in range(len(first), 0, -1))):
        text = f"{name}({', '.join(parts)})"
        if len(text) <= WIDTH:
            return text
    return f"{name}(...)"


def parameters_of(thing: Any) -> list[inspect.Parameter] | None:
    """What a call takes; None for what is not called by users: values, modules, results, errors, protocols, operations."""
    from minilora.engine import Op

    if not callable(thing) or isinstance(thing, ModuleType):
        return None
    if isinstance(thing, type) and (issubclass(thing, (tuple, BaseException, Op)) or getattr(thing, "_is_protocol", False)):
        return None
    return list(inspect.signature(thing).parameters.values())


def _shown(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    value = parameter.default
    if value is parameter.empty:
        return stars + parameter.name
    if callable(value) and hasattr(value, "__name__"):
        return f"{parameter.name}={value.__name__}"
    text = repr(value)
    return f"{parameter.name}={'...' if ' at 0x' in text or text.startswith('<') else text}"


def members(thing: Any) -> str:
    """The fields of a result, and the methods of a class that its base does not have."""
    from minilora import Tensor
    from minilora.engine import Op
    from minilora.models import CausalLM
    from minilora.nn import Module
    from minilora.optim import Optimizer
    from minilora.stored import Stored

    if not isinstance(thing, type) or issubclass(thing, (Op, BaseException)):
        return ""
    if issubclass(thing, Module) and thing not in (Module, CausalLM):
        return ""  # a layer or a model is called, and its methods are those of these two
    bases = [base for base in (Module, Optimizer, Stored, Tensor, tuple, object)
             if issubclass(thing, base) and thing is not base]
    fields = [name for name in getattr(thing, "_fields", ()) if not name.startswith("_")]
    known = {name for base in bases for name in dir(base)} | {"forward", *fields}
    ours = [cls for cls in thing.__mro__ if cls.__module__.startswith("minilora")]
    methods = sorted({name for cls in ours for name, value in vars(cls).items()
                      if not name.startswith("_") and name not in known and _is_method(value)})
    lists = [f"{title}: {', '.join(f'`{name}`' for name in names)}."
             for title, names in (("Fields", fields), ("Methods", methods)) if names]
    return " ".join(lists)


def _is_method(value: Any) -> bool:
    return inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod, property))


def in_table(text: str) -> str:
    """Text for a cell of a Markdown table: what Markdown would take for its own is escaped, but for code and bold."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text)
    for i, part in enumerate(parts):
        part = re.sub(r"^``(.+?)``$", r"`\1`", part).replace("|", "\\|")
        if i % 2 == 0:
            part = re.sub(r"(?<!\*)\*(?!\*)", r"\\*", part).replace("<", "\\<").replace("__", "\\_\\_").replace("[", "\\[")
        parts[i] = part
    return "".join(parts)


def source(room: str, thing: Any) -> str:
    """The file that a name comes from, seen from the page."""
    module = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None) or room
    if not str(module).startswith("minilora"):
        module = room
    file = Path(str(importlib.import_module(module).__file__)).resolve()
    return f"../{file.relative_to(ROOT).as_posix()}"


def linked(room: str, name: str, thing: Any) -> str:
    if isinstance(thing, ModuleType) and f"minilora.{name}" in packages():
        return f"[`{name}`](#{slug(f'minilora.{name}')})"
    return f"[`{signature(name, thing)}`]({source(room, thing)})".replace("|", "\\|")


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def grouped(room: str, names: list[str], namespace: Any) -> dict[str, list[str]]:
    """Names by heading: by the file that each comes from; what no heading has comes last."""
    wanted = ROOMS.get(room, {})
    groups: dict[str, list[str]] = {heading: [] for heading in wanted}
    for name in names:
        thing = getattr(namespace, name)
        module = room if isinstance(thing, ModuleType) else str(getattr(thing, "__module__", room))
        file = module.removeprefix(f"{room}.").removeprefix("minilora.")
        found = [(len(part), heading) for heading, parts in wanted.items() for part in parts.split()
                 if part == file or file.startswith(f"{part}.")]
        rest = next((heading for heading, parts in wanted.items() if parts == "*"), "")
        groups.setdefault(max(found)[1] if found else rest, []).append(name)
    return {heading: members for heading, members in groups.items() if members}


def operations(room: str, names: list[str], namespace: Any) -> Iterator[str]:
    """The rows of ops: a function, what it computes, and the operation that it applies, with its gradient."""
    classes = [name for name in names if isinstance(getattr(namespace, name), type)]
    told: set[str] = set()
    rows = []
    for name in (name for name in names if name not in classes):
        thing = getattr(namespace, name)
        text = first_sentence(first_paragraph(thing))
        meant = [c for c in re.findall(r"`(\w+)`", first_paragraph(thing)) if c in namespace.__all__ and c[0].isupper()]
        meant += [c for c in classes if c.lower() == name.replace("_", "")]
        text = re.sub(r"; see `\w+`\.$", ".", text)
        cell = ""
        if meant:
            operation = getattr(namespace, meant[0])
            cell = f"[`{meant[0]}`]({source(room, operation)})"
            cell += "" if meant[0] in told else f" {in_table(formula(operation))}"
            told.add(meant[0])
        rows.append(f"| {linked(room, name, thing)} | {in_table(text)} | {cell} |")
    for name in classes:
        if name not in told:
            thing = getattr(namespace, name)
            rows.append(f"| | | [`{name}`]({source(room, thing)}) {in_table(formula(thing))} |")
    yield from ("| function | what it is | operation: y, and the gradients |", "|---|---|---|", *rows)


def rows_of(room: str, names: list[str], namespace: Any) -> Iterator[str]:
    yield from ("| name | what it is |", "|---|---|")
    for name in names:
        thing = getattr(namespace, name)
        text = " ".join(filter(None, [in_table(says(f"{room}.{name}", thing)), members(thing)]))
        yield f"| {linked(room, name, thing)} | {text} |"


def public(room: str) -> tuple[Any, list[str]]:
    """A room, and its public names, whatever the case of their letters."""
    namespace = importlib.import_module(room)
    return namespace, sorted(ONLY.get(room, namespace.__all__), key=lambda name: (name.lower(), name))


def page() -> str:
    """The text of docs/api.md."""
    rooms = packages()
    lines = [
        "# The public names at a glance", "",
        "Every public name with what it is, package by package. A name leads to its file, where the docstring has shapes,",
        "errors, formulas and an example; `help(minilora.lora.inject)` shows the same. In a long signature `...` stands for",
        "what comes behind. *Fields* are what a result holds; *methods* are those that its base class does not have.", "",
        f"This page is made by `{COMMAND}` out of `__all__` and the docstrings, and not edited by hand.", "",
        "The letters of the formulas are those of [conventions.md](conventions.md): x in, y out, dy the gradient that comes",
        "from above, dx the one that goes on. Names of other libraries: [coming_from.md](coming_from.md).", "",
        "| package | what it is | public names |", "|---|---|---:|"]
    for room in rooms:
        namespace, names = public(room)
        lines.append(f"| [`{room}`](#{slug(room)}) | {in_table(first_sentence(first_paragraph(namespace)))} | {len(names)} |")
    for room in rooms:
        namespace, names = public(room)
        lines += ["", f"## `{room}`", ""]
        groups = grouped(room, names, namespace)
        for heading, group in groups.items():
            lines += [f"### {heading or 'More'}", ""] if len(groups) > 1 else []
            lines += [*(operations if room == "minilora.ops" else rows_of)(room, group, namespace), ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # a clone need not be installed
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(f"wrote {PAGE.relative_to(ROOT)}: {sum(len(public(room)[1]) for room in packages())} names")


if __name__ == "__main__":
    main()
