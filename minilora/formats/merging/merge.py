"""merge_files: adapters into the files of a base."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ...errors import ConfigError
from ..placing.names import NameMapping
from .four_bits import refusal, requantised
from .report import FilesReport
from .work import MEMORY, Merge, written

__all__ = ["merge_files"]


def merge_files(base: str | os.PathLike[str], adapters: Any, out: str | os.PathLike[str], *, memory: int = MEMORY,
                dtype: Any = None, dequantize: Any = None, requantize: bool = False, rounding: str = "nearest", seed: int = 0,
                patch: bool = True, force: bool = False, untie: bool = False, overwrite: bool = False,
                mapping: NameMapping | None = None, dry_run: bool = False,
                progress: Callable[[str, int], Any] | None = None) -> FilesReport:
    """Merge adapters into the files of a base, W' = W + sum of w s B A, without a model, in memory that is bounded.

    Parameters
    ----------
    base : path
        A folder with config.json and safetensors files, one such file, or an index.
    adapters : path, SavedAdapter, sequence of (path or (path, weight)), or mapping of path to weight
        In any dialect. Their weighted updates are added up and rounded once.
    out : path
        A folder that is not there yet, or with `overwrite` one to be replaced when the new one is whole.
    memory : int
        A bound in bytes on the private memory of the work itself; Python and its libraries have theirs besides. Neither the
        result nor a bit of it depends on that.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Convert all tensors of floating-point numbers. By default each keeps its dtype, and the header of each file its bytes.
    dequantize : {"float16", "bfloat16", "float32", "float64"}, optional
        Of a base in 4 bits: decode its weights, and convert all tensors of floating-point numbers to this dtype. Without it
        such a base is refused, with what would be left of the update in 4 bits. There is no patch then: the base is one.
    requantize : bool
        Of a base in 4 bits: write the sum back in 4 bits, if at least nine tenths of every update arrive there. That is so
        for updates about as large as the weights, which are none of a usual fine-tuning.
    rounding : {"nearest", "stochastic"}
        Of merged tensors in half precision. Stochastic keeps small updates on average.
    seed : int
    patch : bool
        Write what `unmerge_files` needs beside the result.
    force : bool
        Merge adapters whose fingerprint says another base. It is written down.
    untie : bool
        Where an adapter changes only one side of a tied table: write a head of its own. Refused otherwise.
    overwrite, dry_run : bool
        Replace `out`; or compute everything, for the report, and write nothing.
    mapping : dict of str to str, or function, optional
        From the adapters' names to the base's, if they are not found, as in `load_adapter`.
    progress : callable, optional
        Called with the name and the bytes of each tensor that is done.

    Returns
    -------
    FilesReport

    Raises
    ------
    FormatError, FileError, ConfigError
        If something does not fit, in one message with all of it, before anything is written.
    StateError
        If a sum would not be finite, or the base is in 4 bits and `dequantize` is not given. Nothing has been written then.

    Examples
    --------
    >>> import numpy
    >>> from minilora import formats, lora
    >>> W, A, B = numpy.eye(3, dtype="float32"), numpy.ones((1, 3), "float32"), numpy.ones((3, 1), "float32")
    >>> formats.save_state("tiny.safetensors", {"fc.weight": W})
    >>> update = formats.Update("linear", A, B, s=0.5)
    >>> adapter = formats.SavedAdapter({"fc": update}, lora.Config(r=1, lora_alpha=0.5, target_modules=["fc"]))
    >>> report = merge_files("tiny.safetensors", adapter, "tiny_merged")
    >>> formats.load_state("tiny_merged/tiny.safetensors")["fc.weight"][0]
    array([1.5, 0.5, 0.5], dtype=float32)
    """
    if adapters is None:
        raise ConfigError("adapters: there is none to merge")
    work = Merge(base, adapters, memory=memory, dtype=dtype, rounding=rounding, seed=seed, force=force, untie=untie,
                 mapping=mapping, dequantize="float32" if requantize else dequantize)
    if work.base.four_bits and work.dequantized is None:
        raise refusal(work)
    if requantize:
        return requantised(work, out, overwrite, dry_run, progress)
    return written(work, out, patch, overwrite, dry_run, progress)
