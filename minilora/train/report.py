"""report.json and report.png: how a run went, for programs and for people."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..formats.tensors.durable import replace_file
from .beside import Beside
from .header import Header
from .memory import peak_bytes
from .metrics import NAME, plain, rows_of
from .run import Run

__all__ = ["Report", "draw"]

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"  # apart for eyes that see few colours, and in grey


class Report(Beside):
    """Writes both at the end, however the run ended: the picture where matplotlib is installed.

    Parameters
    ----------
    folder : Path
    header : Header
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header, self.began = folder, header, time.perf_counter()

    def end(self, run: Run) -> None:
        report = {
            "schema": "minilora.report/1", "status": run.status, "steps": run.step, "of": run.total, "tokens": run.tokens,
            "seconds": time.perf_counter() - self.began, "seconds_in_steps": run.seconds,
            "trained": self.header.trained, "total": self.header.total, "targets_of_an_epoch": self.header.targets,
            "predicted_bytes": self.header.bytes.total, "peak_bytes": peak_bytes(run.model),
            "losses": run.losses, "evaluations": [dataclasses.asdict(each) for each in run.evaluations],
            "best": None if run.best is None else dataclasses.asdict(run.best), "settings": run.settings.as_dict(),
            "notes": run.notes, **({} if run.scaling is None else {"loss_scale": run.scaling.value,
                                                                   "skipped": run.scaling.skipped}),
            **({} if run.recorded is None else {"recorded": run.recorded.as_dict()}),
        }
        with replace_file(self.folder / "report.json") as file:
            file.write((json.dumps(plain(report), indent=2) + "\n").encode())
        rows = rows_of(self.folder / NAME)
        if rows:
            draw(rows, self.folder / "report.png", f"{type(run.model).__name__}, {run.step:,} steps: {run.status}"[:100])


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draw the rows of metrics.jsonl: losses, learning rate, norm of the gradients. Whether matplotlib is there to do it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    losses, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    curve(losses, rows, "loss", BLUE, "training", marker=None)
    measured = [row for row in rows if row.get("valid_loss") is not None]
    if measured:
        best = min(measured, key=lambda row: row["valid_loss"])
        curve(losses, rows, "valid_loss", ORANGE, f"evaluation, best {best['valid_loss']:.4g} after step {best['step']:,}", "o")
        losses.plot(best["step"], best["valid_loss"], "o", markersize=11, markerfacecolor="none", color=ORANGE)
        losses.legend(frameon=False)
    losses.set_ylabel("mean loss over targets")
    losses.set_title(title, fontsize=10, loc="left")
    curve(rate, rows, "learning_rate", GREY)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0.0)
    curve(norm, rows, "gradient_norm", GREY)
    norm.set_ylabel("gradient norm")
    norm.set_ylim(bottom=0.0)
    norm.set_xlabel("step")
    for axes in (losses, rate, norm):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4)
    FigureCanvasAgg(figure)
    with replace_file(path) as file:
        figure.savefig(file, format="png")
    return True


def curve(axes: Any, rows: Sequence[dict[str, Any]], name: str, colour: str, label: str = "", marker: Any = None) -> None:
    """One quantity over the steps; what is missing leaves no gap, and a single point is a dot."""
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*known) if known else ((), ())
    axes.plot(steps, values, color=colour, label=label, marker=marker if len(known) > 1 else "o", markersize=4, linewidth=1.4)
