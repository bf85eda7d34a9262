"""``minilora inspect``: what lies at a path. Nothing in it is run, and of a model no more is read than headers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .options import add_json
from .output import say, show
from .terms import OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora inspect adapter
  minilora inspect adapter --layers --json
  minilora inspect adapter --analysis --base base
  minilora inspect base"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path,
                        help="folder of a model or adapter, or a file of tensors (safetensors, GGUF, index)")
    parser.add_argument("--layers", action="store_true", help="a row for every layer or tensor, not one for each kind")
    parser.add_argument("--numbers", action="store_true", help="read all numbers of a model too, and look for NaN and inf")
    parser.add_argument("--name", help="of one of several adapters in sub-folders")
    parser.add_argument("--dialect", choices=("peft", "loralib", "mlx", "kohya", "diffusers", "gguf"),
                        help="of an adapter, if it is not to be found out")
    parser.add_argument("--alpha", type=float, help="lora_alpha of a file in loralib's dialect, which does not say it")
    parser.add_argument("--analysis", action="store_true", help="the ranks that an adapter uses (section 7 of the paper)")
    parser.add_argument("--against", metavar="ADAPTER", type=Path, help="the same; and how much of its directions another has")
    parser.add_argument("--base", type=Path, help="the same; and what its updates amplify of these weights")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    report, text = looked_at(args)
    show(args, report, text)
    return OK


def looked_at(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The report, and the same as text."""
    from .reports.whole import base_report, is_base, whole_text

    path: Path = args.path
    if args.name is None and is_base(path):
        _refuse_analysis(args, "a model")
        if args.numbers:
            say(args, "reading all numbers ...")
        report = base_report(path, args.numbers)
        return report, whole_text(report, args.layers)
    if path.is_dir() and not any(map(_holds_something, path.iterdir())):
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise FormatError(f"{path}: neither a model (config.json, model.safetensors) nor an adapter (adapter_config.json, "
                          f"adapter_model.safetensors) is in this folder; there is {there}")
    if path.name.endswith(".index.json"):
        from ..formats import open_state

        _refuse_analysis(args, "an index of tensors")
        return _tensors(args, open_state(path))
    return _adapter_or_tensors(args)


def _holds_something(path: Path) -> bool:
    """Whether the reader of adapters can say something about a file of a folder, or about a folder in it."""
    return path.is_dir() or path.name == "adapter_config.json" or path.suffix in (".safetensors", ".gguf", ".bin")


def _adapter_or_tensors(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..formats.adapters.found import find
    from ..formats.adapters.reading import read_source
    from .reports.adapter import adapter_report, adapter_text

    source = find(args.path, args.name)
    if args.dialect is None and _is_other(source):
        _refuse_analysis(args, "a file of tensors")
        return _tensors(args, source.tensors)
    options = {} if args.alpha is None else {"lora_alpha": args.alpha}
    adapter = read_source(source, dialect=args.dialect, allow_nonfinite=True, **options)
    report = adapter_report(args.path, adapter)
    if not _wants_analysis(args):
        return report, adapter_text(report, args.layers)
    from .reports.analysis import analysis_report, analysis_text

    if args.base is not None and adapter.dialect == "kohya":  # its names have lost their dots: the base's tell them
        adapter = read_source(source, dialect=args.dialect, allow_nonfinite=True, modules=_modules_of(args.base), **options)
    report["analysis"] = analysis_report(args, adapter)
    return report, f"{adapter_text(report, args.layers)}\n\n{analysis_text(report['analysis'], args.layers)}"


def _wants_analysis(args: argparse.Namespace) -> bool:
    return bool(args.analysis or args.against is not None or args.base is not None)


def _refuse_analysis(args: argparse.Namespace, what: str) -> None:
    if _wants_analysis(args):
        raise UsageError(f"--analysis, --against and --base look at the updates of an adapter, and {args.path} is {what}: give "
                         "the adapter in its place")


def _modules_of(base: Path) -> list[str]:
    from ..formats.merging.checkpoint import open_checkpoint

    return list({name.rpartition(".")[0]: None for name in open_checkpoint(base).state if "." in name})


def _is_other(source: Any) -> bool:
    """Whether a file of tensors has no mark of an adapter: nothing beside it, and no dialect that knows its names."""
    from ..formats.adapters.foreign import foreign
    from ..formats.adapters.registry import DIALECTS, dialect_named

    if source.config is not None or foreign(source) or not hasattr(source.tensors, "shapes"):
        return False
    return not any(dialect_named(name).recognise(source) for name in DIALECTS)


def _tensors(args: argparse.Namespace, state: Any) -> tuple[dict[str, Any], str]:
    from .reports.whole import tensors_report, whole_text

    if not hasattr(state, "shapes"):
        raise FormatError(f"{args.path}: no adapter, and a model in GGUF is not read here")
    report = tensors_report(args.path, state, args.numbers)
    return report, whole_text(report, args.layers)
