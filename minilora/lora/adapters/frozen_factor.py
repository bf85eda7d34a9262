"""LoRA-FA: adapters of which B alone is trained."""

from __future__ import annotations

from ... import nn
from ..layers.places import layers_of
from ..undo import all_or_nothing
from .switching import known

__all__ = ["freeze_A"]


def freeze_A(model: nn.Module, name: str | None = None) -> list[str]:
    """LoRA-FA: freeze A and train B alone. A layer then keeps z = x A^T for backward, N r numbers, and not its input.

    Parameters
    ----------
    model : Module
    name : str, optional
        Of the adapter; all by default.

    Returns
    -------
    list of str
        The layers concerned. Embeddings are left out: their A starts at 0, and frozen there the update would stay 0.

    Notes
    -----
    Source: Zhang et al. 2023, arXiv 2308.03303.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(4, 3, r=2, rng=0))
    >>> freeze_A(model)
    ['0']
    >>> model[0].lora_A.trainable, model[0].lora_B.trainable
    (False, True)
    """
    if name is not None:
        known(model, [name])
    found = [(path, adapter) for path, layer in layers_of(model).items() for own, adapter in layer.adapters.items()
             if name in (None, own) and layer.zero != "lora_A"]

    def keep() -> None:
        for _, adapter in found:
            adapter.keeps_A, adapter.lora_A.trainable, adapter.lora_A.grad = True, False, None

    all_or_nothing(keep, [model])
    return list(dict.fromkeys(path for path, _ in found))
