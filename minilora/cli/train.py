"""``minilora train``: an adapter, or a whole model, from rows of text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .learner import add_texts, explained, own_labels, read_texts, wanted_of
from .loading import BASE_DTYPES, DTYPES, LOW, add_half_products, model_with, modules_of_head
from .options import add_device, add_json, add_output, hidden
from .output import say, show
from .terms import CHECK_FAILED, OK, UsageError

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """also: --iters N (in place of --epochs), --target NAMES, --alpha 32, --dropout 0,
--full (all weights), --prefix N, --prefix-projection, --loraplus-ratio X,
--schedule cosine|linear|constant, --warmup 0.03, --weight-decay 0,
--max-grad-norm 1 (0: none), --grad-accumulation-steps 1, --grad-checkpoint,
--patience N, --resume, --permit NAMES, --max-seq-length 2048,
--valid-fraction X, --labels A,B, --problem-type, --sanity,
--train-on completion|assistant|all, --tokenizer PATH, --steps-per-report 10,
--steps-per-eval N, --val-batches N, --save-every N, --keep 2, --seed 0,
--threads N, --dtype float16|float32|float64, --precision mixed,
--base-dtype nf4|fp4|int8|bfloat16|float16|keep, --half-products,
--recorded (CUDA graphs), --few-lengths

example:
  minilora train base --data data -o run --iters 20 --learning-rate 0.01
  minilora train encoder --data reviews -o judge --epochs 2 --rank 4 --dry-run"""

RATES = {"causal_lm": 2e-4}  # of what is usual for decoders; small encoders take more
RATE = 1e-3
TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a folder with a model and its tokenizer")
    add_texts(parser)
    add_output(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", metavar="X", type=float, help="times over the data (default: 1)")
    length.add_argument("--iters", metavar="N", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="rows of a forward pass (default: 8)")
    parser.add_argument("--learning-rate", metavar="X", type=float, help="default: 2e-4, of classifiers 1e-3")
    parser.add_argument("--rank", metavar="N", type=int, default=16, help="of the updates (default: 16)")
    add_device(parser)
    add_json(parser)
    hidden(parser, "--tokenizer", type=Path)
    hidden(parser, "--dtype", choices=DTYPES)
    hidden(parser, "--precision", choices=("full", "mixed"), default="full")
    hidden(parser, "--base-dtype", choices=BASE_DTYPES)
    add_half_products(parser)
    hidden(parser, "--valid-fraction", type=float)
    hidden(parser, "--target", default="all-linear")
    hidden(parser, "--grad-checkpoint", action="store_true")
    hidden(parser, "--alpha", type=float, default=32.0)
    hidden(parser, "--dropout", type=float, default=0.0)
    hidden(parser, "--full", action="store_true")
    hidden(parser, "--prefix", metavar="N", type=int)
    hidden(parser, "--prefix-projection", action="store_true")
    hidden(parser, "--loraplus-ratio", type=float)
    hidden(parser, "--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    hidden(parser, "--warmup", type=float, default=0.03)
    hidden(parser, "--weight-decay", type=float, default=0.0)
    hidden(parser, "--max-grad-norm", type=float, default=1.0)
    hidden(parser, "--grad-accumulation-steps", type=int, default=1)
    hidden(parser, "--steps-per-report", type=int, default=10)
    hidden(parser, "--keep", type=int, default=2)
    hidden(parser, "--seed", type=int, default=0)
    for flag in ("--steps-per-eval", "--val-batches", "--save-every", "--patience"):
        hidden(parser, flag, type=int)
    for flag in ("--sanity", "--recorded", "--few-lengths"):
        hidden(parser, flag, action="store_true")
    hidden(parser, "--resume", action="store_true")
    hidden(parser, "--permit", type=lambda text: text.split(","), default=())


def run(args: argparse.Namespace) -> int:
    from .. import backend, use
    from ..train.distributed.launchers import find_comm
    from ..train.loop import fit

    if args.full and args.base_dtype in LOW:
        raise UsageError(f"--full trains the base itself, and in {args.base_dtype} it is read only: take one of the two")
    with find_comm(args.device) as comm, use(args.device):  # in this order: of several GPUs each process takes its own
        if comm.size > 1:
            if args.recorded:
                raise UsageError("--recorded is for one process: between several the host sends messages in every update, and "
                                 "a recorded one would not send them again. Leave it out, or train in one process")
            say(args, str(comm))
        texts = read_texts(args, args.model, own_labels(args.model), args.valid_fraction)
        wanted = wanted_of(args, args.model, texts.report)
        settings = settings_of(args, RATES.get(str(wanted.head), RATE))
        with explained(args.model, wanted, texts.report.form):
            model = model_with(args, args.model, (), rng=args.seed, **wanted.options())
        prepare(args, model, wanted.head)
        if args.recorded and backend.current_device() is backend.cpu:
            say(args, "note: --recorded is for a GPU: on the CPU updates are called, with the same bits")
        if args.sanity and not able(args, model, texts, settings, comm):
            return CHECK_FAILED
        if args.dry_run:
            return planned(args, model, texts, settings, comm)
        made = fit(model, texts.train, settings, valid=texts.valid, folder=args.out, resume=args.resume, permit=args.permit,
                   comm=comm, recorded=args.recorded, quiet=args.quiet)
        told(args, made)
    return OK


def told(args: argparse.Namespace, made: Any) -> None:
    """Say what a run came to."""
    report = {"out": args.out, "steps": made.step, "seconds": made.seconds, "losses": made.losses,
              "best": None if made.best is None else {**vars(made.best)}, "notes": made.notes}
    last = f"loss {made.losses[-1][1]:.4f}" if made.losses else "no step was left to make"
    best = "" if made.best is None else f"; best evaluation, after step {made.best.step:,}: {made.best}"
    show(args, report, f"{args.out}: {made.step:,} steps in {made.seconds:.1f} s, {last}{best}")


def settings_of(args: argparse.Namespace, rate: float) -> Any:
    """The settings of the run that the options say."""
    from ..train.settings import Settings

    return Settings(
        steps=args.iters, epochs=args.epochs, batch_size=args.batch_size, accumulation=args.grad_accumulation_steps,
        learning_rate=rate if args.learning_rate is None else args.learning_rate, schedule=args.schedule, warmup=args.warmup,
        weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm or None, loraplus_ratio=args.loraplus_ratio,
        steps_per_report=args.steps_per_report, steps_per_eval=args.steps_per_eval, eval_batches=args.val_batches,
        save_every=args.save_every, keep=args.keep, patience=args.patience, seed=args.seed, threads=args.threads,
        precision=args.precision)


def prepare(args: argparse.Namespace, model: Any, head: str | None) -> None:
    """Make trainable what is to be trained: an adapter and a classifier's head, or everything."""
    from .. import lora, nn

    if args.prefix is not None or args.prefix_projection:
        with_prefix(args, model, head)
    elif args.full:
        if args.loraplus_ratio is not None:
            raise UsageError("--loraplus-ratio is for adapters, and with --full there is none")
        model.requires_grad()
    else:
        targets: Any = args.target if args.target.lower() == "all-linear" else args.target.split(",")
        decode_head(model)
        task = TASKS.get(str(head), "FEATURE_EXTRACTION")  # of what PEFT would load it into
        config = lora.Config(r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules=targets,
                             modules_to_save=None if head == "causal_lm" else modules_of_head(model), task_type=task,
                             base_model_name_or_path=str(args.model))
        for note in lora.inject(model, config, rng=args.seed).notes:
            say(args, f"note: {note}")
    if args.grad_checkpoint:
        nn.grad_checkpoint(model)


def decode_head(model: Any) -> None:
    """A classifier's head in a base of 4 bits is trained as a whole, and so in floating-point numbers."""
    from .. import quant
    from ..stored import Stored

    heads = modules_of_head(model)
    for path, module in model.named_modules():
        if path in heads and any(isinstance(p.data, Stored) for p in module.parameters()):
            quant.dequantize(module)


def with_prefix(args: argparse.Namespace, model: Any, head: str | None) -> None:
    """Put a prefix in front of the model's layers."""
    from .. import tuners

    if args.prefix is None:
        raise UsageError("--prefix-projection says how a prefix is made: give --prefix N too")
    if args.full or args.loraplus_ratio is not None:
        raise UsageError(f"--{'full' if args.full else 'loraplus-ratio'} does not go with --prefix: a prefix is trained alone")
    config = tuners.PrefixConfig(
        num_virtual_tokens=args.prefix, prefix_projection=args.prefix_projection,
        task_type=TASKS.get(str(head), "FEATURE_EXTRACTION"),
        modules_to_save=None if head == "causal_lm" else modules_of_head(model), base_model_name_or_path=str(args.model))
    tuners.inject(model, config, rng=args.seed)


def able(args: argparse.Namespace, model: Any, texts: Any, settings: Any, comm: Any) -> bool:
    """Whether no sanity check fails, each process for itself; the table on stderr, of one that failed with --quiet too."""
    from ..train.sanity import check

    if comm.rank == 0:
        say(args, "sanity: at most a few hundred steps of 8 rows, which are forgotten again ...")
    found = check(model, texts.train, settings)
    if comm.rank == 0:
        say(argparse.Namespace(quiet=args.quiet and bool(found)), str(found))
        if not found:
            say(argparse.Namespace(quiet=False), "A check has failed, and nothing was trained.\nLeave out --sanity to train "
                "all the same.")
    return bool(found)


def planned(args: argparse.Namespace, model: Any, texts: Any, settings: Any, comm: Any) -> int:
    """Say what would be done."""
    from ..train.header import Header
    from ..train.recorded import MOST
    from ..train.run import Run, loss_of_model

    header = Header(Run(model, texts.train, settings, loss_of_model, comm, None, args.recorded), texts.valid)
    report = {"out": args.out, "dry_run": True, "trained": header.trained, "total": header.total, "targets": header.targets,
              "steps": header.run.total, "predicted_bytes": header.bytes.total, "settings": settings.as_dict(),
              "data": texts.report.as_dict(),
              "recorded": None if header.run.recorded is None else {"shapes": header.shapes, "most": MOST}}
    show(args, report, "\n".join([*header.lines(), f"would write {args.out}; nothing was written"]))
    return OK
