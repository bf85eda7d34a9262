"""The files of a base in 4 bits, made from its files in floating-point numbers, weight by weight.

The header of a file stands before its numbers, and says where each begins; the words of a weight, which are a tensor too, have
the mean of its scales in them, with as many digits as it has. So the codes go to a file beside at first, and the file itself is
put together when all is known. Memory: of a weight in work its codes (half a byte a number) and a block, of all weights their
scales (an eighth of a bit to half a bit a number).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from ...errors import FormatError, MiniloraError
from ...lora.merging.arithmetic import blocks
from ...parallel import cores, spread_out
from ...quant.codes import check_kind
from ...quant.four_bit import FourBit
from ..merging.checkpoint import Checkpoint
from ..merging.places import DROPPED, check_out, check_room
from ..merging.sinks import STEP, copy_range
from ..tensors.durable import replace_folder
from ..tensors.dtypes import file_dtype
from ..tensors.reading import Part
from ..tensors.writing import header_bytes, in_file_order
from .layout import file_tensors
from .report import QuantisedReport, QuantisedRow
from .settings import FIELD, Settings

__all__ = ["Making"]

BLOCK = 1 << 17  # numbers compared together
FLOATS = ("F16", "BF16", "F32", "F64")


class Source(NamedTuple):
    """Where the bytes of a tensor are: in a file of the base, in the file of codes, or in memory."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    part: Part | None = None
    begin: int = 0
    array: Any = None


class Making:
    """What is to be made.

    Parameters
    ----------
    base : Checkpoint
    names : sequence of str
        The weights to hold in 4 bits, as the base's files call them.
    kind : {"nf4", "fp4"}
    double : bool
        Hold the scales in 8 bits.
    skip : tuple of str or None
        ``llm_int8_skip_modules``: what transformers must be told of the modules that are left.
    turned : tuple of str
        Endings of the names of weights that lie as (in, out).
    compute : str

    Raises
    ------
    FormatError, ConfigError
        If a weight is no matrix of floating-point numbers, or there is none.
    """

    def __init__(self, base: Checkpoint, names: Sequence[str], kind: str = "nf4", double: bool = True, *,
                 skip: tuple[str, ...] | None = None, turned: tuple[str, ...] = (), blocksize: int = 64,
                 compute: str = "float32") -> None:
        check_kind(kind, blocksize)
        self.base, self.kind, self.double, self.turned, self.blocksize = base, kind, double, turned, blocksize
        self.settings = Settings(kind, double, skip, compute)
        self.names = dict.fromkeys(names)
        if base.quantised():
            raise FormatError(f"{base.path}: it is quantised already ({base.quantised()}): take the checkpoint that it was "
                              "made from; one in 4 bits is decoded by minilora quantize --dequantize")
        shapes, dtypes = base.state.shapes, base.state.dtypes
        wrong = [f"{name}: {'it is not there' if name not in shapes else f'{dtypes[name]} {shapes[name]}'}" for name in names
                 if name not in shapes or len(shapes[name]) != 2 or 0 in shapes[name] or dtypes[name] not in FLOATS]
        if wrong or not names:
            raise FormatError("\n  ".join([f"{base.path}: expected matrices of floating-point numbers to hold in 4 bits:",
                                           *(wrong[:12] or ["there is none"])]))
        if base.config is None:
            raise FormatError(f"{base.path}: without a config.json beside it nothing would say that the weights are in 4 bits")

    def write(self, out: str | os.PathLike[str], overwrite: bool = False, dry_run: bool = False,
              progress: Callable[[str, int], Any] | None = None, check: Callable[[Path], Any] | None = None) -> QuantisedReport:
        """Make the folder; `check` is called with it before it takes its place, and may raise.

        Raises
        ------
        FileError
            If it cannot be written; or is, holds or lies in what it is made from.
        StateError
            If a number is not finite.
        """
        begun = time.perf_counter()
        target = check_out(out, [self.base.path], overwrite or dry_run)
        others = self.base.beside()
        if not dry_run:
            size = sum(len(part.data) for part in self.base.state.parts)
            check_room(target, size // 2 + sum(path.stat().st_size for path in others.copied.values()))
        rows: list[QuantisedRow] = []
        checked: Any = ()
        nbytes = 0
        if dry_run:
            for part in self.base.state.parts:
                rows += self._encoded(part, None, progress)[1]
        else:
            with replace_folder(target, drop=DROPPED) as folder:
                where: dict[str, str] = {}
                total = 0
                for part in self.base.state.parts:
                    sources, made = self._file(folder, part, progress)
                    rows += made
                    where.update(dict.fromkeys(sources, part.path.name))
                    total += sum(source.nbytes for source in sources.values())
                    nbytes += (folder / part.path.name).stat().st_size
                self._texts(folder, others.copied, where, total)
                checked = check(folder) if check is not None else ()
        before = sum(len(part.data) for part in self.base.state.parts)
        notes = (f"left where they are: {', '.join(others.left[:8])}{' ...' * (len(others.left) > 8)}",) if others.left else ()
        return QuantisedReport(str(self.base.path), str(target), self.kind, self.double, tuple(rows),
                               len(self.base.state) - len(rows), before, nbytes, notes,
                               round(time.perf_counter() - begun, 3), tuple(checked))

    def _file(self, folder: Path, part: Part, progress: Any) -> tuple[dict[str, Source], list[QuantisedRow]]:
        """One file of the base, with its weights in 4 bits."""
        scratch = folder / ".codes"
        with open(scratch, "w+b") as codes, open(part.path, "rb") as old, open(folder / part.path.name, "xb") as new:
            sources, rows = self._encoded(part, codes.fileno(), progress)
            described = {name: (source.dtype, source.shape, source.nbytes) for name, source in sources.items()}
            new.write(header_bytes(part.path.name, described, part.header.metadata))
            new.flush()
            at = new.tell()
            for name, source in sources.items():
                if source.array is not None:
                    _write(new.fileno(), numpy.ascontiguousarray(source.array).reshape(-1).view("uint8"), at)
                elif source.part is not None:
                    begin = part.header.start + source.begin
                    copy_range(old.fileno(), part.data, begin, new.fileno(), at, source.nbytes)
                else:
                    _copy(codes, source.begin, new.fileno(), at, source.nbytes)
                at += source.nbytes
        scratch.unlink()
        return sources, rows

    def _encoded(self, part: Part, codes: int | None, progress: Any) -> tuple[dict[str, Source], list[QuantisedRow]]:
        """The tensors of the new file, in its order; the codes are in the file `codes`."""
        sources: dict[str, Source] = {}
        rows: dict[str, QuantisedRow] = {}
        begins, at = {}, 0
        for name, (dtype, shape, begin, end) in part.header.entries.items():
            if name in self.names:
                begins[name], at = at, at + -(-math.prod(shape) // 2)
            else:
                sources[name] = Source(dtype, shape, end - begin, part, begin)
        lock = threading.Lock()

        def encode(name: str) -> None:
            tensors, row = self._weight(name)
            data = tensors[name]
            if codes is not None:
                _write(codes, data, begins[name])
            made = {name: Source("U8", data.shape, data.nbytes, None, begins[name])}
            for tail, array in tensors.items():
                made.setdefault(tail, Source(file_dtype(array.dtype) or "", array.shape, array.nbytes, None, 0, array))
            with lock:
                sources.update(made)
                rows[name] = row
                if progress is not None:
                    progress(name, row.before)
            self.base.state.let_go(name, 0, row.before)

        spread_out(encode, sorted(begins, key=lambda name: -math.prod(self.base.state.shapes[name])), cores())
        ordered = dict(sorted(sources.items(), key=lambda item: in_file_order(item[0], item[1].dtype)))
        return ordered, [rows[name] for name in begins]

    def _weight(self, name: str) -> tuple[dict[str, Any], QuantisedRow]:
        W = self.base.state[name]
        before = W.nbytes
        W = W.T if name.endswith(self.turned) else W
        try:
            four = FourBit.of(W, self.kind, self.blocksize, double=self.double)
        except MiniloraError as error:
            raise type(error)(f"{name}: {error}") from error
        tensors = file_tensors(name, four, W.dtype.name)
        wrong = whole = 0.0
        for low, high in blocks(W.shape, max(1, BLOCK // W.shape[1])):
            w = W[low:high].astype("float32")
            d = four.rows(low, high).astype("float32") - w
            wrong, whole = wrong + float(numpy.vdot(d, d)), whole + float(numpy.vdot(w, w))
        size = sum(array.nbytes for array in tensors.values())
        return tensors, QuantisedRow(name, W.shape, before, size, four.nbytes, wrong, whole)

    def _texts(self, folder: Path, others: dict[str, Path], where: dict[str, str], total: int) -> None:
        """What lies around the weights: as it is, but for config.json and the index."""
        for name, path in others.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name != "config.json":
                shutil.copyfile(path, target)
        said = json.loads((self.base.folder / "config.json").read_bytes().decode("utf-8-sig"))
        _write_json(folder / "config.json", {**said, FIELD: self.settings.fields()})
        if self.base.indexed:
            index = json.loads(self.base.main.read_bytes())
            metadata = index.get("metadata") if isinstance(index.get("metadata"), dict) else {}
            _write_json(folder / self.base.main.name, {
                **index, "metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(where.items()))})


def _write_json(path: Path, said: Any) -> None:
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write(descriptor: int, array: numpy.ndarray, at: int) -> None:
    view: memoryview = numpy.ascontiguousarray(array).reshape(-1).data
    while len(view):
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def _copy(codes: Any, begin: int, target: int, at: int, count: int) -> None:
    """Bytes of the file of codes into another."""
    while count:
        piece = os.pread(codes.fileno(), min(STEP, count), begin)
        _write(target, numpy.frombuffer(piece, "uint8"), at)
        begin, at, count = begin + len(piece), at + len(piece), count - len(piece)
