"""Weights in low precision in the folder of a model: their tensors, and what config.json says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy

from ... import backend
from ...errors import ConfigError, DTypeError, FormatError
from ...formats.quantised.layout import file_tensors
from ...formats.quantised.settings import FIELD, Settings, read_settings
from ...nn.linear import Linear
from ...nn.module import Module
from ...quant.four_bit import FourBit
from ...quant.model import MATRICES
from ...quant.sixteen import Sixteen
from ...stored import Stored
from ..families.contract import Family, Head
from .names import common_name

__all__ = ["IN_FILES", "check_dtype", "dtype_of", "keeps", "linear_weights", "on_device", "quantised_fields",
           "sixteen_weights", "skipped", "tensors_of"]


DTYPES = ("float16", "float32", "float64")
IN_FILES = ("BF16", "F16")  # what a file calls 16 bits


def check_dtype(dtype: Any) -> None:
    """Raise `ConfigError` unless weights can be held in this dtype."""
    try:
        known = dtype is None or keeps(dtype) or numpy.dtype(dtype).name in DTYPES
    except TypeError:
        known = False
    if not known:
        raise ConfigError(f"dtype must be None, 'keep' or one of {', '.join(DTYPES)}, got {dtype!r}")


def keeps(dtype: Any) -> bool:
    """Whether weights shall stay in 16 bits where the file has them so."""
    return isinstance(dtype, str) and dtype == "keep"


def linear_weights(model: Module) -> set[str]:
    """The paths of the weights of linear layers: what may be in 4 bits."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Linear)}


def sixteen_weights(model: Module) -> set[str]:
    """The paths of the weights that may be in 16 bits: of linear layers, embeddings and convolutions."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, MATRICES)}


def on_device(array: Any) -> Any:
    """An array of a file, or a matrix held in low precision, on the current device."""
    if isinstance(array, Stored):
        return array.with_arrays({ending: backend.to_device(each) for ending, each in array.arrays().items()})
    # BLAS, and much of NumPy, would copy an array that is not aligned each time that it is used
    return backend.to_device(numpy.require(array, requirements="A"))


def tensors_of(name: str, data: Any, turned: bool) -> dict[str, Any]:
    """The tensors of a parameter: one, or those of a 4-bit weight. `turned`: the unquantised file has it as (in, out)."""
    if isinstance(data, FourBit):
        return file_tensors(name, data)
    data = data.numbers if isinstance(data, Sixteen) else data
    return {name: data.T if turned else data}


def dtype_of(model: Module) -> str:
    """What config.json says of the dtype: that of all parameters, or of those in 16 bits; float32 where they are of several."""
    data = [p.data for p in model.parameters()]
    halves = {each.kind for each in data if isinstance(each, Sixteen)}
    dtypes = halves or {each.dtype.name for each in data}
    return next(iter(dtypes)) if len(dtypes) == 1 else "float32"


def check_kinds(model: Module) -> None:
    """Raise `DTypeError` if weights are held as no file of transformers has them."""
    held = {path: p.data for path, p in model.named_parameters() if isinstance(p.data, Stored)}
    kinds = sorted({data.kind for data in held.values() if isinstance(data, FourBit)})
    other = [f"{path} ({data.kind})" for path, data in held.items() if not isinstance(data, (FourBit, Sixteen))]
    if other or len(kinds) > 1:
        what = f"{len(other)} weights are held as {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}" if other else \
            f"some weights are in {' and some in '.join(kinds)}"
        raise DTypeError(f"save: {what}: a folder holds floating-point numbers, or 4 bits of one kind; nothing was written. To "
                         "write them decoded: minilora.quant.dequantize(model)")


def quantised_fields(model: Any, family: Family, head: Head, kept: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` for a model with 4-bit weights; nothing for one without.

    Parameters
    ----------
    model : Module
    family, head : Family, Head
    kept : mapping
        What config.json said when the model was loaded: the dtype in which transformers shall compute, and the modules that
        are not quantised, as far as that still holds.
    """
    check_kinds(model)
    four = {path: p.data for path, p in model.named_parameters() if isinstance(p.data, FourBit)}
    if not four:
        return {}
    name = {path: _module(path, family, head) for path in linear_weights(model)}
    there = [name[path] for path in name if path in four]
    left = [name[path] for path in name if path not in four]
    try:
        before = read_settings(kept[FIELD])
    except (KeyError, FormatError):
        before = Settings("nf4", skip=None)
    skip = before.skip
    if skip is None or not (all(_covered(one, skip) for one in left) and not any(_covered(one, skip) for one in there)):
        skip = skipped(left, there, _usual(model, family, head))
    kind, double = next((data.kind, any(data.double for data in four.values())) for data in four.values())
    return {FIELD: Settings(kind, double, skip, before.compute).fields()}


def skipped(left: Iterable[str], there: Collection[str], usual: Collection[str]) -> tuple[str, ...] | None:
    """``llm_int8_skip_modules``: None where what is left is what transformers leaves anyway.

    Parameters
    ----------
    left, there : collections of str
        The modules of linear layers that are not in 4 bits, and those that are.
    usual : collection of str
        Those that transformers leaves. A list takes the place of them, so it names them too.

    Notes
    -----
    transformers takes an entry for the end of a name too: "classifier" would mean "pre_classifier" as well. Where that is in
    4 bits the entry is "^classifier", which it reads as a regular expression.

    Examples
    --------
    >>> skipped(["lm_head"], ["q_proj"], ["lm_head"]), skipped(["classifier"], ["pre_classifier"], [])
    (None, ('^classifier',))
    """
    left = set(left)
    if left == set(usual) & {*left, *there}:
        return None
    return tuple(sorted(f"^{name}" if any(_covered(one, (name,)) for one in there) else name for name in {*left, *usual}))


def _covered(name: str, skip: Iterable[str]) -> bool:
    """Whether one of the entries means a module; an entry that is more than a name (a regular expression) means none here."""
    return any(name.startswith(f"{entry}.") or name.endswith(entry) for entry in skip if entry)


def _usual(model: Any, family: Family, head: Head) -> set[str]:
    """What transformers does not quantise unasked: the module that makes the logits of words, and the last one."""
    last = [path for path, _ in model.named_parameters()][-1:]
    return {name.removesuffix(".weight") for name in head.tied if name.endswith(".weight")} | \
        {_module(path, family, head) for path in last if path.endswith(".weight")}


def _module(path: str, family: Family, head: Head) -> str:
    """What transformers calls the module of a weight."""
    bare = family.prefix if head is family.heads.get("base") else ""  # as `writing` names the tensors of a body alone
    return common_name(path, family, head).removeprefix(bare).removesuffix(".weight")
