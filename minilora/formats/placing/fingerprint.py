"""Which base an adapter belongs to: SHA-256 of the weights that it changes, in its file's metadata.

Shapes alone do not tell one base from another: an adapter of a model's second version loads onto the first without a word, and
answers badly. So a file that is written here says what it was trained beside, and loading compares.

    {"version": 1, "base": sha256 of the digests below, sorted: whatever the layers are called,
     "tensors": {path: {"sha256", "shape", "dtype"}}, "rule": "alpha / r", "s": {path: s}, "forced": why, if it ever was}

as JSON under the key `KEY` of the metadata, which other programs skip. The digest of a weight is that of its shape, the name of
the dtype below, and its numbers in C order, little-endian: a linear weight as (out, in) however it is stored; float16 and
bfloat16 widened to float32, so that a checkpoint in half precision and the same one loaded as float32 agree; float64 as it is.
What is rounded (a float32 base converted to float16) is another base, and is told with both dtypes.

It costs one SHA-256 over the float32 numbers of the weights that are adapted, and of no others: 0.4 GB a second on a busy AMD
EPYC, so 0.2 s for the queries, keys and values of a GPT-2 of 124 million. The numbers are read in blocks: no copy of a weight
is made, but on a GPU, where each is copied to the host in turn (a sync point).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy

from ... import backend, nn
from ...errors import FormatError
from ...lora.merging.arithmetic import bytes_of
from ...stored import Stored

__all__ = ["FORCED", "KEY", "Compared", "compare", "digest", "exact_scalings", "fingerprint", "forced_words", "hashed",
           "parsed", "worded"]

Array = Any

KEY = "minilora"
FORCED = "minilora.forced"  # beside it in an adapter's `origin`, until the adapter is saved
BLOCK = 1 << 18  # numbers hashed together: 1 MB of float32
CLOSE = 1e-9  # how far a scaling that went through a config may be from the exact one
UNKNOWN = "the file has none, so that nothing tells whether this is its base"


class Compared(NamedTuple):
    """What became of a fingerprint: in words, a line for every tensor or scaling that is another one, and what was forced."""

    words: str
    different: list[str]
    forced: str = ""  # of an earlier load


def canonical(layer: nn.Module) -> tuple[Array, str]:
    """The weight of a layer, as (out, in) if it is linear, and the name of the dtype that is hashed.

    On the host, but for one in low precision: that is decoded some rows at a time, and so has the digest of what it decodes to.
    """
    turned = getattr(layer, "W", None)
    weight: Array = (layer.weight if turned is None else turned).data  # type: ignore[attr-defined]
    weight = weight if isinstance(weight, Stored) else backend.to_host(weight)
    return weight, "float64" if weight.dtype == numpy.float64 else "float32"


def digest(layer: nn.Module) -> str:
    """SHA-256 of a layer's weight, as told at the top of this file."""
    return _described(layer)["sha256"]  # type: ignore[no-any-return]


def _described(layer: Any) -> dict[str, Any]:
    """What the file says of a layer's weight."""
    weight, name = canonical(layer)
    return {"sha256": hashed(weight, name), "shape": list(weight.shape), "dtype": layer.weight.dtype.name}


def hashed(weight: Array, name: str) -> str:
    """SHA-256 of an array on the host, or held in low precision, as told at the top of this file; `name`: the dtype to hash."""
    found = hashlib.sha256(f"{list(weight.shape)} {name} ".encode())
    rows = max(1, BLOCK // max(1, weight[:1].size)) if weight.ndim else 1
    for start in range(0, len(weight) if weight.ndim else 1, rows):
        part = backend.to_host(weight[start:start + rows] if weight.ndim else weight)
        found.update(bytes_of(numpy.ascontiguousarray(part, dtype=numpy.dtype(name).newbyteorder("<"))))
    return found.hexdigest()


def fingerprint(layers: Mapping[str, nn.Module], scalings: Mapping[str, float], use_rslora: bool, forced: str = "") -> str:
    """The text for the metadata: of layers by their paths in the file."""
    return worded({path: _described(layer) for path, layer in layers.items()}, scalings, use_rslora, forced)


def worded(tensors: Mapping[str, Any], scalings: Mapping[str, float], use_rslora: bool, forced: str = "") -> str:
    """The text for the metadata: of what is known of the weights already."""
    return json.dumps({"version": 1, "base": _total(each["sha256"] for each in tensors.values()), "tensors": tensors,
                       "rule": "alpha / sqrt r" if use_rslora else "alpha / r",
                       "s": {path: float(s) for path, s in scalings.items()},
                       **({"forced": forced} if forced else {})}, sort_keys=True)


def _total(digests: Any) -> str:
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def compare(metadata: Mapping[str, str], layers: Mapping[str, nn.Module], scalings: Mapping[str, float]) -> Compared:
    """The fingerprint of a file beside the layers of a model, both by the file's paths.

    Raises
    ------
    FormatError
        If what stands under `KEY` is no fingerprint.
    """
    if KEY not in metadata:
        return Compared(UNKNOWN, [])
    said = parsed(metadata)
    tensors, different = said["tensors"], []
    own = {path: _described(layer) for path, layer in layers.items()}
    known = {path: here for path, here in own.items() if path in tensors}
    for path, here in known.items():
        there = tensors[path]
        if here["sha256"] != there["sha256"]:
            kinds = [f"{each.get('dtype')} {each.get('shape')}" for each in (there, here)]
            told = "" if kinds[0] == kinds[1] else f" ({kinds[0]} there, {kinds[1]} here)"
            different.append(f"{path}.weight: not the one that the adapter was saved with{told}")
    if not known and _total(each["sha256"] for each in own.values()) != said["base"]:
        different.append(f"the {len(own)} weights that the adapter changes: not those that it was saved with")
    for path, s in scalings.items():
        exact = said["s"].get(path)
        if exact is not None and abs(s - exact) > CLOSE * abs(exact):
            different.append(f"{path}: s = {s:g} by the config, and {exact:g} when it was written: the config was changed")
    unknown = [path for path in own if known and path not in tensors]
    words = "the base is the one that it was saved with"
    if unknown:
        words += f"; nothing is said of {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}"
    forced = said["forced"] or ""
    return Compared(f"{words}; before that, {forced}" if forced else words, different, forced)


def exact_scalings(metadata: Mapping[str, str], scalings: Mapping[str, float]) -> dict[str, float]:
    """s of each layer to the last bit, where the fingerprint says it: a config says alpha, and alpha / r rounds."""
    exact = parsed(metadata)["s"] if KEY in metadata else {}
    return {path: exact[path] if abs(s - exact.get(path, s + 1)) <= CLOSE * abs(s) else s for path, s in scalings.items()}


def parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What stands under `KEY`, checked: it comes from a file."""
    try:
        said = json.loads(metadata[KEY])
        tensors, scalings, base, forced = said["tensors"], said["s"], said["base"], said.get("forced")
        sound = said["version"] == 1 and isinstance(base, str) and isinstance(forced, (str, type(None))) and \
            all(isinstance(each["sha256"], str) for each in tensors.values()) and \
            all(isinstance(s, float) and numpy.isfinite(s) for s in scalings.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise FormatError(f"the metadata {KEY!r} of the file is no fingerprint of version 1 that can be read: it was damaged, "
                          "or another program uses the name. Take it out of the file to load it without")
    return {"tensors": tensors, "s": scalings, "base": base, "forced": forced}


def forced_words(different: list[str]) -> str:
    """What is written down of a load that went against the fingerprint."""
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return f"it was loaded with force=True although: {'; '.join(different[:3])}{more}"
