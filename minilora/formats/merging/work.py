"""A merge that fits, computed and written: what `merge_files`, `verify_files` and the way to and from 4 bits share."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...lora.merging.rounding import check_rounding
from ...parallel import cores, spread_out
from ...settings import whole
from ..adapters.reading import read_adapter
from ..adapters.saved import SavedAdapter
from ..placing.names import NameMapping
from ..tensors.durable import replace_folder
from .checkpoint import PATCH, RECORD, Checkpoint, open_checkpoint
from .compute import Budget, Computing
from .fitting import Fitting
from .heads import files_of_head
from .patch import PatchWriter
from .places import DROPPED, check_out, check_room
from .plan import OUT, File, Piece, config_text, decoded_dtype, files_of, index_text
from .report import FilesReport
from .sinks import Files, Nowhere
from .site import Given

__all__ = ["MEMORY", "Merge", "given_adapters", "written"]

MEMORY = 512 << 20
PATCH_SHARE = 16  # of the size of the weights: what a patch takes at most, unless the updates are larger than the weights


def written(work: Merge, out: Any, patch: bool, overwrite: bool = False, dry_run: bool = False,
            progress: Callable[[str, int], Any] | None = None) -> FilesReport:
    """Compute a merge and write it."""
    begun = time.perf_counter()
    patch = patch and not work.base.four_bits
    target = check_out(out, [work.base.path, *work.paths], overwrite or dry_run)
    if dry_run:
        work.run(Nowhere(), None, progress)
        return work.report(target, 0, time.perf_counter() - begun)
    total = sum(file.size for file in work.files)
    others = work.base.beside()
    check_room(target, total + (total // PATCH_SHARE if patch else 0) + sum(p.stat().st_size for p in others.copied.values()))
    with replace_folder(target, drop=DROPPED) as folder:
        with ExitStack() as stack:
            files = stack.enter_context(Files(folder, work.files))
            writer = stack.enter_context(PatchWriter(folder / ".parts")) if patch else None
            work.run(files, writer, progress)
            work.write_texts(folder, writer, others.copied)
            patch_size = writer.finish(folder / PATCH) if writer is not None else 0
        report = work.report(target, patch_size, time.perf_counter() - begun, others.left)
        (folder / RECORD).write_text(work.record(report), encoding="utf-8")
    return report


class Merge:
    """A merge that fits: what is to be computed, for whatever takes it. Arguments as in `merge_files`; no adapters, None, to
    decode or convert a base."""

    def __init__(self, base: Any, adapters: Any, *, memory: int = MEMORY, dtype: Any = None, rounding: str = "nearest",
                 seed: int = 0, force: bool = False, untie: bool = False, mapping: NameMapping | None = None,
                 dequantize: Any = None) -> None:
        check_rounding(rounding, seed)
        self.rounding, self.seed = rounding, int(seed)
        self.budget = Budget(whole("memory", memory))
        self.base: Checkpoint = open_checkpoint(base)
        self.to = decoded_dtype(self.base, dtype, dequantize)
        self.dtype = next((name for name, word in OUT.items() if word == self.to), None)
        self.dequantized = None if dequantize is None else self.dtype
        self.given = [] if adapters is None else given_adapters(adapters, self.base)
        self.paths = [Path(given.label) for given in self.given if Path(given.label).exists()]
        self.fitting = Fitting(self.base, self.given, mapping=mapping, force=force, untie=untie)
        self.fitting.fit()
        self.head = files_of_head(self.fitting, self.to)
        self.fitting.refuse()
        self.files: list[File] = []
        self.pieces: list[Piece] = []
        if self.to is not None or not self.base.four_bits:  # else there is nothing that could be written
            self.files, self.pieces = files_of(self.base, self.fitting.sites, self.to)
        self.computing: Computing | None = None

    def run(self, sink: Any, patch: PatchWriter | None, progress: Any, reports: bool = True) -> None:
        """Compute all tensors, the largest first."""
        self.computing = Computing(self.base, sink, self.rounding, self.seed, self.budget, patch, progress, reports)
        self.computing.check(self.pieces)
        spread_out(self.computing, sorted(self.pieces, key=lambda piece: -piece.nbytes), cores())

    def write_texts(self, folder: Path, patch: PatchWriter | None, others: Mapping[str, Path]) -> None:
        """The files around the weights; those that change are kept in the patch as they were."""
        changed = {"config.json": config_text(self.base, self.fitting.changes, self.to),
                   self.base.main.name: index_text(self.base, self.pieces)}
        others = {name: path for name, path in others.items() if name not in self.head}
        self.write_head(folder, patch)
        if self.base.indexed:
            others[self.base.main.name] = self.base.main
        for name, path in others.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            text = changed.get(name)
            if text is None:
                shutil.copyfile(path, target)
                continue
            target.write_bytes(text)
            if patch is not None:
                patch.text(name, path.read_bytes())
        if patch is not None:
            for part, file in zip(self.base.state.parts, self.files):
                patch.header(file.name, file.header, bytes(part.data[:part.header.start]))

    def write_head(self, folder: Path, patch: PatchWriter | None) -> None:
        """The files that a classifier of sentences has besides; those of the base that they replace are kept in the patch."""
        for name, data in self.head.items():
            target, before = folder / name, self.base.folder / name
            if data is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            if patch is not None and before.is_file():
                patch.text(name, before.read_bytes())
            elif patch is not None:
                patch.added(name)

    def report(self, target: Path, patch_size: int, seconds: float, left: Iterable[str] = ()) -> FilesReport:
        """What was done."""
        assert self.computing is not None
        outcomes = [self.computing.outcomes[piece.name] for piece in self.pieces]
        notes = [note for given in self.given for note in (f"{given.label}: {text}" for text in given.saved.notes)]
        notes += self.fitting.notes
        left = list(left)
        if left:
            notes.append(f"left where they are: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
        notes += [f"{label} is of another base: {why}" for label, why in self.fitting.forced.items()]
        plain = [piece for piece in self.pieces if piece.site is None]
        return FilesReport(
            str(self.base.path), str(target), {given.label: given.weight for given in self.given}, self.dtype, self.rounding,
            self.seed, tuple(o.report for o in outcomes if o.report is not None),
            tuple(o.piece.name for o in outcomes if o.piece.site is not None and o.report is None),
            sum(piece.copied for piece in plain), sum(not piece.copied for piece in plain), sum(f.size for f in self.files),
            patch_size, self.fitting.fingerprints, self.fitting.forced, tuple(notes), round(seconds, 3), self.dequantized)

    def record(self, report: FilesReport) -> str:
        """What is written beside the result, for `verify_files` and for people: how it came about."""
        said = {name: value for name, value in report.as_dict().items() if name not in ("seconds", "out", "tensors")}
        return json.dumps({"schema": "minilora.merge_record/1", **said}, indent=2, sort_keys=True) + "\n"


def given_adapters(adapters: Any, base: Checkpoint) -> list[Given]:
    """The adapters with their weights, read."""
    if isinstance(adapters, (str, os.PathLike, SavedAdapter)):
        adapters = [adapters]
    pairs = list(adapters.items()) if isinstance(adapters, Mapping) else \
        [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    if not pairs:
        raise ConfigError("adapters: there is none to merge")
    given: list[Given] = []
    for source, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or not weight:
            raise ConfigError(f"adapters: the weight of {source} must be a finite number that is not 0, got {weight!r}")
        label = "a value" if isinstance(source, SavedAdapter) else os.fsdecode(source)
        same = sum(label == other.label.partition(" (")[0] for other in given)
        saved = source if isinstance(source, SavedAdapter) else _read(source, base)
        given.append(Given(f"{label} ({same + 1})" if same else label, float(weight), saved))
    return given


def _read(source: Any, base: Checkpoint) -> SavedAdapter:
    saved = read_adapter(source)
    if saved.dialect == "kohya":  # its names have lost their dots: the base's tell them
        modules = {name.rpartition(".")[0]: None for name in base.state if "." in name}
        saved = read_adapter(source, modules=list(modules))
    return saved
