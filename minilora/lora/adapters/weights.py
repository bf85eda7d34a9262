"""The adapters of a model as part of its weights: `merge`, and `unmerge`, which gives the original bits back."""

from __future__ import annotations

from ... import nn
from ...errors import DTypeError, StateError
from ..layers.base import AdaptedLayer
from ..layers.places import layers_of
from ..merging.report import MergeReport
from ..merging.transaction import merge_layers, unmerge_layers

__all__ = ["merge", "unmerge"]


def merge(model: nn.Module, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
    """W <- W + D in every LoRA layer of a model: all of them or none. `unmerge` gives the original bits back.

    D is the update of the active adapters, each times its weight; with DoRA W' = kappa W + D, see `layers.update`. Layers
    without an active adapter are left alone.

    Parameters
    ----------
    model : nn.Module
        A model, or one LoRA layer.
    rounding : {"nearest", "stochastic"}
        How the sum is rounded to float16. Stochastic rounding keeps, on average, updates that rounding to nearest swallows.
    seed : int
        In [0, 2^64). What stochastic rounding makes is a function of the seed, of the layer's place among those that are
        merged, and of W, A, B and s.
    allow_lossy : bool
        Merge although the gain of a layer is outside [0.9, 1.1].

    Returns
    -------
    MergeReport
        One row for each layer; prints as a table.

    Raises
    ------
    StateError
        If a layer is merged already, shares what would be merged with another module, would hold NaN or inf, or has a gain too
        far from 1; or if there is no LoRA layer. All layers concerned are named, and nothing has changed.
    ConfigError
        If `rounding` or `seed` is not one of the values above.

    Notes
    -----
    Works on the host: on a GPU the weights are copied there and back (sync points). Takes a second array of each merged weight
    while it works; what stays afterwards is told at the top of `merging.transaction`. Not to be confused with train() and
    eval(), which never merge.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(4, 4, r=2, rng=0), minilora.lora.Linear(4, 2, r=2, rng=1))
    >>> report = minilora.lora.merge(model)
    >>> [(row.path, row.gain) for row in report.rows]
    [('0', 1.0), ('1', 1.0)]
    >>> minilora.lora.unmerge(model)
    """
    return merge_layers(model, _lora_layers(model, "merge"), rounding=rounding, seed=seed, allow_lossy=allow_lossy)


def unmerge(model: nn.Module) -> None:
    """Put the original weights back in every LoRA layer of a model, bit for bit: all of them or none.

    Raises
    ------
    StateError
        If a layer is not merged, or a merged weight was changed since; or if there is no LoRA layer. All layers concerned are
        named, and nothing has changed.

    Notes
    -----
    Works on the host, like `merge`; needs a second array of each weight while it works.
    """
    unmerge_layers(_lora_layers(model, "unmerge"))


def _lora_layers(model: nn.Module, what: str) -> dict[str, AdaptedLayer]:
    """The layers that can be merged, each once, with their paths."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"{what}: expected a model or a layer, got {type(model).__name__}")
    found = layers_of(model)
    if not found:
        raise StateError(f"{what}: there is no LoRA layer in this {type(model).__name__}: make one with lora.adapt, or put "
                         "them in with lora.inject")
    return found
