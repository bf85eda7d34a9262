"""``minilora embed``: a vector for every text of a file, or how alike a few texts are."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from .loading import add_model, model_with, tokenizer_of
from .options import add_device, add_json, weighted
from .output import say, show, table
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora embed encoder texts.txt
  minilora embed encoder texts.txt -o vectors.npy
  minilora embed encoder texts.txt -o vectors.jsonl --batch-size 8"""

ENDINGS = (".npy", ".jsonl")
MOST = 12  # texts of a table
WIDE = 44  # letters of a text in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="MODEL", type=Path, help="the folder of an encoder, best of sentence-transformers")
    parser.add_argument("texts", metavar="[ADAPTER[=WEIGHT]...] FILE", nargs="+",
                        help="adapters, and a file with a text a line, or .jsonl with {\"text\"}; - reads stdin")
    parser.add_argument("-o", "--out", metavar="OUT", type=Path,
                        help=f"write the vectors: OUT ends with {' or '.join(ENDINGS)}. Without it: a table of cosines")
    parser.add_argument("--overwrite", action="store_true", help="OUT may be there already")
    parser.add_argument("--dry-run", action="store_true", help="read model and texts, compute and write nothing")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="texts at a time (default: 32)")
    add_model(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import use

    *adapters, file = args.texts
    found = [given(word) for word in adapters]
    check_out(args)
    texts = texts_of(file)
    if args.out is None and len(texts) > MOST:
        raise UsageError(f"{file} has {len(texts):,} texts, too many for a table: write the vectors, -o vectors.npy")
    with use(args.device):
        tokenizer = tokenizer_of(args, args.base)
        model = model_with(args, args.base, found, head="sentences")
        encoded = tokenizer.encode(texts, max_length=most_tokens(model))
        cut = sum(lost > 0 for lost in encoded.cut)
        if cut:
            say(args, f"{cut:,} of {len(texts):,} texts were cut to {most_tokens(model):,} tokens")
        began = time.perf_counter()
        vectors = None if args.dry_run else model.embed(encoded.ids, args.batch_size)
    report: dict[str, Any] = {"model": args.base, "texts": len(texts), "width": model.width, "cut": cut, "out": args.out,
                              "tokens": sum(map(len, encoded.ids)), "dry_run": args.dry_run}
    where = f"{len(texts):,} vectors of {model.width} numbers"
    if vectors is None:
        show(args, report, f"would make {where}" + ("" if args.out is None else f" and write {args.out}"))
        return OK
    report["seconds"] = time.perf_counter() - began
    if args.out is not None:
        write(args.out, texts, vectors)
        show(args, report, f"{args.out}: {where}, in {report['seconds']:.1f} s")
    else:
        report["cosines"] = cosines(vectors)
        show(args, {**report, "of": texts}, table_of(texts, report["cosines"]))
    return OK


def given(word: str) -> tuple[Path, float]:
    try:
        return weighted(word)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from error


def check_out(args: argparse.Namespace) -> None:
    """Find out before the work what would be in its way after it."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be 1 or more, got {args.batch_size}")
    if args.out is None:
        return
    if args.out.suffix not in ENDINGS:
        raise UsageError(f"-o {args.out}: the ending says how vectors are written: {' or '.join(ENDINGS)}")
    if args.out.is_dir() or args.out.exists() and not args.overwrite:
        raise UsageError(f"-o {args.out} is there already: give another name, or --overwrite")
    if not args.out.parent.is_dir():
        raise UsageError(f"-o {args.out}: there is no folder {args.out.parent}")


def texts_of(file: str) -> list[str]:
    """The texts of a file: one a line, or of .jsonl the "text" of every line. Blank lines are none."""
    from ..errors import FileError, FormatError
    from ..train.data.jsonl import objects_in
    from ..train.data.problems import Problems, short

    path, problems = Path(file), Problems()
    if path.suffix == ".jsonl":
        rows = list(objects_in(path, problems))
        for number, row in rows:
            if not isinstance(row.get("text"), str) or not row["text"]:
                problems.add(path, number, f"expected a 'text', got {short(row.get('text'))}")
        problems.complain()
        return [row["text"] for _, row in rows]
    try:
        content = sys.stdin.buffer.read() if file == "-" else path.read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: no UTF-8 at byte {error.start + 1}: save it as UTF-8") from error
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise FormatError(f"{file}: there are no texts in it")
    return texts


def most_tokens(model: Any) -> int | None:
    """How many tokens of a text the model takes."""
    own = model.max_tokens
    return own if own is not None else getattr(model.config, "max_position_embeddings", None)


def write(path: Path, texts: list[str], vectors: Any) -> None:
    """Vectors as .npy, or with their texts as .jsonl: a whole file, or none."""
    import numpy

    from ..formats.tensors.durable import replace_file

    with replace_file(path) as file:
        if path.suffix == ".npy":
            numpy.save(file, vectors, allow_pickle=False)
        else:
            write_lines(file, texts, vectors)


def write_lines(file: BinaryIO, texts: list[str], vectors: Any) -> None:
    for text, vector in zip(texts, vectors):
        row = {"text": text, "vector": [float(str(x)) for x in vector]}  # float32 in as few digits as tell it apart
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def cosines(vectors: Any) -> list[list[float]]:
    import numpy

    lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / numpy.maximum(lengths, 1e-12)
    found: list[list[float]] = (unit @ unit.T).tolist()
    return found


def table_of(texts: list[str], values: list[list[float]]) -> str:
    names = [text if len(text) <= WIDE else text[:WIDE - 4] + " ..." for text in texts]
    rows = [(str(i), name, *(f"{value:.2f}" for value in row)) for i, (name, row) in enumerate(zip(names, values), 1)]
    return table(["", "text", *map(str, range(1, len(texts) + 1))], rows, (1,))
