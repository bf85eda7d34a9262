"""A checkpoint's folder in 4 bits, from the unquantised one, and back: file to file, no model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...quant.model import linear_layers
from .held import linear_weights, module_of, skipped, usual
from .outline import outline
from .writing import family_of

__all__ = ["dequantize_files", "quantize_files"]


def quantize_files(base: str | os.PathLike[str], out: str | os.PathLike[str], kind: str = "nf4", *, double: bool = True,
                   blocksize: int = 64, exclude: Sequence[str] = (), overwrite: bool = False, dry_run: bool = False,
                   progress: Callable[[str, int], Any] | None = None) -> Any:
    """Write the folder of a model anew with its linear layers in 4 bits, as bitsandbytes lays them out.

    Parameters
    ----------
    base : path
        A folder that `load` reads: config.json and safetensors.
    out : path
        A folder that is not there yet, or with `overwrite` one to be replaced when the new one is whole.
    kind : {"nf4", "fp4"}
    double : bool
        Hold the scales in 8 bits: 4.13 bits a weight in place of 4.5.
    blocksize : int
        Weights that share a scale; bitsandbytes' own is 64.
    exclude : sequence of str
        Layers to leave as they are, besides output heads; as in `minilora.quant.quantize`.
    overwrite, dry_run : bool
        Replace `out`; or compute everything, for the report, and write nothing.
    progress : callable, optional
        Called with the name and the bytes of each weight that is done.

    Returns
    -------
    QuantisedReport
        Bits a weight and relative error, by group of layers. Printed as a table.

    Raises
    ------
    FormatError, FileError, ConfigError
        If the base cannot be read, is quantised already, or `out` cannot be written.
    StateError
        If a number is not finite. Nothing is written then.

    Notes
    -----
    What else lies in the folder, a tokenizer, is copied byte for byte. Needs memory for a block of rows and the codes of the
    weight in work, not for a model. The codes are those that `quantize` gives in memory.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=64, n_layer=1, n_head=2)
    >>> minilora.models.save(minilora.nn.GPT2(config, rng=0), "base64")
    >>> report = quantize_files("base64", "base64_nf4")
    >>> len(report.rows), minilora.models.load("base64_nf4").h[0].attn.c_attn.weight.data.kind
    (4, 'nf4')
    """
    from ...formats.merging.checkpoint import open_checkpoint
    from ...formats.quantised.making import Making

    made = outline(base)
    checkpoint = open_checkpoint(_folder_of(base, made))
    family, head = family_of(made.model)
    chosen = linear_layers(made.model, kind, exclude)[0] if not checkpoint.quantised() else {}
    every = linear_weights(made.model)
    name = {path: module_of(path, family, head) for path in every}
    there = [name[path] for path in every if path in chosen]
    left = [name[path] for path in every if path not in chosen]
    making = Making(checkpoint, [made.taken[path] for path in chosen], kind, double, blocksize=blocksize,
                    skip=skipped(left, there, usual(made.model, family, head)), turned=family.transposed)
    return making.write(out, overwrite, dry_run, progress)


def dequantize_files(base: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str = "bfloat16", *,
                     overwrite: bool = False, dry_run: bool = False,
                     progress: Callable[[str, int], Any] | None = None) -> Any:
    """Write a folder in 4 bits anew with all its numbers in floating point: what they are now, not what they once were.

    Parameters
    ----------
    base, out : path
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Of all that is written. In float32 every number is exactly what is computed with in 4 bits.
    overwrite, dry_run, progress
        As in `quantize_files`.

    Returns
    -------
    FilesReport

    Raises
    ------
    FormatError, FileError, ConfigError
        If the base cannot be read, is not in 4 bits, or `out` cannot be written.
    """
    from ...formats.merging.work import Merge, written

    work = Merge(base, None, dequantize=dtype)
    return written(work, out, False, overwrite, dry_run, progress)


def _folder_of(base: Any, made: Any) -> Path:
    """The folder that is copied: the whole one, where its weights lie in it."""
    given = Path(os.fsdecode(base))
    if made.file.path.parent.resolve() != given.resolve():
        raise FormatError(f"{given}: its weights lie in {made.file.path.parent}: give that folder")
    return given
