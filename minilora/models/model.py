"""Model: what all whole models share, that they can be written as a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy

from ..nn.module import Module

__all__ = ["Model"]


class Model(Module):
    """The base class of whole models, bodies and heads alike: what `models.load` gives."""

    def save(self, folder: Any, **options: Any) -> None:
        """Write the model as a folder that transformers reads: `models.save`, with its options and its errors.

        Examples
        --------
        >>> import minilora
        >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
        >>> minilora.nn.GPT2(config, rng=0).save("small")
        >>> minilora.models.load("small")([[1, 2, 3]]).shape
        (1, 3, 11)
        """
        from . import save  # when it is called: what writes models knows all of their families

        save(self, folder, **options)

    def example(self, rows: int, length: int) -> dict[str, Any]:
        """Arguments for a call of the model with so many texts of so many tokens: for what only asks what a step would need.

        Ids that differ as far as the vocabulary goes, no padding, and where there is a head labels that all count.

        Examples
        --------
        >>> import minilora
        >>> config = minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
        >>> minilora.nn.GPT2(config, rng=0).example(2, 3)["ids"].tolist()
        [[0, 1, 2], [3, 4, 5]]
        """
        vocab_size: int = self.config.vocab_size  # type: ignore[attr-defined]
        return {"ids": numpy.arange(rows * length).reshape(rows, length) % vocab_size}
