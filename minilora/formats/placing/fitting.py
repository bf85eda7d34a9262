"""The update of one layer, as a file has it, as an adapter of a layer of a model: every number, or what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ... import backend, nn
from ...errors import FormatError
from ...lora.adapters.injection import refuse_full
from ...lora.config import Config
from ...lora.layers.adapter import Adapter
from ...lora.layers.base import AdaptedLayer
from ...lora.layers.kinds import adapted_layer
from ...lora.layers.precision import trained_dtype
from ...lora.layers.start import check_start, oriented
from ...tensor import Parameter
from ..adapters.peft.ranks import alpha_for
from ..adapters.saved import Update

__all__ = ["STARTS", "adapter_for", "kind_of", "on_host"]

Array = Any
Shapes = tuple[tuple[int, ...], tuple[int, ...]]

STARTS = ("pissa", "olora")  # what took its start out of the weight: the file fits the weight without it


def kind_of(layer: AdaptedLayer) -> str:
    """What `Update.kind` says for this layer."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "convolution" if hasattr(layer, "kernel_size") else "linear"


def on_host(array: Array, dtype: Any) -> numpy.ndarray:
    """A copy on the host in this dtype. What is too large for it becomes inf, and is found as such.

    Raises
    ------
    FormatError
        If these are no floating-point numbers, and are to become such.
    """
    if numpy.dtype(dtype).kind == "f" and not array.dtype.name.startswith(("float", "bfloat")):
        raise FormatError(f"expected floating-point numbers, got {array.dtype}")
    with numpy.errstate(over="ignore", invalid="ignore"):
        return numpy.array(backend.to_host(array), dtype=dtype)


def adapter_for(base: nn.Module, update: Update, config: Config, rng: numpy.random.Generator,
                path: str) -> tuple[AdaptedLayer, Adapter]:
    """The LoRA layer for a module of a model, and the adapter that a file has for it at a path, which is no part of it yet.

    Raises
    ------
    FormatError
        If the update is for another kind of layer or for other sizes, in words that say which.
    DTypeError
        If the module cannot be adapted.
    """
    layer = base if isinstance(base, AdaptedLayer) else adapted_layer(base)
    refuse_full(layer)
    A, B = _factors(layer, update)
    if not math.isfinite(update.s) or not update.s:
        raise FormatError(f"expected a finite scaling that is not 0, got {update.s!r}")
    r, dtype, device = len(A), trained_dtype(layer.weight.dtype), layer.weight.device

    def parameter(array: Array, trainable: bool = True) -> Parameter:
        return Parameter(backend.to_device(numpy.ascontiguousarray(on_host(array, dtype)), device), trainable)

    outputs = len(B)
    for name, vector in (("bias", update.bias), ("magnitude", update.magnitude)):
        if vector is not None and vector.shape != (outputs,):
            raise FormatError(f"expected {name} ({outputs},), got {vector.shape}")
    if update.bias is not None and (update.magnitude is not None or isinstance(layer, nn.Embedding)):
        raise FormatError(f"a bias of the update (lora_bias) {'beside DoRA' if update.magnitude is not None else 'of a table'} "
                          "is not part of minilora")
    lora_alpha = alpha_for(update.s, r, config, config.alpha_at(path))
    adapter = Adapter(parameter(A), parameter(B), r, lora_alpha, nn.Dropout(config.lora_dropout, rng=rng), config.use_rslora)
    adapter.scaling = update.s  # that of the file, to the last bit
    if update.bias is not None:
        adapter.lora_bias = parameter(update.bias)
    if update.magnitude is not None:
        adapter.magnitude = parameter(update.magnitude)
    if config.init_lora_weights in STARTS and not isinstance(layer, nn.Embedding):
        W, _, _, groups = layer.as_matrices(layer.weight.data, *map(numpy.empty, layer.factor_shapes(r)))
        check_start(r, W.shape, groups, init_lora_weights=config.init_lora_weights)
        with numpy.errstate(over="ignore", invalid="ignore"):  # of a tiny s; inf is found as such
            A, B = oriented(layer, str(config.init_lora_weights), r, update.s)
        adapter.start_A, adapter.start_B = parameter(A, False), parameter(-B, False)
    adapter.config = config
    return layer, adapter


def _factors(layer: AdaptedLayer, update: Update) -> tuple[Array, Array]:
    """A and B in the shapes of this layer; `FormatError` if they are another layer's."""
    A, B, kind = update.A, update.B, kind_of(layer)
    if A.ndim < 2 or B.ndim < 2 or not len(A):
        raise FormatError(f"A {A.shape} and B {B.shape} are no factors of an update")
    if (update.kind == "embedding") != (kind == "embedding"):
        raise FormatError(f"the file has an update of a{'n' if update.kind == 'embedding' else ''} {update.kind}, and the "
                          f"model has {'an' if kind == 'embedding' else 'a'} {kind} there")
    groups = getattr(layer, "groups", 1)
    if len(A) % groups:
        raise FormatError(f"rank {len(A)} is not a multiple of the {groups} groups of this convolution")
    shapes = layer.factor_shapes(len(A))
    if groups > 1 and A.shape[1] == shapes[0][1] * groups and A.shape[2:] == shapes[0][2:]:
        A = _diagonal(A, groups)
    A, B = _pointwise(A, shapes[0]), _pointwise(B, shapes[1])
    if (A.shape, B.shape) != shapes:
        raise FormatError(f"expected A {shapes[0]} and B {shapes[1][:1] + ('r',) + shapes[1][2:]}, got A {update.A.shape} and "
                          f"B {update.B.shape}".replace("'r'", "r") + _transposed(layer, update))
    return A, B


def _pointwise(array: Array, shape: tuple[int, ...]) -> Array:
    """A matrix in the shape of a kernel of size 1, or the other way round: the same numbers in the same order."""
    short, long = sorted((array.shape, shape), key=len)
    return array.reshape(shape) if long == (*short, *[1] * (len(long) - len(short))) else array


def _diagonal(A: Array, groups: int) -> Array:
    """A (r, C_in, ...) as PEFT has it beside a convolution with groups, as (r, C_in / groups, ...), if that is the same.

    There A reads all channels and B is in groups: what A reads of other groups' channels is no update of the weight, which has
    no entries there.
    """
    ranks, channels = len(A) // groups, A.shape[1] // groups
    parts = [A[g * ranks:(g + 1) * ranks, g * channels:(g + 1) * channels] for g in range(groups)]
    inside = sum(int(numpy.count_nonzero(part)) for part in parts)
    outside = int(numpy.count_nonzero(A)) - inside
    if outside:
        raise FormatError(f"A {A.shape} reads all {A.shape[1]} channels, and this convolution has {groups} groups: {outside} "
                          "numbers of A lie outside of their own group, where the weight has no entries, so that the update is "
                          "none of this weight. PEFT trains such adapters, and cannot merge them either. Train it again here "
                          "with lora.inject, or leave this layer out of the file")
    return numpy.concatenate(parts)


def _transposed(layer: AdaptedLayer, update: Update) -> str:
    """What the shapes look like, if they are those of a layer the other way round."""
    A, B = update.A, update.B
    if A.ndim != 2 or B.ndim != 2 or getattr(layer, "groups", 1) > 1:
        return ""
    if A.shape[1] == len(B) and (A.T.shape, B.T.shape) == layer.factor_shapes(len(B)):
        return ". This looks transposed: A is (in, r) and B (r, out), as mlx writes them; here A is (r, in) and B (out, r)"
    if len(A) == B.shape[1]:
        expected = layer.factor_shapes(len(A))
        if (A.shape[1], B.shape[0]) == (expected[1][0], math.prod(expected[0][1:])):
            return (". This looks transposed: it fits a weight (out, in) = "
                    f"{(B.shape[0], A.shape[1])}, as GPT-2's matrices are stored (fan_in_fan_out). A is never transposed: it "
                    "is (r, in), and B (out, r)")
    return ""
