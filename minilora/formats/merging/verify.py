"""verify_files: whether a merged checkpoint is what a base and adapters give, computed again and compared bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...errors import ConfigError, FormatError
from ...shown import shown
from ..adapters.found import read_json
from ..placing.names import NameMapping
from .checkpoint import RECORD, open_checkpoint
from .plan import OUT
from .sinks import Compared
from .work import MEMORY, Merge

__all__ = ["VerifyReport", "verify_files"]


@shown
class VerifyReport(NamedTuple):
    """What `verify_files` found.

    Attributes
    ----------
    same : int
        How many tensors are as they should be.
    different : mapping of str to str
        By name, what is wrong with the others.
    recipe : str
        Rounding, seed and dtype that were computed with, and where they come from.
    """

    out: str
    same: int
    different: Mapping[str, str]
    recipe: str

    @property
    def sound(self) -> bool:
        """Whether all tensors are as they should be, and there are no others."""
        return not self.different

    def __str__(self) -> str:
        lines = [f"tensors that are as computed again, to the last bit: {self.same} ({self.recipe})"]
        lines += [f"differs: {name}: {what}" for name, what in self.different.items()]
        return "\n".join(lines)


def verify_files(out: str | os.PathLike[str], base: str | os.PathLike[str], adapters: Any, *, rounding: str | None = None,
                 seed: int | None = None, memory: int = MEMORY, force: bool = False, untie: bool | None = None,
                 mapping: NameMapping | None = None, progress: Callable[[str, int], Any] | None = None) -> VerifyReport:
    """Compute a merge again, row block by row block, and compare it with what was written.

    Parameters
    ----------
    out : path
        What `merge_files` wrote.
    base, adapters
        As in `merge_files`.
    rounding, seed, untie : optional
        As in `merge_files`; by default as its record beside `out` says, else nearest and not untied.
    memory, force, mapping, progress
        As in `merge_files`.

    Returns
    -------
    VerifyReport

    Raises
    ------
    FormatError, FileError, ConfigError
        If base or adapters cannot be read or do not fit, as in `merge_files`.

    Examples
    --------
    >>> import numpy
    >>> from minilora import formats, lora
    >>> W, A, B = numpy.eye(3, dtype="float32"), numpy.ones((1, 3), "float32"), numpy.ones((3, 1), "float32")
    >>> formats.save_state("model.safetensors", {"fc.weight": W})
    >>> adapter = formats.SavedAdapter({"fc": formats.Update("linear", A, B, s=0.3)}, lora.Config(r=1, target_modules=["fc"]))
    >>> merge = formats.merge_files("model.safetensors", adapter, "merged")
    >>> print(verify_files("merged", "model.safetensors", adapter))
    tensors that are as computed again, to the last bit: 1 (nearest, as the record beside it says)
    """
    there = open_checkpoint(out)
    if there.four_bits:
        raise FormatError(f"{there.path}: it is in 4 bits: what was merged and rounded to codes is not compared here. Verify "
                          "what --dequantize writes")
    record = read_json(there.folder / RECORD) if (there.folder / RECORD).is_file() else {}
    rounding = rounding or record.get("rounding", "nearest")
    seed = record.get("seed", 0) if seed is None else seed
    dtype = record.get("dtype")
    if dtype is not None and dtype not in OUT:
        raise ConfigError(f"{there.folder / RECORD}: dtype is {dtype!r}: the record was damaged")
    if untie is None:
        untie = any("tensor of its own now" in str(note) for note in record.get("notes", ()))
    work = Merge(base, adapters, memory=memory, dtype=dtype, force=force or bool(record.get("forced")), untie=untie,
                 mapping=mapping, rounding=rounding or "nearest", seed=seed or 0)
    shapes, dtypes = there.state.shapes, there.state.dtypes
    different: dict[str, str] = {}
    for piece in work.pieces:
        if piece.name not in shapes:
            different[piece.name] = "it is not there"
        elif (dtypes[piece.name], shapes[piece.name]) != (piece.dtype, piece.shape):
            different[piece.name] = f"{dtypes[piece.name]} {shapes[piece.name]}, expected {piece.dtype} {piece.shape}"
    wanted = {piece.name for piece in work.pieces}
    different.update({name: "neither the base nor the adapters have it" for name in shapes if name not in wanted})
    work.pieces = [piece for piece in work.pieces if piece.name not in different]
    sink = Compared(there.state)
    work.run(sink, None, progress, reports=False)
    for piece in work.pieces:
        if piece.name in sink.different:
            count = sink.different[piece.name]
            total = max(1, piece.nbytes // max(1, there.state[piece.name].itemsize))
            different[piece.name] = f"{count:,} of {total:,} numbers"
    files = {name: data for name, data in work.head.items() if data is not None and name.endswith(".safetensors")}
    for name, data in files.items():  # of a classifier of sentences, small
        path = there.folder / name
        if not path.is_file() or path.read_bytes() != data:
            different[name] = "it is another file" if path.is_file() else "it is not there"
    recipe = ", ".join(filter(None, (rounding, f"seed {seed}" if rounding == "stochastic" else "", dtype or "")))
    where = "as the record beside it says" if record else "there is no record beside it"
    return VerifyReport(str(there.path), len(work.pieces) - len(sink.different), different, f"{recipe}, {where}")
