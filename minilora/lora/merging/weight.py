"""The arithmetic of merging one weight, W' = round(W + D) with D = s B A, and the exact way back.

**Forward.** In float32 (float64 for a float64 weight) whatever the weight is stored in, and rounded once; in blocks of rows, so
that neither D nor a wide copy of W exists as a whole.

**Back.** W' - D, rounded, is W again for nearly all weights: rounding to nearest moves few of them, mostly by one unit in the
last place. The difference in units in the last place (`correction`) is stored, deflated. With it unmerging is exact for every
W that can be merged: the signs of zeros, subnormals, weights that D swallowed. Bits stored per weight, a Gaussian W of 1024 x
1024, r = 8:

    ||D|| / ||W||              1       1e-1    1e-2    1e-3    1e-4
    float32                    2.10    0.82    0.29    0.079   0.025
    float16                    2.00    0.60    0.17    0.038   0.014
    float16, stochastic        2.37    1.38    1.22    1.21    0.90

A copy costs 32 and 16. The worst case, an update that drowns the weight, costs a copy and one byte for each block.

The way back holds only if D comes out the same a second time, to the last bit: hence D is summed in a fixed order
(`arithmetic`). For 4096 x 4096 on two cores that takes about as long as the BLAS product at r = 8, twice as long at r = 16,
seven times as long at r = 64. The checksums, the report and the correction take longer than D: at r = 8 a merge takes 0.3 s,
about seven times as long as W + s B A alone in float32, a third of it in float16, where NumPy has no fast product; unmerging
takes 0.2 s.

**Rounding.** An update far smaller than the weight's last place is swallowed when W + D is rounded to nearest: in half
precision most of a small update is gone. The gain <W' - W, D> / <D, D> says how much of it arrived. For Gaussian D of
standard deviation sigma, in units in the last place, it is 1 - 2 exp(-2 pi^2 sigma^2) + ...: 0.9 at sigma = 0.39, 0.5 at
0.26, 0.01 at 0.14. Above the bound of 0.9 rounding adds noise, as quantising does; below it the update itself goes, within
one decade. Hence the refusal beyond 10 %, which is what changing lora_alpha from 16 to 14.4 does. Stochastic rounding, up or
down with the probabilities that make the mean W + D, keeps the gain at 1 for any size of update, at the price of noise.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy

from ...errors import StateError
from .arithmetic import blocks, bytes_of, rows_of_block, update_rows, wide_dtype
from .blockwise import merged_blocks, not_finite, unmerged_blocks
from .report import Sums, WeightReport
from .rounding import check_rounding

__all__ = ["Correction", "Merged", "changed", "digest", "merge_weight", "not_finite", "unmerge_weight"]

GAIN = 0.1  # how far from 1 the gain may be


class Correction(NamedTuple):
    """The way back from a merged weight, given the same update again.

    Attributes
    ----------
    data : bytes
        What W' - D lacks to be W, block by block.
    rows : int
        Rows of a block.
    shape : tuple of int
    dtype : str
    update, merged, original : bytes
        SHA-256 of the update, of W' and of W: nothing is restored from the wrong ones.
    """

    data: bytes
    rows: int
    shape: tuple[int, ...]
    dtype: str
    update: bytes
    merged: bytes
    original: bytes


class Merged(NamedTuple):
    """The merged weight, its way back and the report."""

    weight: numpy.ndarray
    correction: Correction
    report: WeightReport


def merge_weight(W: numpy.ndarray, update: Any, *, rounding: str = "nearest", seed: int = 0, stream: int = 0,
                 allow_lossy: bool = False) -> Merged:
    """W' = round(W + D) as a new array, with its exact way back and a report.

    Parameters
    ----------
    W : ndarray, shape (out, in)
        float16, bfloat16 (of ml_dtypes), float32 or float64, on the host.
    update : ndarray of shape (out, in), or tuple (A, B, s) or (A, B, s, kappa)
        D itself, or A (r, in), B (out, r) and the scaling: then D exists as one block of rows at a time. With kappa, (out, 1)
        or (1, in), W' = round(kappa W + s B A), which is DoRA's; see `layers.update`.
    rounding : {"nearest", "stochastic"}
    seed, stream : int
        In [0, 2^64). Stochastic rounding is a pure function of (seed, stream, position). Give each weight its own stream.
    allow_lossy : bool
        Accept a gain outside [0.9, 1.1].

    Returns
    -------
    Merged
        ``weight``, ``correction`` for `unmerge_weight`, and ``report``.

    Raises
    ------
    StateError
        If W' would hold NaN or inf, or if the gain is outside [0.9, 1.1].
    ShapeError, DTypeError, DeviceError, ConfigError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy
    >>> W = numpy.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
    >>> A, B = numpy.full((1, 4), 0.1, "float32"), numpy.ones((3, 1), "float32")
    >>> merged = merge_weight(W, (A, B, 2.0))
    >>> print(f"{merged.report.gain:.4f}")
    1.0000
    >>> unmerge_weight(merged.weight, (A, B, 2.0), merged.correction).tobytes() == W.tobytes()
    True
    """
    wide, dtype = wide_dtype("the weight", W), W.dtype.newbyteorder("=")
    check_rounding(rounding, seed, stream)
    rounding = "nearest" if dtype == wide else rounding
    out, sums = numpy.empty(W.shape, dtype), Sums()
    original, merged, data = hashlib.sha256(), hashlib.sha256(), []
    with numpy.errstate(all="ignore"):  # what overflows is found, and named
        D = update_rows(update, W.shape, wide)
        for block in merged_blocks(W, D, dtype, wide, rounding, int(seed), int(stream), sums):
            out[block.low:block.high] = block.after
            data.append(block.correction)
            original.update(bytes_of(block.before))
            merged.update(bytes_of(block.after))
        update_digest = D.fingerprint()
    packed = b"".join(data)
    report = sums.report(W.shape, dtype.name, rounding, 8 * len(packed) / max(1, W.size))
    if not allow_lossy and not abs(report.gain - 1.0) <= GAIN:
        raise _lossy(report)
    correction = Correction(packed, rows_of_block(W.shape), W.shape, dtype.name, update_digest, merged.digest(),
                            original.digest())
    return Merged(out, correction, report)


def unmerge_weight(weight: numpy.ndarray, update: Any, correction: Correction) -> numpy.ndarray:
    """The W that `merge_weight` was given, bit for bit, as a new array.

    Parameters
    ----------
    weight : ndarray, shape (out, in)
        The merged weight.
    update : ndarray, or tuple (A, B, s)
        As it was merged.
    correction : Correction

    Raises
    ------
    StateError
        If the weight, the update or the correction is not the one of that merge.
    """
    wide, dtype = wide_dtype("the weight", weight), weight.dtype.newbyteorder("=")
    if (weight.shape, dtype.name) != (correction.shape, correction.dtype):
        raise StateError(f"unmerge: expected the weight that was merged, {correction.dtype} {correction.shape}, got "
                         f"{weight.dtype} {weight.shape}")
    out, data = numpy.empty(weight.shape, dtype), memoryview(correction.data)
    original, merged = hashlib.sha256(), hashlib.sha256()
    with numpy.errstate(all="ignore"):
        D = update_rows(update, weight.shape, wide)
        if D.fingerprint() != correction.update:
            raise StateError("unmerge: this update is not the one that was merged: A, B or the scaling has changed since")
        for block in unmerged_blocks(weight, D, dtype, wide, correction.rows, data):
            out[block.low:block.high] = block.before
            merged.update(bytes_of(block.after))
            original.update(bytes_of(block.before))
    if merged.digest() != correction.merged:
        raise changed("weight")
    if original.digest() != correction.original:
        raise StateError("unmerge: the original did not come out, although weight and update are those of the merge: either "
                         "the correction is damaged, or this process flushes subnormal numbers to zero (some libraries switch "
                         "that on when they are loaded)")
    return out


def changed(what: str) -> StateError:
    """The error for a merged weight or bias that somebody trained or wrote to: unmerging would throw that away."""
    return StateError(f"unmerge: the merged {what} was changed since it was merged, so that the original cannot be computed "
                      "from it. To keep it as it is now, without adapters: lora.bake(model)")


def digest(weight: numpy.ndarray) -> bytes:
    """SHA-256 of a weight, in blocks: a copy only of a block, and only of an array that is not contiguous."""
    found = hashlib.sha256()
    for low, high in blocks(weight.shape, rows_of_block(weight.shape)):
        found.update(bytes_of(numpy.ascontiguousarray(weight[low:high])))
    return found.digest()


def _lossy(report: WeightReport) -> StateError:
    text = (f"merge: rounded to {report.dtype}, {report.gain:.1%} of the update would arrive in the weight (gain "
            f"<W' - W, D> / <D, D>; ||D|| / ||W|| = {report.ratio:.1e}; {report.unmoved:.1%} of the weights would not move). ")
    cures = ["leave the update beside the weight", "or accept the loss with allow_lossy=True"]
    if report.dtype != "float64":
        cures.insert(0, "convert the layer with .to(dtype='float32')" if report.dtype != "float32" else ".to(dtype='float64')")
    if report.rounding == "nearest" and report.dtype in ("float16", "bfloat16"):
        cures.insert(0, "rounding='stochastic' keeps it on average")
    return StateError(f"{text}Cures: {'; '.join(cures)}. Nothing was changed")
