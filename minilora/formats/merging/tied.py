"""A table of tokens that makes the logits too: merging into it on one side only would change the other side without a word.

transformers ties by the config: with ``tie_word_embeddings`` a head in the file is overwritten by the table when the model is
loaded, and without one the table is the head. So where an adapter changes only one of the two, either the head is written as a
tensor of its own and the config says so, or nothing is written at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..tensors.reading import StateFile

__all__ = ["Tie", "tie_of"]

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight",
          "shared.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
WITH_HEAD = ("LMHead", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


class Tie(NamedTuple):
    """A table and its head, by the names of their tensors. `tied`: the two are one. `unsure`: there is no config to tell."""

    table: str
    head: str
    tied: bool
    unsure: bool = False


def tie_of(state: StateFile, config: Mapping[str, Any] | None) -> Tie | None:
    """The table and the head of a base; None if it has no table of tokens."""
    tables = [name for name, shape in state.shapes.items() if len(shape) == 2 and name.endswith(TABLES)]
    if not tables:
        return None
    table = min(tables, key=lambda name: (name.count("."), name))
    heads = [name for name in state.shapes if name.endswith(HEADS)]
    if config is None:
        return Tie(table, heads[0] if heads else "lm_head.weight", False, not heads)
    said = config.get("tie_word_embeddings")
    if heads:
        return Tie(table, heads[0], said is True)
    named = config.get("architectures")
    has_head = any(mark in str(name) for name in named for mark in WITH_HEAD) if isinstance(named, list) else said is True
    return Tie(table, "lm_head.weight", has_head and said is not False)
