"""A model with adapters, as several verbs take it: BASE ADAPTER[=WEIGHT]..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, StateError
from .options import hidden
from .output import say
from .terms import UsageError

__all__ = ["BASE_DTYPES", "DTYPES", "LOW", "add_half_products", "add_model", "model_with", "modules_of_head", "tokenizer_of"]

DTYPES = ("float16", "float32", "float64")
LOW = ("nf4", "fp4", "int8", "bfloat16", "float16")  # in which frozen weights can be held
BASE_DTYPES = (*LOW, "float32", "keep")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--force`` and ``--tokenizer``: what `model_with` and `tokenizer_of` read."""
    parser.add_argument("--dtype", choices=DTYPES, metavar="TYPE",
                        help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--base-dtype", choices=BASE_DTYPES, metavar="TYPE",
                        help="nf4, fp4, int8, bfloat16, float16, keep")
    add_half_products(parser)
    parser.add_argument("--tokenizer", metavar="PATH", type=Path, help="its folder, or tokenizer.json (default: BASE)")
    parser.add_argument("--force", action="store_true", help="take an adapter whose file says that it belongs to another base")


def add_half_products(parser: argparse.ArgumentParser) -> None:
    hidden(parser, "--half-products", action="store_true")


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
    model = models.load(base, dtype="keep" if args.base_dtype == "keep" else args.dtype, **options)
    for note in model.origin.notes:
        say(args, note)
    hold(args, model, base)
    if args.half_products:
        multiply_in_16_bits(model)
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


def hold(args: argparse.Namespace, model: Any, base: Path) -> None:
    """Hold the frozen linear layers of a model as ``--base-dtype`` says, but for its head, which is trained or small."""
    from .. import nn, quant
    from ..stored import Stored

    kind = args.base_dtype
    held = sorted({p.data.kind for p in model.parameters() if isinstance(p.data, Stored)})
    if kind == "keep" or not (kind or held):
        return
    if kind in LOW and held in ([], [kind]):
        if not held:
            heads = [path for path in modules_of_head(model) for inner, module in model.named_modules()
                     if isinstance(module, nn.Linear) and f"{inner}.".startswith(f"{path}.")]
            report = quant.quantize(model.requires_grad(False), kind, exclude=list(dict.fromkeys(heads)))
            say(args, f"base: {len(report.rows)} layers held in {kind}, {report.bits:.3f} bits a weight")
    elif kind == "float32":
        if held:
            quant.dequantize(model)
    elif kind is not None:
        raise UsageError(f"--base-dtype {kind}: {base} is in {', '.join(held)} already: leave the option out; or take the "
                         "checkpoint that it was made from")


def multiply_in_16_bits(model: Any) -> None:
    """Let a GPU multiply what is held in 16 bits as it is; `UsageError` where that would change nothing."""
    from .. import quant

    devices = {p.device for p in model.parameters()}
    if not all(device.multiplies_16_bits for device in devices):
        raise UsageError("--half-products is for the tensor cores of a GPU, and this model is on the "
                         f"{', '.join(sorted(device.name for device in devices))}, which decodes its weights: add --device "
                         "gpu, or leave the option out")
    if not quant.half_products(model):
        raise UsageError("--half-products: no weight is held in 16 bits: add --base-dtype bfloat16, or keep where the file has "
                         "16 bits")


def modules_of_head(model: Any) -> list[str]:
    """What of a classifier is trained as a whole: its head, and what else was drawn because the file did not have it."""
    body = getattr(model, "body_name", None)
    if body is None:
        return []
    head = [name for name, child in model.children() if name != body and next(child.parameters(), None) is not None]
    drawn = dict.fromkeys(path.rpartition(".")[0] for path in model.origin.drawn)
    return [*head, *(path for path in drawn if not any(f"{path}.".startswith(f"{name}.") for name in head))]


def tokenizer_of(args: argparse.Namespace, base: Path) -> Any:
    """The tokenizer of a model's folder, or that of ``--tokenizer``."""
    from ..models import Tokenizer

    return Tokenizer(base if args.tokenizer is None else args.tokenizer)
