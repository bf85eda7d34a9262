"""The frozen layers of a model in low precision, and back: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import ConfigError, DTypeError, MiniloraError, StateError
from ..nn.conv import Conv1d, Conv2d
from ..nn.embedding import Embedding
from ..nn.linear import Linear
from ..nn.module import Module
from ..stored import Stored
from ..tensor import Parameter
from .codes import KINDS, check_kind
from .four_bit import FourBit
from .halves import HALVES
from .int8 import Int8Rows
from .report import Quantized, QuantizedWeight
from .sixteen import Sixteen

__all__ = ["HEADS", "Quantized", "QuantizedWeight", "dequantize", "linear_layers", "quantize", "stored"]

Array = Any

MATRICES = (Linear, Embedding, Conv1d, Conv2d)  # whose weights 16 bits may hold
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out")  # left as they are, at the top of a model or as a leaf


def quantize(model: Module, kind: str = "nf4", *, blocksize: int = 64, double: bool = True,
             exclude: Sequence[str] = ()) -> Quantized:
    """Hold the frozen weights of a model's layers in low precision, in place.

    Parameters
    ----------
    model : Module
        With adapters or without; more can be put in later. Norms and biases stay as they are; and, but for bfloat16 and
        float16, embeddings, convolutions, output heads and weights that another kind of layer shares.
    kind : {"nf4", "fp4", "int8", "bfloat16", "float16"}
    blocksize : int
        Of nf4 and fp4: the weights that share a scale, 32 to 4096.
    double : bool
        Of nf4 and fp4: hold the scales in 8 bits.
    exclude : sequence of str
        Layers to leave as they are: a layer is left if its path, or that of a module around it, is one of them or ends in
        ``"." + name``.

    Returns
    -------
    Quantized
        Prints as a table.

    Raises
    ------
    ConfigError
        If there is no such kind or blocksize, or a name in `exclude` fits no linear layer.
    StateError
        If a weight is trained or merged, not finite, or beyond the end of float16; or if nothing is left to quantise. All
        layers concerned are named.
        After any of these errors nothing has changed.

    Notes
    -----
    A gradient reaches adapters through a quantised weight as through any other (`stored`). Layer by layer: before it lets go
    of the weights as they were, it needs memory for what is held afterwards, and one tile. In 4 or 8 bits no update can be
    merged: it would be rounded away, see ``docs/qlora.md``. DoRA keeps the lengths that it has: they were those of the exact
    rows.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(64, 128, rng=0), minilora.nn.Linear(128, 2, rng=1))
    >>> print(quantize(model.requires_grad(False), exclude=["1"]))
    weight    held as  shape     bytes before  after  error
    -------------------------------------------------------
    0.weight  nf4      128 x 64        32,768  4,232  9.21%
    1 weights: 32,768 bytes before, 4,232 now, 4.133 bits a weight
    left: 1: excluded by '1'
    """
    make = maker(kind, blocksize, double)
    layers, left = linear_layers(model, kind, exclude)
    problems = [f"{path}: {why}" for path, layer in layers.items() if (why := _unfit(layer))]
    if problems:
        raise StateError("\n  ".join(["quantize: nothing was changed:", *problems]))
    if not layers:
        why = "".join(f"\n  {path or '(model)'}: {text}" for path, text in left)
        what = "layer" if kind in HALVES else "linear layer"
        raise StateError(f"quantize: this {type(model).__name__} has no {what} whose weight could be held as {kind}{why}")
    return Quantized(_exchange({path: layer.weight for path, layer in layers.items()}, make), left)


def dequantize(model: Module) -> Quantized:
    """Decode every weight of a model that is held in low precision, in place: ordinary arrays in the dtype it computes in.

    Returns
    -------
    Quantized
        With the errors of decoding, which are 0.

    Raises
    ------
    StateError
        If there is none. Nothing has changed then.

    Notes
    -----
    What quantising has lost is not found again. Outputs stay what they were, up to rounding; updates can be merged.

    Examples
    --------
    >>> import minilora
    >>> layer = minilora.nn.Linear(64, 2, rng=0).requires_grad(False)
    >>> report = quantize(layer)
    >>> type(layer.weight.data).__name__
    'FourBit'
    >>> report = dequantize(layer)
    >>> type(layer.weight.data).__name__
    'ndarray'
    """
    _check_model("dequantize", model)
    held = {path: p for path, p in model.named_parameters() if isinstance(p.data, Stored)}
    if not held:
        raise StateError(f"dequantize: no weight of this {type(model).__name__} is held in low precision")
    return Quantized(_exchange(held, lambda W: W.dense()), ())


def stored(W: Array, kind: str = "nf4", *, blocksize: int = 64, double: bool = True) -> Stored:
    """One matrix in low precision, on its device; arguments and errors as in `quantize`."""
    return maker(kind, blocksize, double)(W)  # type: ignore[no-any-return]


def maker(kind: str, blocksize: int = 64, double: bool = True) -> Callable[[Array], Any]:
    """The function from a matrix to one of this kind; `ConfigError` if there is no such kind or blocksize."""
    if kind == "int8":
        return Int8Rows.of
    if kind in HALVES:
        return lambda W: Sixteen.of(W, kind)
    if kind not in KINDS:
        raise ConfigError(f"quantize: kind must be 'nf4', 'fp4', 'int8', 'bfloat16' or 'float16', got {kind!r}")
    check_kind(kind, blocksize)
    return lambda W: FourBit.of(W, kind, blocksize, double=double)


def _check_model(what: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise DTypeError(f"{what}: expected a model, got {type(model).__name__}")


def linear_layers(model: Module, kind: str, exclude: Sequence[str]) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """The layers to be quantised, by path, each weight once; and those that are left, with the reason."""
    _check_model("quantize", model)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    classes = MATRICES if kind in HALVES else (Linear,)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, classes)]
    unused = [name for name in exclude if not any(_hits(name, path) for path, _ in found)]
    if unused:
        raise ConfigError(f"quantize: exclude: no layer is named {', '.join(map(repr, unused))}. The layers are "
                          f"{', '.join(path or '(model)' for path, _ in found) or 'none'}")
    elsewhere = {id(p): path for path, module in model.named_modules() if not isinstance(module, classes)
                 for _, p in module.own_parameters()}
    layers: dict[str, Any] = {}
    left, seen = [], set()
    for path, module in found:
        why = _left(path, module, kind, exclude, elsewhere)
        if why:
            left.append((path, why))
        elif id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[f"{path}.weight" if path else "weight"] = module
    return layers, tuple(left)


def _left(path: str, layer: Any, kind: str, exclude: Iterable[str], elsewhere: dict[int, str]) -> str:
    """Why a layer is left as it is, or ""."""
    hit = next((name for name in exclude if _hits(name, path)), None)
    if hit is not None:
        return f"excluded by {hit!r}"
    parts = path.split(".")
    head = next((name for name in (() if kind in HALVES else HEADS) if name in (parts[0], parts[-1])), None)
    if head:
        return f"output heads stay as they are ({head})"
    if id(layer.weight) in elsewhere:
        return f"shares its weight with {elsewhere[id(layer.weight)]}"
    data = layer.weight.data
    if not isinstance(data, Stored) or (data.kind != kind and not getattr(data, "coarse", False)):
        return ""
    return f"held as {data.kind} already"


def _hits(name: str, path: str) -> bool:
    """Whether a name is a path, the end of it behind a dot, or either of a module around it."""
    return f".{path}.".find(f".{name}.") >= 0 if name else not path


def _unfit(layer: Any) -> str:
    if layer.holds_merged():
        return ("an update is merged into it, which could not be taken out again: lora.unmerge(model) first, or "
                "lora.bake(model)")
    if layer.weight.trainable:
        return ("trained, and a weight in low precision is read only: model.requires_grad(False), and train adapters beside "
                "it; or leave it out with exclude=[...]")
    return ""


def _exchange(weights: dict[str, Parameter], make: Callable[[Array], Any]) -> tuple[QuantizedWeight, ...]:
    """Put what `make` gives in the place of each array: all of them or none."""
    made, rows = [], []
    for path, p in weights.items():
        try:
            new = make(p.data)
        except MiniloraError as error:
            error.path = path
            raise
        made.append(new)
        kind = new.kind if isinstance(new, Stored) else new.dtype.name
        rows.append(QuantizedWeight(path, kind, tuple(p.shape), int(p.data.nbytes), int(new.nbytes), _error(p.data, new)))
    before = [(p, p.data, p.grad) for p in weights.values()]
    try:
        for p, new in zip(weights.values(), made):
            p.data, p.grad = new, None
    except BaseException:
        for p, data, grad in before:
            p.data, p.grad = data, grad
        raise
    return tuple(rows)


def _error(W: Array, Q: Array) -> float:
    """||Q - W|| / ||W||, some rows at a time; 0 if both are 0."""
    wrong = whole = 0.0
    for low, high in (Q if isinstance(Q, Stored) else W).tiles():
        w = W[low:high]
        d = Q[low:high] - w
        wrong, whole = wrong + float((d * d).sum()), whole + float((w * w).sum())
    return (wrong / whole) ** 0.5 if whole else 0.0
