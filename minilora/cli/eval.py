"""``minilora eval``: the loss of a model on rows of text, its perplexity or its accuracy."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .learner import add_texts, explained, labels_beside, own_labels, read_texts, wanted_of
from .loading import add_model, model_with
from .options import add_device, add_json, weighted
from .output import show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """also: --max-seq-length 2048, --train-on completion|assistant|all, --labels A,B,
--problem-type, --threads N

example:
  minilora eval base --data data
  minilora eval base adapter --data data --part train --json"""

PARTS = ("test", "valid", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder with a model and its tokenizer")
    parser.add_argument("adapters", metavar="ADAPTER[=WEIGHT]", nargs="*", type=weighted, help="adapters to mix, if any")
    add_texts(parser)
    parser.add_argument("--part", choices=PARTS, help="which rows of a folder (default: the first of these that it has)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows of a forward pass (default: 8)")
    parser.add_argument("--batches", metavar="N", type=int, help="no more than these")
    add_model(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import use
    from ..settings import whole
    from ..train.evaluation import evaluate

    size = whole("--batch-size", args.batch_size)
    most = None if args.batches is None else whole("--batches", args.batches)
    with use(args.device):
        beside = (labels_beside(path) for path, _ in args.adapters)
        labels = next((found for found in beside if found), None) or own_labels(args.model)
        texts = read_texts(args, args.model, labels)
        part = chosen(args, texts)
        wanted = wanted_of(args, args.model, texts.report)
        with explained(args.model, wanted, texts.report.form):
            model = model_with(args, args.model, args.adapters, **wanted.options())
        began = time.perf_counter()
        found = evaluate(model, getattr(texts, part), batch_size=size, batches=most, threads=args.threads)
    report = {"model": args.model, "adapters": [{"path": path, "weight": weight} for path, weight in args.adapters],
              "data": args.data, "part": part, "rows": len(getattr(texts, part)), "loss": found.loss, "targets": found.targets,
              "perplexity": found.perplexity, "accuracy": found.accuracy, "accuracy_error": found.accuracy_error,
              "root_mean_square_error": found.loss ** 0.5 if wanted.problem_type == "regression" else None,
              "seconds": time.perf_counter() - began}
    show(args, report, f"{part}: {found}{error_of(report)}")
    return OK


def error_of(report: dict[str, Any]) -> str:
    """The error of a regression in the unit of its scores."""
    error = report["root_mean_square_error"]
    return "" if error is None else f"; root mean square error {error:.4g}"


def chosen(args: argparse.Namespace, texts: Any) -> str:
    """Which rows to evaluate on. A single file is read as rows to train on."""
    there = [part for part in PARTS if getattr(texts, part) is not None]
    if args.part is not None and args.part not in there:
        raise UsageError(f"--part {args.part}: {args.data} has {', '.join(there)} only")
    return args.part or there[0]
