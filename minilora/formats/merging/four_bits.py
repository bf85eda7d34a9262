"""Merging into a base in 4 bits: what would be left of an update there, and the refusal that says so.

The 16 codes of a block lie far apart: an update that is small beside the weights moves few of them to another code, and those
by a whole step. What arrives along the update, the gain <Q(W + D) - W, D> / <D, D>, is 0.8 at |D| / |W| = 0.1, 0.05 at 0.03
and 0.02 at 0.01: the adapter would be gone. So the sum is written in the dtype that the caller names, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy

from ...errors import StateError
from ...flags import option
from ...lora.merging.arithmetic import blocks, rows_of_block
from ...lora.merging.report import Sums, WeightReport
from ...lora.merging.weight import GAIN
from ...quant.four_bit import FourBit
from ...stored import dense
from ..quantised.making import Making
from .checkpoint import Checkpoint, open_checkpoint
from .places import check_out
from .report import FilesReport
from .site import Site
from .work import Merge, written

__all__ = ["arrives", "refusal", "requantised", "sampled_gain"]

SITES = 8  # weights of a sample
NUMBERS = 1 << 17  # of each of them
LEAST = 1.0 - GAIN  # of an update that must arrive


def refusal(work: Merge) -> StateError:
    """The error for a merge into a base in 4 bits, with the gain and the lines that work."""
    gain, ratio, count = sampled_gain(work)
    kind = work.base.settings.kind
    said = [f"merge into {work.base.path}: it is in 4 bits ({kind}). Written back in them, {gain:.1%} of the update would "
            f"arrive (gain <W' - W, D> / <D, D> on a sample of {count:,} numbers, ||D|| / ||W|| = {ratio:.1e}; at least "
            f"{LEAST:.0%} are asked for). Nothing was written.",
            "to write the merged base without loss of that: "
            + option("merge_files(..., dequantize='bfloat16')", "minilora merge ... --dequantize bfloat16"),
            "    (float32 keeps the update to the last digits)",
            "or leave the adapter beside the base, where it costs nothing but r (in + out) numbers a layer"]
    if gain >= LEAST:
        said.insert(1, "the update is large enough for 4 bits: "
                    + option("merge_files(..., requantize=True)", "--requantize"))
    return StateError("\n  ".join(said))


def sampled_gain(work: Merge) -> tuple[float, float, int]:
    """Gain and |D| / |W| of writing back in 4 bits, on the first rows of some weights; and how many numbers these are."""
    state = work.base.state
    sites = [site for site in work.fitting.sites.values() if site.parts and site.source in state.states]
    chosen = sites[::max(1, -(-len(sites) // SITES))]
    sums, count = Sums(), 0
    with numpy.errstate(all="ignore"):
        for site in chosen:
            count += _sample(work.base, site, sums)
    report = sums.report((count, 1), "", "", 0.0)
    return report.gain, report.ratio, count


def _sample(base: Checkpoint, site: Site, sums: Sums) -> int:
    """The first rows of a weight, with its update, in 4 bits again."""
    W, held = base.state[site.source], base.state.states[site.source]
    D = site.rows(W.shape, "float32", site.factors(base.state))
    high = min(len(W), max(1, NUMBERS // W.shape[1]))
    w, d = W[:high], D.rows(0, high)
    x = D.onto(w, d, 0, high)
    if site.turned:  # blocks go along the rows of the weight as (out, in)
        q = FourBit.of(numpy.ascontiguousarray(x.T), held.kind, held.blocksize, double=held.nested).dense().T
    else:
        q = FourBit.of(x, held.kind, held.blocksize, double=held.nested).dense()
    sums.add(numpy.ascontiguousarray(w), numpy.ascontiguousarray(q), x - w)
    return int(w.size)


def requantised(work: Merge, out: str | os.PathLike[str], overwrite: bool = False, dry_run: bool = False,
                progress: Callable[[str, int], Any] | None = None) -> FilesReport:
    """Merge in float32, write that in 4 bits again, and keep it if nine tenths of every update have arrived.

    Raises
    ------
    ConfigError
        If the base is not in 4 bits.
    StateError
        If less has arrived: by a sample at first, and then by all numbers of every weight. Nothing is written then.
    """
    gain = sampled_gain(work)[0]
    if gain < LEAST:
        raise refusal(work)
    target = check_out(out, [work.base.path, *work.paths], overwrite or dry_run)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        report = written(work, Path(scratch) / "merged", False, progress=progress)
        names = list(work.base.state.states)
        double = any(state.nested for state in work.base.state.states.values())
        making = Making(open_checkpoint(Path(scratch) / "merged"), names, work.base.settings.kind, double,
                        skip=work.base.settings.skip, turned=work.base.state.turned)
        rows = making.write(target, overwrite, dry_run, check=lambda folder: arrives(work, folder))
    note = f"written in {work.base.settings.kind} again; the gains are of all numbers; what was not in 4 bits is in float32 now"
    return report._replace(out=str(target), rows=tuple(rows.checked), nbytes=rows.nbytes, dtype=None, dequantized=None,
                           copied=report.copied + report.converted, converted=0, notes=(*report.notes, note))


def arrives(work: Merge, folder: Path) -> list[WeightReport]:
    """The reports of what a folder in 4 bits holds of every update; `StateError` if less than nine tenths of one."""
    there, reports = open_checkpoint(folder), []
    for name, site in work.fitting.sites.items():
        if not site.parts or site.source not in work.base.state.states:
            continue
        W, Q = dense(work.base.state[site.source]), there.state[name]
        D, sums = site.rows(W.shape, "float32", site.factors(work.base.state)), Sums()
        Q = Q.dense() if site.turned else Q
        for low, high in blocks(W.shape, rows_of_block(W.shape)):
            d = D.rows(low, high)
            sums.add(W[low:high], numpy.ascontiguousarray(Q[low:high]), D.onto(W[low:high], d, low, high) - W[low:high])
        reports.append(sums.report(W.shape, work.base.settings.kind, "nearest", 0.0)._replace(path=name))
    worst = min(reports, key=lambda report: report.gain, default=None)
    if worst is not None and worst.gain < LEAST:
        raise StateError(f"{worst.path}: in 4 bits {worst.gain:.1%} of the update arrived, and at least {LEAST:.0%} are asked "
                         f"for; nothing was written. Take {option('dequantize=' + repr('bfloat16'), '--dequantize bfloat16')}")
    return reports
