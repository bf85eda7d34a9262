"""metrics.jsonl: a row for each report and each evaluation, one step in each row, in order."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FileError
from ..formats.tensors.durable import replace_file
from ..formats.tensors.faults import file_error
from .beside import Beside
from .memory import peak_bytes
from .run import Run, Update

__all__ = ["NAME", "Metrics", "plain", "rows_of"]

NAME = "metrics.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, without what a killed run left unfinished at its end, or what is no row; none without a file."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class Metrics(Beside):
    """Adds a row to metrics.jsonl where a report is due, or an evaluation was made.

    A row is in the file, though not on the disk, when the step ends: a run that is killed loses none. It is on the disk before
    a checkpoint is saved. A run that goes on from a checkpoint begins with the rows up to its step: those that the killed run
    wrote beyond it are made again, so that no row is there twice and none is of another past. Where the disk is full, the run
    goes on, and rows wait for room; it fails in the end if there is none then.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.file: BinaryIO | None = None
        self.waiting = b""  # rows for which the disk had no room
        self.evaluations, self.tokens, self.seconds = 0, 0, 0.0

    def begin(self, run: Run) -> None:
        kept = [row for row in rows_of(self.path) if row["step"] <= run.step]
        with replace_file(self.path) as file:
            file.writelines(line_of(row) for row in kept)
        self.file = open(self.path, "ab", buffering=0)
        self.evaluations, self.tokens, self.seconds = len(run.evaluations), run.tokens, run.seconds

    def after_step(self, run: Run, made: Update) -> None:
        new = run.evaluations[self.evaluations:]
        if self.file is None or (made.mean is None and not new):
            return
        self.waiting += line_of(self._row(run, made, new))
        try:
            self._write(self.file, run.due(run.settings.save_every or run.settings.steps_per_eval))
        except FileError as error:
            warnings.warn(f"{error}. The run goes on, and these rows are written when there is room", RuntimeWarning,
                          stacklevel=4)
        self.evaluations, self.tokens, self.seconds = len(run.evaluations), run.tokens, run.seconds

    def _row(self, run: Run, made: Update, new: list[Any]) -> dict[str, Any]:
        row = {"step": run.step, "tokens": run.tokens, "loss": made.mean, "learning_rate": made.rate,
               "gradient_norm": made.norm, "tokens_per_second": speed(run, self.tokens, self.seconds),
               "peak_bytes": peak_bytes(run.model)}
        if run.scaling is not None:
            row.update(loss_scale=made.scale, skipped=run.scaling.skipped)
        for found in new:
            row.update(valid_loss=found.loss)
            row.update({f"valid_{name}": value for name in ("accuracy", "perplexity")
                        if (value := getattr(found, name)) is not None})
        return row

    def _write(self, file: BinaryIO, durable: bool) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[file.write(self.waiting):]
            if durable:
                os.fsync(file.fileno())
        except OSError as error:
            raise file_error(error, self.path, "write") from error

    def end(self, run: Run) -> None:
        if self.file is not None:
            with self.file:
                self._write(self.file, durable=True)


def speed(run: Run, tokens: int, seconds: float) -> float:
    """Tokens a second since so many tokens and seconds; evaluations and saving do not count."""
    return (run.tokens - tokens) / max(run.seconds - seconds, 1e-9)


def line_of(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON."""
    return (json.dumps(plain(row), allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """The same with nothing but what JSON knows: what is not finite is null, paths are text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
