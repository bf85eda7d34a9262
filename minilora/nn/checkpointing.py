"""Activation checkpointing of a whole model: its blocks keep their inputs alone, and are computed again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from .module import Module

__all__ = ["grad_checkpoint"]


def grad_checkpoint(model: Module, mode: bool = True) -> list[str]:
    """Let the blocks of a model keep nothing but their inputs in training, and compute the rest again in backward.

    The same gradients, to the bit, for about a third more arithmetic (one forward pass more), with the activations of one block
    in memory in place of all.

    Parameters
    ----------
    model : Module
        Its blocks are what stands in lists of modules of one class, in the outermost of such lists: ``model.h`` of GPT-2,
        ``model.encoder.layer`` of BERT, ``model.layers`` of Llama. For other parts set ``module.grad_checkpoint = True``.
    mode : bool
        False: keep everything again.

    Returns
    -------
    list of str
        The paths of the blocks.

    Raises
    ------
    ConfigError
        If there are no such blocks.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    >>> minilora.nn.grad_checkpoint(minilora.nn.GPT2(config, rng=0))
    ['h.0', 'h.1']
    """
    blocks = dict(_blocks(model))
    if not blocks:
        raise ConfigError(f"grad_checkpoint: {type(model).__name__} has no list of modules of one class, by which its blocks "
                          "could be told: set module.grad_checkpoint = True for the parts to compute again")
    for block in blocks.values():
        block.grad_checkpoint = bool(mode)
    return list(blocks)


def _blocks(module: Module) -> Iterator[tuple[str, Module]]:
    """What stands in lists of modules of one class, none of it inside another such list."""
    found: set[int] = set()
    for name, value in vars(module).items():
        members: Any = value if isinstance(value, (list, tuple)) else ()
        if members and isinstance(members[0], Module) and len({type(member) for member in members}) == 1:
            yield from ((f"{name}.{i}", member) for i, member in enumerate(members))
            found.update(map(id, members))
    for name, child in module.children():
        if id(child) not in found:
            yield from ((f"{name}.{path}", block) for path, block in _blocks(child))
