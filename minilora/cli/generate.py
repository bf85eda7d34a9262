"""``minilora generate``: a text from a model with adapters, as it comes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .loading import add_model, model_with, tokenizer_of
from .options import add_device, add_json, weighted
from .output import say, show
from .terms import OK, UsageError, printable

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """example:
  minilora generate base adapter=0.7 other=0.3 --prompt "a cat" --max-tokens 9
  minilora generate base adapter --prompt "the dog" --temp 0.8 --top-p 0.9"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", type=Path, help="the folder of a model that predicts the next token")
    parser.add_argument("adapters", metavar="ADAPTER[=WEIGHT]", nargs="*", type=weighted, help="any number of them, added up")
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT",
                        help="where to begin; - reads stdin. Several are computed together")
    parser.add_argument("--messages", metavar="FILE", type=Path, help="begin with a chat: JSON, [{\"role\", \"content\"}]")
    parser.add_argument("--chat", action="store_true", help="--prompt is what the user of a chat says")
    parser.add_argument("-m", "--max-tokens", metavar="N", type=int, default=100, help="new ones at most (default: 100)")
    parser.add_argument("--temp", metavar="X", type=float, default=0.0, help="0: the most probable token (default)")
    parser.add_argument("--top-p", metavar="X", type=float, help="draw among tokens that together have this probability")
    parser.add_argument("--top-k", metavar="N", type=int, help="draw among the N most probable tokens")
    parser.add_argument("--repetition-penalty", metavar="X", type=float, help="above 1: fewer")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn (default: 0)")
    add_model(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import use

    check(args)
    with use(args.device):
        tokenizer = tokenizer_of(args, args.base)
        texts = [text if text != "-" else sys.stdin.read() for text in args.prompt or ()]
        prompts = ids_of(args, tokenizer, texts)
        model = model_with(args, args.base, args.adapters or ())
        began = time.perf_counter()
        made = continued(args, model, tokenizer, prompts)
    seconds = time.perf_counter() - began
    written = tokenizer.decode_batch(made.texts())
    report = {
        "base": args.base, "adapters": [{"path": path, "weight": weight} for path, weight in args.adapters or ()],
        "made": [{"prompt": prompt, "prompt_tokens": len(ids), "text": text, "tokens": int(n), "ended": bool(ended)}
                 for prompt, ids, text, n, ended in zip(texts or [None], prompts, written, made.lengths, made.stopped)],
        "seconds": seconds,
    }
    if args.json or len(prompts) > 1:
        show(args, report, "\n".join(f"{prompt!r}\n{text}\n" for prompt, text in zip(texts, written)))
    tokens = int(made.lengths.sum())
    cut = int((~made.stopped).sum())
    which = "the text" if len(prompts) == 1 else f"{cut} of {len(prompts)} texts"
    say(args, f"{sum(map(len, prompts)):,} tokens read, {tokens:,} written, {tokens / max(seconds, 1e-9):.1f} a second"
        + (f"; {which} had not ended" if cut else ""))
    return OK


def check(args: argparse.Namespace) -> None:
    """`UsageError` unless it is said where to begin, in one way."""
    if bool(args.prompt) == (args.messages is not None):
        both = ", not both" if args.prompt else ""
        raise UsageError(f"say where to begin: --prompt TEXT, or a chat, --messages FILE{both}")
    if (args.prompt or []).count("-") > 1:
        raise UsageError("--prompt - reads stdin to its end: it can be given once")
    if (args.top_p is not None or args.top_k is not None) and not args.temp:
        raise UsageError("--top-p and --top-k choose among tokens that are drawn: give a temperature, such as --temp 1.0")


def ids_of(args: argparse.Namespace, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of every prompt."""
    chats: list[Any] = [[{"role": "user", "content": text}] for text in texts] if args.chat else []
    if args.messages is not None:
        chats = [messages_in(args.messages)]
    written = [tokenizer.chat(chat) for chat in chats] or texts
    found: list[list[int]] = tokenizer.encode(written, special_tokens=not chats).ids
    if not chats and tokenizer.eos_ids:  # where a tokenizer ends what it is given, the text would be over
        found = [ids[:-1] if len(ids) > 1 and ids[-1] in tokenizer.eos_ids else ids for ids in found]
    for ids, text in zip(found, written):
        if not ids:
            raise UsageError(f"--prompt {text!r} has no tokens: begin with a word")
    return found


def messages_in(path: Path) -> Any:
    """The list of messages in a file of JSON."""
    import json

    from ..errors import FormatError

    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # what is no UTF-8 too
        raise FormatError(f"{path}: no JSON: {error}") from error
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) and "role" in one for one in found):
        raise FormatError(f"{path}: expected a list of messages, [{{\"role\": \"user\", \"content\": \"...\"}}]")
    return found


def continued(args: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[list[int]]) -> Any:
    """What the model makes of the prompts; a single one is written as it comes."""
    from ..models import generate

    alone = len(prompts) == 1 and not args.json
    n, longest = args.max_tokens, max(map(len, prompts))
    positions = getattr(model, "positions", None)
    if positions is not None and longest <= positions < longest + n - 1:
        n = positions - longest + 1
        say(args, f"the model has {positions:,} positions: at most {n:,} new tokens")
    stops = [i for i in tokenizer.eos_ids if i < model.embedding.num_embeddings] if hasattr(model, "embedding") else []
    made = generate(model, prompts, n, temperature=args.temp, top_k=args.top_k, top_p=args.top_p, stop_ids=stops,
                    repetition_penalty=args.repetition_penalty, seed=args.seed,
                    stream=tokenizer.streaming(writer()) if alone else None)
    if alone:
        print()
    return made


def writer() -> Callable[[str], None]:
    """Writes pieces of a text to stdout at once. On a terminal what is no letter is written as an escape, save line ends."""
    terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        if terminal:
            piece = "".join(c if c in "\n\t" else printable(c) for c in piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    return write
