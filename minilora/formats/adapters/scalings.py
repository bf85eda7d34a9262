"""What writing has in common in the dialects: how s is said, what a dialect has no place for, and a config that follows.

Most dialects say s in their own way: alpha / r of a module, one number for all. Where s cannot be said, it can be folded:
s B A = t (s / t B) A for any t. That is exact where s / t is a power of two and B neither overflows nor loses digits at the
end of its range; else every number of B is rounded once more, which is done only if the caller asks for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import numpy

from ...errors import FormatError
from ...lora.config import Config
from .parts import json_object
from .saved import SavedAdapter, Update

__all__ = ["alpha_for", "as_float32", "config_of", "float_dtype", "folded", "kept", "most_common", "padded", "partly",
           "rounding_note", "unsaid", "with_dtype"]

Array = Any
T = TypeVar("T", bound=Hashable)
EPSILON = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float32": 2.0 ** -24, "float64": 2.0 ** -53}  # of one rounding

# What says alpha, or belongs to one file only: it would be wrong beside other tensors.
OF_ONE_FILE = ("alpha", "rank", "format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")
FINGERPRINT = "minilora"  # which base it belongs to, and the scalings: written by the room `placing`


def most_common(values: Iterable[T]) -> T:
    """The value that occurs most often; of several, the first."""
    return Counter(values).most_common(1)[0][0]


def alpha_for(s: float, r: int) -> float:
    """The float alpha for which alpha / r is s, or as near to it as a float can be."""
    alpha = s * r
    near = [alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)]
    return min(near, key=lambda value: abs(value / r - s))


def as_float32(alpha: float) -> float | None:
    """The nearest float32 to a positive number; None outside of their normal range."""
    least, most = (float(limit) for limit in (numpy.finfo("float32").tiny, numpy.finfo("float32").max))
    return float(numpy.float32(alpha)) if least <= alpha <= most else None


def kept(metadata: Mapping[str, str], scalings: Mapping[str, float],
         renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata that stays true beside tensors written anew, a fingerprint with the scalings that hold there.

    `renamed` says what paths of the adapter are called in the file, where they are called something else: a fingerprint
    speaks of the same ones. What lies in GGUF's fields is GGUF's.
    """
    found = {name: text for name, text in metadata.items()
             if name not in OF_ONE_FILE and not name.startswith(("general.", "adapter."))}
    if FINGERPRINT in found:
        said = json_object(found.pop(FINGERPRINT))
        if said is not None and "s" in said:  # else it is none, and no loss
            if renamed and isinstance(said.get("tensors"), dict):
                said["tensors"] = {renamed.get(path, path): each for path, each in said["tensors"].items()}
            found[FINGERPRINT] = json.dumps({**said, "s": dict(scalings)}, sort_keys=True)
    return found


def config_of(updates: Mapping[str, Update], **fields: Any) -> Config:
    """The config that gives these updates their ranks and scalings: what differs from the rule is in the patterns.

    Each pattern is anchored at a whole path, so that it hits this module and no other.
    """
    alphas = {path: alpha_for(update.s, update.r) for path, update in updates.items()}
    r, alpha = most_common(update.r for update in updates.values()), most_common(alphas.values())
    dora = any(u.magnitude is not None for u in updates.values())
    return Config(
        r=r, lora_alpha=alpha, target_modules=sorted(path for path in updates if path) or None,  # "": the model itself
        rank_pattern={f"^{re.escape(path)}": u.r for path, u in sorted(updates.items()) if u.r != r},
        alpha_pattern={f"^{re.escape(path)}": a for path, a in sorted(alphas.items()) if a != alpha},
        use_dora=dora, lora_bias=not dora and any(u.bias is not None for u in updates.values()), **fields)


def folded(updates: Mapping[str, Update], scalings: Mapping[str, float],
           fold: bool) -> tuple[dict[str, Update], list[str], int]:
    """The same updates with these scalings, the difference multiplied into B (and into the bias of an update).

    Parameters
    ----------
    updates : mapping of str to Update
    scalings : mapping of str to float
        The s that each is to have.
    fold : bool
        Whether B may be rounded where this is not exact.

    Returns
    -------
    dict of str to Update
    list of str
        A line for every module that is not folded, because it is not exact or not possible.
    int
        How many were rounded.
    """
    done, problems, rounded = {}, [], 0
    for path, update in updates.items():
        s, ratio = scalings[path], update.s / scalings[path]
        parts = {"B": update.B, "bias": update.bias}
        new = {name: _times(part, ratio) for name, part in parts.items() if part is not None} if ratio != 1 else {}
        exact = ratio * s == update.s and abs(math.frexp(ratio)[0]) == 0.5 and all(
            (new[name].astype("float64") == parts[name].astype("float64") * ratio).all() for name in new)
        if any((numpy.isfinite(parts[name].astype("float64")) & ~numpy.isfinite(part.astype("float64"))).any()
               for name, part in new.items()):
            problems.append(f"{path}: s = {update.s:g} in place of {s:g}: B times {ratio:g} overflows {update.B.dtype}")
        elif new and not exact and not fold:
            problems.append(f"{path}: s = {update.s:g} in place of {s:g}: B times {ratio:g} is rounded in {update.B.dtype}")
        rounded += bool(new) and not exact
        done[path] = dataclasses.replace(update, s=s, **new)
    return done, problems, rounded


def _times(array: Array, factor: float) -> Array:
    """The product in the array's own type, computed in float64."""
    with numpy.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (array.astype("float64") * factor).astype(array.dtype)


def rounding_note(count: int, updates: Mapping[str, Update]) -> list[str]:
    """The note that says what folding cost."""
    if not count:
        return []
    worst = max(EPSILON[update.B.dtype.name] for update in updates.values())
    return [f"folded: the scalings of {count} modules went into B, each of whose numbers is rounded once more, by "
            f"{worst:.1g} of itself at most"]


def padded(update: Update, r: int) -> Update:
    """The same update with rows of zeros in A and columns of zeros in B, up to rank r: exact."""
    A = numpy.concatenate([update.A, numpy.zeros((r - update.r, *update.A.shape[1:]), update.A.dtype)])
    B = numpy.concatenate([update.B, numpy.zeros((len(update.B), r - update.r, *update.B.shape[2:]), update.B.dtype)], axis=1)
    return dataclasses.replace(update, A=A, B=B)


def with_dtype(update: Update, dtype: Any) -> Update:
    """The update with all of its arrays in another float type: a dtype or its name, "bfloat16" too."""
    dtype = float_dtype(dtype)
    parts = {name: getattr(update, name) for name in ("A", "B", "bias", "magnitude")}
    return dataclasses.replace(update, **{name: part.astype(dtype) for name, part in parts.items() if part is not None})


def float_dtype(dtype: Any) -> Any:
    """A float type by itself or by its name, "bfloat16" too."""
    from ..tensors.dtypes import array_dtype  # here, because few ask for it

    dtype = array_dtype("BF16") if dtype == "bfloat16" else numpy.dtype(dtype)
    if dtype.name not in EPSILON:
        raise FormatError(f"dtype: expected one of {', '.join(EPSILON)}, got {dtype}")
    return dtype


def partly(updates: Mapping[str, Update], part: str, dialect: str) -> list[str]:
    """A line for every update that lacks a part which others have, for dialects that have one setting for all."""
    lacking = [path for path, update in updates.items() if getattr(update, part) is None]
    if len(lacking) == len(updates):
        return []
    what = {"magnitude": "DoRA's lengths", "bias": "a bias (lora_bias)"}[part]
    return [f"{path}: without {what}, which others have: {dialect} has one setting for all. Write PEFT's dialect"
            for path in lacking]


def unsaid(adapter: SavedAdapter, dialect: str, can: Collection[str]) -> list[str]:
    """A line for everything in this adapter that a dialect has no place for.

    Parameters
    ----------
    adapter : SavedAdapter
    dialect : str
    can : collection of str
        What it can say, of: saved, biases, tokens, lora_bias, dora, dora of embeddings, embedding, convolution.
    """
    def of(paths: Iterable[str]) -> str:
        found = list(paths)
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    u = adapter.updates
    found = {
        "saved": (of(adapter.saved), "whole modules trained with the adapter", "write PEFT's dialect, or leave them out: "
                  "dataclasses.replace(adapter, saved={})"),
        "biases": (of(adapter.biases), "trained biases of the base", "write PEFT's dialect, or leave them out: "
                   "dataclasses.replace(adapter, biases={})"),
        "tokens": (of(adapter.tokens), "trained rows of an embedding", "write PEFT's dialect"),
        "lora_bias": (of(p for p in u if u[p].bias is not None), "a bias in the update (lora_bias)", "write PEFT's dialect"),
        "dora": (of(p for p in u if u[p].magnitude is not None and u[p].kind != "embedding"), "DoRA's lengths",
                 "write PEFT's dialect, or merge the adapter into its model"),
        "dora of embeddings": (of(p for p in u if u[p].magnitude is not None and u[p].kind == "embedding"),
                               "DoRA's lengths of an embedding, one for each column", "write PEFT's dialect"),
        "embedding": (of(p for p in u if u[p].kind == "embedding"), "an update of an embedding", "write PEFT's dialect"),
        "convolution": (of(p for p in u if u[p].kind == "convolution"), "an update of a convolution", "write PEFT's dialect"),
    }
    lines = [f"{paths}: {dialect} has no place for {what}: {cure}"
             for name, (paths, what, cure) in found.items() if paths and name not in can]
    return lines + ([] if u else [f"the adapter has no update: {dialect} has nothing to say"])
