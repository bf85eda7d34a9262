"""Which programs can read an adapter, why not, and the line that helps.

What a program of another dialect can be told is asked of the writer of that dialect, which refuses what it cannot say. Of those
that read PEFT's folders, what is known of their readers (November 2026) is checked here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import MiniloraError
from ...formats.adapters.registry import dialect_named
from ...formats.adapters.saved import SavedAdapter
from .adapter import few

__all__ = ["READERS", "Verdict", "verdict"]

VLLM_RANK = 16  # max_lora_rank of vLLM, if it is not told another
MOVING = ("pissa", "olora")
PIPELINE = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer_2.")
UNET = ("down_blocks.", "mid_block.", "up_blocks.")  # what a U-Net calls its parts, where nothing stands before them


class Verdict(NamedTuple):
    """Whether a program reads an adapter: as it is ("yes"), after `line` ("converted"), or not ("no"); and why."""

    reader: str
    reads: str
    problems: list[str]
    notes: list[str]
    line: str | None


class Asked(NamedTuple):
    """The adapter, where it lies, the folder of its base if that is known, and config.json of it."""

    saved: SavedAdapter
    path: Path
    base: Path | None
    config: Mapping[str, Any] | None

    def quoted(self) -> str:
        return shlex.quote(str(self.path))

    def out(self, what: str) -> str:
        return shlex.quote(f"{self.path.with_suffix('') if self.path.is_file() else self.path}-{what}")

    def beside(self) -> str:
        """The base as it is typed; the word where none was given."""
        return shlex.quote(str(self.base)) if self.base is not None else "BASE"

    def baked(self) -> str:
        """The line that puts the adapter into the base's weights: whatever it is, a plain model is read everywhere."""
        return f"minilora merge {self.beside()} {self.quoted()} -o {self.out('merged')}"


def verdict(reader: str, asked: Asked) -> Verdict:
    """What a program, one of `READERS`, makes of an adapter."""
    return READERS[reader](asked)


def peft(asked: Asked) -> Verdict:
    if asked.saved.dialect == "peft":
        return Verdict("peft", "yes", [], [], None)
    return _converted("peft", "peft", asked, [{}])


def vllm(asked: Asked) -> Verdict:
    problems = _of_servers("vLLM", asked)
    saved, config = asked.saved, asked.saved.config
    if any(update.magnitude is not None for update in saved.updates.values()):
        problems.append("DoRA: vLLM has none")
    if saved.biases:
        problems.append("biases of the base (bias): vLLM adds none")
    usual = config.scaling_for(config.r, config.lora_alpha)
    other = [path for path, u in saved.updates.items() if abs(u.s - usual) > 1e-6 * abs(usual)]
    if other:
        problems.append(f"s differs from layer to layer (rank_pattern, alpha_pattern), and vLLM takes {usual:g} for all: "
                        f"{few(other)}")
    notes, highest = [], max((update.r for update in saved.updates.values()), default=0)
    line = None if not problems else asked.baked()
    if highest > VLLM_RANK:
        notes.append(f"rank {highest} needs vllm --max-lora-rank {highest}, since {VLLM_RANK} is its default; or a lower "
                     f"rank: minilora resize {asked.quoted()} --rank {VLLM_RANK} -o {asked.out(f'r{VLLM_RANK}')}")
    return _of_peft("vllm", asked, problems, notes, line)


def sglang(asked: Asked) -> Verdict:
    problems = _of_servers("SGLang", asked)
    return _of_peft("sglang", asked, problems, [], asked.baked() if problems else None)


def _of_servers(name: str, asked: Asked) -> list[str]:
    """What keeps a server that loads PEFT's folders beside a base from an adapter."""
    saved, problems = asked.saved, []
    if saved.saved:
        problems.append(f"modules saved whole (modules_to_save): {few(list(saved.saved))}: {name} reads none")
    if saved.tokens:
        problems.append(f"trained rows of an embedding (trainable_token_indices): {name} reads none")
    kinds = sorted({u.kind for u in saved.updates.values()} - {"linear", "embedding"})
    if kinds:
        problems.append(f"updates of {', '.join(kinds)} layers: {name} has them on linear layers")
    if any(update.bias is not None for update in saved.updates.values()):
        problems.append(f"lora_bias: {name} has none")
    if saved.config.init_lora_weights in MOVING:
        problems.append(f"it began as {saved.config.init_lora_weights}: A and B hold a part of the base's weights, which "
                        f"{name} would add to them once more")
    if saved.config.target_modules is None and saved.dialect == "peft":
        problems.append(f"target_modules is not said, which {name} needs")
    return problems


def _of_peft(reader: str, asked: Asked, problems: list[str], notes: list[str], line: str | None) -> Verdict:
    """The verdict of a program that reads PEFT's folders, and refuses `problems`."""
    if problems or asked.saved.dialect == "peft":
        return Verdict(reader, "no" if problems else "yes", problems, notes, line)
    found = _converted(reader, "peft", asked, [{}])
    return found._replace(notes=[*found.notes, *notes])


def mlx(asked: Asked) -> Verdict:
    if asked.saved.dialect == "mlx":
        return Verdict("mlx", "yes", [], [], None)
    return _converted("mlx", "mlx", asked, [_with(pad=pad, fold=fold) for fold, pad in product((False, True), repeat=2)])


def diffusers(asked: Asked) -> Verdict:
    if asked.saved.dialect in ("diffusers", "kohya"):
        return Verdict("diffusers", "yes", [], [], None)
    paths = list(asked.saved.updates)
    tries: list[dict[str, Any]] = [{}]
    if not any(path.startswith(PIPELINE) for path in paths):
        if not any(path.startswith(UNET) for path in paths):
            why = f"its layers are of no pipeline, whose parts are {', '.join(PIPELINE[:4])} ...: {few(paths)}"
            return Verdict("diffusers", "no", [why], [], None)
        tries = [{"component": "unet"}]
    return _converted("diffusers", "diffusers", asked, tries)


def llama_cpp(asked: Asked) -> Verdict:
    if asked.saved.dialect == "gguf":
        return Verdict("llama.cpp", "yes", [], [], None)
    missing = [what for what, lacks in (
        ("BASE, whose names and rows GGUF's follow from", asked.config is None),
        ("the package gguf: pip install 'minilora[gguf]'", find_spec("gguf") is None)) if lacks]
    if missing:
        return Verdict("llama.cpp", "converted", [f"it reads GGUF, and this is {asked.saved.dialect!r}"],
                       [f"to see whether all of it can be said, give {' and '.join(missing)}"],
                       f"minilora convert {asked.quoted()} --to gguf --base {asked.beside()} -o {asked.out('gguf')}")
    return _converted("llama.cpp", "gguf", asked, [_with(fold=fold) for fold in (False, True)], {"base": asked.config})


def _with(**switches: bool) -> dict[str, Any]:
    return {name: True for name, on in switches.items() if on}


def _converted(reader: str, dialect: str, asked: Asked, tries: list[dict[str, Any]],
               known: Mapping[str, Any] | None = None) -> Verdict:
    """Ask the writer of a dialect; of the options to try, the first with which it can be said."""
    first: MiniloraError | None = None
    for options in tries:
        try:
            written = dialect_named(dialect).write(asked.saved, **options, **(known or {}))
        except MiniloraError as error:
            first = first or error
            continue
        line = " ".join([f"minilora convert {asked.quoted()} --to {dialect}",
                         *(f"--write {name}={str(value).lower()}" for name, value in options.items()),
                         *([f"--base {asked.beside()}"] if known else []), f"-o {asked.out(dialect)}"])
        return Verdict(reader, "converted", [f"it reads the dialect {dialect!r}, and this is {asked.saved.dialect!r}"],
                       list(written.notes), line)
    assert first is not None
    return Verdict(reader, "no", [str(first)], [], asked.baked())


READERS: dict[str, Callable[[Asked], Verdict]] = {
    "peft": peft, "vllm": vllm, "sglang": sglang, "mlx": mlx, "diffusers": diffusers, "llama.cpp": llama_cpp}
