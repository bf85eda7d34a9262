"""A model with adapters, as several verbs take it: BASE ADAPTER[=WEIGHT]..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, StateError
from .output import say
from .terms import UsageError

__all__ = ["add_model", "model_with", "tokenizer_of"]

DTYPES = ("float16", "float32", "float64")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--force`` and ``--tokenizer``: what `model_with` and `tokenizer_of` read."""
    parser.add_argument("--dtype", choices=DTYPES, metavar="TYPE",
                        help=f"of the weights: {', '.join(DTYPES)} (default: float32, or as the file)")
    parser.add_argument("--tokenizer", metavar="PATH", type=Path, help="its folder, or tokenizer.json (default: BASE)")
    parser.add_argument("--force", action="store_true", help="take an adapter whose file says that it belongs to another base")


def model_with(args: argparse.Namespace, base: Path, adapters: Sequence[tuple[Path, float]], **options: Any) -> Any:
    """The model of a folder, with these adapters active in the mixture of their weights; nothing in it is trained.

    Parameters
    ----------
    args : Namespace
        With what `add_model` gives.
    base : Path
    adapters : sequence of (Path, float)
    **options
        Further arguments of `models.load`.
    """
    from .. import formats, lora, models
    from ..formats.adapters.peft.virtual import is_virtual_folder

    prefixes = [(path, weight) for path, weight in adapters if is_virtual_folder(path)]
    adapters = [(path, weight) for path, weight in adapters if not is_virtual_folder(path)]
    if len(prefixes) > 1 or any(weight != 1 for _, weight in prefixes):
        raise UsageError(f"{', '.join(str(path) for path, _ in prefixes)}: prefixes and prompts are not mixed: give one, "
                         "without a weight")
    model = models.load(base, dtype=args.dtype, **options)
    for note in model.origin.notes:
        say(args, note)
    names = [f"adapter{number}" for number in range(1, len(adapters) + 1)]
    for name, (path, _) in zip(names, adapters):
        try:
            report = formats.load_adapter(model, path, name, force=args.force)
        except (FormatError, StateError) as error:
            raise type(error)(f"{path}: {error}".replace("force=True", "--force")) from error
        for note in report.notes:
            say(args, f"{path}: {note}")
    if adapters:
        lora.activate(model, *names, weights=[weight for _, weight in adapters], trainable=False)
    for path, _ in prefixes:
        for note in formats.load_prefix(model, path, "prefix").saved.notes:
            say(args, f"{path}: {note}")
    model.eval()
    return model


def tokenizer_of(args: argparse.Namespace, base: Path) -> Any:
    """The tokenizer of a model's folder, or that of ``--tokenizer``."""
    from ..models import Tokenizer

    return Tokenizer(base if args.tokenizer is None else args.tokenizer)
