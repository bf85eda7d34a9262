"""A 4-bit weight as tensors of a file, and back: bitsandbytes' layout.

    fc.weight                                       U8   (ceil(n / 2), 1)     the codes, two in a byte
    fc.weight.absmax                                F32  (blocks,)            the blocks' scales; U8 if they are nested
    fc.weight.quant_map                             F32  (16,)                what the codes stand for
    fc.weight.nested_absmax                         F32  (ceil(blocks / 256),)
    fc.weight.nested_quant_map                      F32  (256,)               what the codes of the scales stand for
    fc.weight.quant_state.bitsandbytes__nf4         U8   (bytes,)             JSON, see `state`

n = out in, and blocks = ceil(n / blocksize). The codes are those of the weight as (out, in), also where the unquantised file
has it as (in, out), as GPT-2's. The two maps are the same in every file. They are compared, and not taken: other numbers
there would mean another code, which nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from ... import backend
from ...errors import FormatError
from ...quant.codes import KINDS, dynamic_map
from ...quant.four_bit import FourBit
from ...quant.scales import GROUP
from .state import DTYPES, State, read_state, state_bytes

__all__ = ["ENDINGS", "STATE", "check_numbers", "check_weight", "file_tensors", "four_bit", "owner_of"]

Array = Any

STATE = ".quant_state.bitsandbytes__"
ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(f"{STATE}{kind}" for kind in KINDS))
NEAR = 1e-6  # versions of PyTorch space the numbers of the maps differently in the last bit


def owner_of(name: str) -> str | None:
    """The weight that a tensor is a part of by its name; None of one that is a tensor by itself."""
    for ending in ENDINGS:
        if name.endswith(f".weight{ending}"):
            return name.removesuffix(ending)
    head, sign, _ = name.partition(f".weight{STATE}")
    return f"{head}.weight" if sign else None


def file_tensors(name: str, weight: FourBit, dtype: str | None = None) -> dict[str, Array]:
    """The tensors of a weight under their names; arrays of its device, not copied.

    Parameters
    ----------
    name : str
    weight : FourBit
    dtype : str, optional
        What the weight was before; by default that in which it computes.
    """
    dtype = weight.dtype.name if dtype is None else dtype
    offset = float(backend.to_host(weight.nested_offset)) if weight.double else None
    state = State(weight.kind, weight.blocksize, dtype if dtype in DTYPES else "float32",
                  (weight.shape[0], weight.shape[1]), offset)
    tensors = {name: weight.codes.reshape(-1, 1), f"{name}.absmax": weight.absmax, f"{name}.quant_map": KINDS[weight.kind]}
    if weight.double:
        tensors |= {f"{name}.nested_absmax": weight.nested_absmax, f"{name}.nested_quant_map": dynamic_map()}
    return {**tensors, f"{name}{STATE}{weight.kind}": state_bytes(state)}


def check_weight(file: Any, name: str, kind: str) -> State:
    """What a weight is, once its tensors are those that a weight of this kind has: their names, shapes, dtypes, words and maps.

    Parameters
    ----------
    file : StateFile
    name : str
        Of the codes.
    kind : str
        What config.json says.

    Raises
    ------
    FormatError
        With everything that is wrong.
    """
    there = sorted(part for part in file.shapes if part.startswith(f"{name}{STATE}"))
    if len(there) != 1:
        raise FormatError(f"expected one tensor {STATE}nf4 or {STATE}fp4 that says how it is quantised, found "
                          f"{', '.join(part.removeprefix(name) for part in there)[:200] or 'none'}: the file is incomplete, or "
                          "another program wrote it")
    (part,), problems = there, []
    if file.dtypes[part] != "U8" or len(file.shapes[part]) != 1:
        raise FormatError(f"{part.removeprefix(name)}: expected U8 (bytes,), got {file.dtypes[part]} {file.shapes[part]}")
    try:
        state = read_state(file[part].tobytes() if file.shapes[part][0] <= 1 << 16 else b" " * (1 << 16))
    except FormatError as error:
        raise FormatError(f"{part.removeprefix(name)}: {error}") from error
    ending = part.removeprefix(f"{name}{STATE}")
    if ending != state.kind:
        problems.append(f"the name says {ending!r:.40}, and quant_type {state.kind!r}")
    elif state.kind != kind:
        problems.append(f"it is {state.kind}, and config.json says bnb_4bit_quant_type {kind!r}: set it to "
                        f"{state.kind!r} there")
    wanted = _wanted(state)
    for tail, (dtype, shape) in wanted.items():
        if name + tail not in file:
            problems.append(f"{tail or 'the tensor of the codes'} is missing")
        elif (file.dtypes[name + tail], file.shapes[name + tail]) != (dtype, shape):
            problems.append(f"{tail or 'the codes'}: expected {dtype} {shape}, got {file.dtypes[name + tail]} "
                            f"{file.shapes[name + tail]}")
    problems += [f"{tail} is there, and the scales are not nested" for tail in (".nested_absmax", ".nested_quant_map")
                 if tail not in wanted and name + tail in file]
    if not problems:
        maps = {".quant_map": KINDS[state.kind], ".nested_quant_map": dynamic_map()}
        problems += [f"{tail} is not the map of {what}: another code, which is not computed here"
                     for tail, what in ((".quant_map", state.kind), (".nested_quant_map", "8-bit scales"))
                     if tail in wanted and not _same_map(file[name + tail], maps[tail])]
    if problems:
        raise FormatError("; ".join(problems))
    return state


def _wanted(state: State) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a weight by their endings, with dtype and shape."""
    blocks = -(-state.size // state.blocksize)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("U8", (-(-state.size // 2), 1)), ".absmax": ("U8" if state.nested else "F32", (blocks,)),
        ".quant_map": ("F32", (16,))}
    if state.nested:
        wanted |= {".nested_absmax": ("F32", (-(-blocks // GROUP),)), ".nested_quant_map": ("F32", (256,))}
    return wanted


def _same_map(there: Array, known: Array) -> bool:
    return bool((numpy.abs(there - known) <= NEAR * numpy.abs(known)).all())


def check_numbers(file: Mapping[str, Any], name: str, state: State) -> list[str]:
    """What is wrong with the scales of a weight: they are read for it, 8 numbers or fewer for 512 weights."""
    tail = ".nested_absmax" if state.nested else ".absmax"
    scales = file[name + tail]
    with numpy.errstate(invalid="ignore"):
        largest, least = scales.max(initial=0.0), scales.min(initial=0.0)
    if not (numpy.isfinite(largest) and numpy.isfinite(least)):
        return [f"{tail} holds NaN or inf: the file is damaged"]
    if least < 0:
        return [f"{tail} holds a negative scale, {least:g}: the file is damaged"]
    if state.nested and not abs(state.offset or 0.0) + float(largest) <= float(numpy.finfo("float32").max):
        return [f"{tail} and nested_offset together are beyond float32: the file is damaged"]
    return []


def four_bit(file: Mapping[str, Any], name: str, state: State) -> FourBit:
    """The weight: its arrays lie in the file."""
    nested = (file[f"{name}.nested_absmax"], numpy.array(state.offset, "float32")) if state.nested else ()
    # BLAS is not concerned, but NumPy copies scales that are not aligned each time that they are used
    arrays = [numpy.require(array, requirements="A") for array in (file[name].reshape(-1), file[f"{name}.absmax"], *nested)]
    return FourBit(state.shape, *arrays, kind=state.kind, blocksize=state.blocksize)
