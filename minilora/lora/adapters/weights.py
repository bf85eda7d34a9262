"""The adapters of a model as part of its weights: `merge` and `unmerge`, which gives the bits back, and `bake`, for good."""

from __future__ import annotations

from collections.abc import Mapping

import numpy

from ... import nn
from ...errors import DTypeError, StateError
from ..layers.base import AdaptedLayer
from ..layers.places import layers_of, saved_of, tables_of
from ..layers.tokens import TokenTable
from ..merging.report import MergeReport
from ..merging.transaction import merge_layers, unmerge_layers
from ..undo import all_or_nothing
from .injection import replace
from .switching import freeze

__all__ = ["bake", "merge", "unmerge"]


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
    layers, tables = _lora_layers(model, "merge"), tables_of(model)
    _refuse_tied(model, tables)
    return merge_layers(model, layers, rounding=rounding, seed=seed, allow_lossy=allow_lossy,
                        beside=[table.merge for table in tables.values()])


def unmerge(model: nn.Module) -> None:
    """Put the original weights back in every merged layer of a model, bit for bit: in all of them or none.

    Raises
    ------
    StateError
        If no layer is merged, or a merged weight was changed since; or if there is no LoRA layer. All layers concerned are
        named, and nothing has changed.

    Notes
    -----
    Works on the host, like `merge`; needs a second array of each weight while it works.
    """
    layers = _lora_layers(model, "unmerge")
    unmerge_layers(layers, model, [table.unmerge for table in tables_of(model).values() if table.merged])


def bake(model: nn.Module, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
    """Merge the active adapters into the weights for good: afterwards the layers are plain, and no adapter is left.

    A model that is merged already keeps its merged weights as they are now. A module in `modules_to_save` is replaced by the
    active adapter's copy. Adapters that are not active are let go.

    Parameters
    ----------
    model : nn.Module
        A model, or one LoRA layer, which becomes a plain layer itself.
    rounding, seed, allow_lossy
        As in `merge`.

    Returns
    -------
    MergeReport
        That of the merge.

    Raises
    ------
    StateError, ConfigError
        As `merge`. Nothing has changed then.

    Notes
    -----
    Nothing is trained afterwards, as after `remove`: to train the weights, ``model.requires_grad()``. PEFT's merge_and_unload.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.Sequential(minilora.lora.Linear(4, 2, r=2, rng=0))
    >>> report = minilora.lora.bake(model)
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
    >>> list(model.state_dict())
    ['0.weight', '0.bias']
    """
    layers, kind = _lora_layers(model, "bake"), type(model)
    try:
        return all_or_nothing(lambda: _bake(model, layers, rounding, seed, allow_lossy), [model])
    except BaseException:
        model.__class__ = kind
        raise


def _bake(model: nn.Module, layers: dict[str, AdaptedLayer], rounding: str, seed: int, allow_lossy: bool) -> MergeReport:
    left = {path: layer for path, layer in layers.items() if layer.has_update and not layer.merged}
    if left or not any(layer.merged for layer in layers.values()):
        merge_layers(model, left or layers, rounding=rounding, seed=seed, allow_lossy=allow_lossy)
    report = MergeReport(tuple(layer.way_back.report for layer in layers.values() if layer.way_back is not None))
    new: dict[int, nn.Module] = {id(layer): layer.plain() for layer in layers.values()}
    new.update({id(wrapper): new.get(id(wrapper.current)) or wrapper.as_base() for wrapper in saved_of(model).values()})
    made = [table.weight.data for table in tables_of(model).values() if table.merged]
    for way_back in [layer.way_back for layer in layers.values() if layer.way_back is not None]:
        made += [way_back.merged, way_back.bias and way_back.bias[1]]  # a bias that is not merged may lie in a file
    for array in made:
        if isinstance(array, numpy.ndarray):
            array.flags.writeable = True  # it was read-only only because a way back was kept
    replace(model, new)
    if id(model) in new:  # it stands in nobody's place: it becomes the plain layer itself
        plain = new[id(model)]
        vars(model).clear()
        vars(model).update(vars(plain))
        model.__class__ = type(plain)
    freeze(model)  # copies and biases that an adapter trained too
    return report


def _lora_layers(model: nn.Module, what: str) -> dict[str, AdaptedLayer]:
    """The layers that can be merged, each once, with their paths."""
    if not isinstance(model, nn.Module):
        raise DTypeError(f"{what}: expected a model or a layer, got {type(model).__name__}")
    found = layers_of(model)
    if not found:
        raise StateError(f"{what}: there is no LoRA layer in this {type(model).__name__}: make one with lora.adapt, or put "
                         "them in with lora.inject")
    return found


def _refuse_tied(model: nn.Module, tables: Mapping[str, TokenTable]) -> None:
    """A table that another layer reads too, which does not know the adapter's rows, would hold them for both."""
    for path, table in tables.items():
        own = {id(module) for wrapper in saved_of(model).values() for module in (wrapper.original, *wrapper.copies.values())}
        others = [other for other, module in model.named_modules() if id(module) not in own
                  and any(p is table.weight for _, p in module.own_parameters())]
        if others:
            raise StateError(f"merge: {path!r} and {others[0]!r} share one weight: merged, it would hold the adapter's rows "
                             "for both and be wrong for one. Give one of them a Parameter of its own. Nothing was changed")
