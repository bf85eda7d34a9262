"""Keys and values that a causal model has computed, kept so that it reads every token once.

Attention of a new token looks at the keys and values of all tokens before it, and these do not change: with causality,
nothing that comes later has an effect on them. A model that keeps them computes T new tokens with T rows in every product,
and not with all of the text.

Memory: 2 layers KV hd numbers a token, for Llama-2-7b in float16 half a megabyte. Room is doubled when it is full, so that in
all fewer numbers are copied than are held.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy

from ... import backend
from ...engine import is_recording
from ...errors import GraphError, ShapeError, StateError
from ...nn.module import Module
from ...ops.masks import truths
from ...settings import whole
from ...tensor import Tensor

__all__ = ["Cache", "LayerCache", "extended"]

Array = Any
ROOM = 64  # tokens, at least


class LayerCache:
    """The keys and values of one layer.

    Attributes
    ----------
    k, v : array or None, shape (..., KV, room, hd)
        Tokens stand on the axis before the last; those from `length` on are not written yet.
    length : int
        Tokens held.
    """

    def __init__(self, length: int, room: int) -> None:
        self.length, self.room = length, room
        self.k: Array = None
        self.v: Array = None

    def extend(self, k: Any, v: Any) -> tuple[Tensor, Tensor]:
        """Write those of T new tokens, (..., KV, T, hd), behind those held; views of all of them. Nothing is counted yet."""
        new, stop = (k.data, v.data), self.length + k.shape[-2]
        if self.k is None or self.k.shape[-2] < stop:
            self._make_room(new, stop)
        for held, array in zip((self.k, self.v), new):
            self._check(held, array)
        for held, array in zip((self.k, self.v), new):
            held[..., self.length:stop, :] = array
        return Tensor(self.k[..., :stop, :]), Tensor(self.v[..., :stop, :])

    def _check(self, held: Array, new: Array) -> None:
        if type(held) is not type(new) or held.dtype != new.dtype:
            was, now = (f"{a.dtype} on the {backend.device_of(a).name}" for a in (held, new))
            raise StateError(f"the cache holds {was}, and the model now gives {now}: was it moved? Read the text again with a "
                             "new Cache()")
        if held.shape[:-2] != new.shape[:-2] or held.shape[-1] != new.shape[-1]:
            raise ShapeError(f"the cache holds keys and values {held.shape[:-2]} of {held.shape[-1]} numbers, got "
                             f"{new.shape[:-2]} of {new.shape[-1]}")

    def _make_room(self, new: tuple[Array, Array], stop: int) -> None:
        made = []
        for held, array in zip((self.k, self.v), new):
            if held is not None:
                self._check(held, array)
            xp = backend.device_of(array).xp
            room = max(stop, self.room if held is None else 2 * held.shape[-2])
            larger = xp.empty((*array.shape[:-2], room, array.shape[-1]), dtype=array.dtype)
            if held is not None:
                larger[..., :self.length, :] = held[..., :self.length, :]
            made.append(larger)
        self.k, self.v = made


class Cache:
    """What a causal model remembers of the tokens it has read: ``model(ids, cache=cache)`` reads on from there.

    Parameters
    ----------
    room : int
        Tokens to make room for at first. More come as they are needed, by doubling.

    Attributes
    ----------
    length : int
        Tokens held, padding included: where the next one stands.
    front : int
        Of these, vectors that a prompt has put before the first token.
    nbytes : int
        Memory of the keys and values, room included.

    Notes
    -----
    A cache belongs to the model and the batch that it was first used with, and is true for as long as the model stays what it
    is: after a change of weights or of active adapters start with a new one. It is for use within `no_grad`, and by one call at
    a time. A call that fails leaves what it held.

    The ids of a call are the new ones only, and so is their key_padding: the cache remembers where the padding was. With
    ``copy.deepcopy(cache)`` one beginning can be continued in several ways.

    Examples
    --------
    >>> import minilora
    >>> config = minilora.models.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> model, cache = minilora.models.GPT2(config, rng=0), minilora.models.Cache()
    >>> with minilora.no_grad():
    ...     first = model([[1, 2, 3]], cache=cache)
    ...     then = model([[4]], cache=cache)
    >>> then.shape, cache
    ((1, 1, 11), Cache(4 tokens, 2048 bytes))
    """

    def __init__(self, room: int = 0) -> None:
        self.room = whole("Cache: room", room, 0)
        self.length = 0
        self.front = 0  # of these: vectors before the first token
        self._shape: tuple[int, ...] = ()
        self._padding: numpy.ndarray[Any, Any] | None = None  # (..., length), False for padding; None if there is none
        self._model: weakref.ref[Module] | None = None
        self._layers: list[LayerCache] = []

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers if layer.k is not None)

    def __repr__(self) -> str:
        return f"Cache({self.length} tokens, {self.nbytes} bytes)"

    def __reduce__(self) -> Any:
        raise StateError("a Cache belongs to a model of this process and is not pickled: keep the ids, and read them again")

    def __copy__(self) -> Cache:
        return self.__deepcopy__({})  # two caches with one memory would write over each other

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        other = Cache(self.room)
        other.length, other._shape, other._padding, other._model = self.length, self._shape, self._padding, self._model
        other.front = self.front
        for layer in self._layers:
            twin = LayerCache(self.length, layer.room)
            twin.k, twin.v = (None if a is None else a.copy() for a in (layer.k, layer.v))
            other._layers.append(twin)
        return other

    # -- for models -------------------------------------------------------------------------------------------------

    def begin(self, model: Module, shape: tuple[int, ...], key_padding: Any, front: int) -> tuple[int, Any, Any]:
        """Check that this model may read texts of this shape now; `reading` does it for a model.

        Parameters
        ----------
        model : Module
        shape : tuple of int
            (..., T), of what goes in.
        key_padding
            Of it.
        front : int
            Of T: vectors before the first token.

        Returns
        -------
        tuple
            The tokens that are held, and the padding of all, on the host and where the model is; None if there is none.
        """
        if is_recording():
            raise GraphError("a cache holds arrays without a graph: write `with minilora.no_grad():` around the call, or leave "
                             "out the cache where gradients are wanted")
        if self.length and (self._model is None or self._model() is not model):
            raise StateError("this cache holds what another model has read: start with a new Cache()")
        if self.length and shape[:-1] != self._shape:
            raise ShapeError(f"this cache holds a batch {self._shape}, the new ids are {shape}: give new tokens of every "
                             f"text, {self._shape + shape[-1:]}, or start with a new Cache()")
        if not self.length:  # what a call that failed may have left
            self._layers, self._shape, self._model, self.front = [], shape[:-1], weakref.ref(model), front
        return (max(0, self.length - self.front), *self._padded(model, shape, key_padding))

    def _padded(self, model: Module, shape: tuple[int, ...], key_padding: Any) -> tuple[Any, Any]:
        """The padding of all tokens: on the host, and where the model is; None if there is none."""
        new = None
        if key_padding is not None:
            new = truths(key_padding)
            if new.shape != shape or new.dtype.kind != "b":
                raise ShapeError(f"expected key_padding of booleans, or of 0 and 1, for the new ids, {shape}, got "
                                 f"{new.dtype} {new.shape}: with a cache, that of earlier tokens is remembered")
            new = backend.to_host(new)
        if self._padding is None and (new is None or new.all()):
            return None, None
        before = numpy.ones((*shape[:-1], self.length), bool) if self._padding is None else self._padding
        whole_text = numpy.concatenate([before, numpy.ones(shape, bool) if new is None else new], axis=-1)
        return whole_text, backend.to_device(whole_text, next(p for p in model.parameters()).device)

    def layer(self, i: int) -> LayerCache:
        """The cache of layer `i`; layers are asked for in their order."""
        while len(self._layers) <= i:
            self._layers.append(LayerCache(self.length, max(ROOM, self.room)))
        return self._layers[i]

    def end(self, padding: Any, T: int) -> None:
        """Count T new tokens, which every layer has written."""
        self._padding = padding
        self.length += T
        for layer in self._layers:
            layer.length = self.length


def extended(past: LayerCache | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of all tokens: those held, if there is a cache, and behind them the new ones."""
    return (k, v) if past is None else past.extend(k, v)
