"""Attention on the output of one projection that gives queries, keys and values together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..engine import apply, floating, shape_of
from ..errors import ConfigError, ShapeError
from ..settings import whole
from .attention import ScaledDotProduct, check_scale
from .masks import prepare_masks

if TYPE_CHECKING:
    from ..tensor import Tensor
    from ..typing import Integers, TensorLike

Array = Any


class PackedAttention(ScaledDotProduct):
    """Attention whose q, k and v lie side by side in one array, as a fused projection gives them; their gradients do too.

    qkv (..., T, (H + 2 KV) hd) holds for every token the H query heads, the KV key heads and the KV value heads; y is
    (..., T, H hd). All are read and written through views: nothing is split, padded or joined. Keeps qkv, y, m and n.
    """

    heads: tuple[int, int]  # H, KV

    def split(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Views (..., H, T, hd), (..., KV, T, hd) and (..., KV, T, hd)."""
        H, KV = self.heads
        x = qkv.reshape(qkv.shape[:-1] + (H + 2 * KV, qkv.shape[-1] // (H + 2 * KV))).swapaxes(-3, -2)
        return x[..., :H, :, :], x[..., H:H + KV, :, :], x[..., H + KV:, :, :]

    def forward(self, qkv: Array) -> Array:
        q, k, v = self.split(qkv)
        y = self.xp.empty(qkv.shape[:-1] + (q.shape[-3], q.shape[-1]), dtype=qkv.dtype)
        m, n = self.attend(q, k, v, y.swapaxes(-3, -2))
        self.save(qkv, y, m, n)
        return y.reshape(qkv.shape[:-1] + (q.shape[-3] * q.shape[-1],))

    def backward(self, dy: Array) -> tuple[Array | None, ...]:
        qkv, y, m, n = self.saved
        dqkv = self.xp.empty(qkv.shape, dtype=qkv.dtype)
        by_heads = dy.reshape(y.shape).swapaxes(-3, -2), *self.split(qkv), y.swapaxes(-3, -2)
        self.differentiate(*by_heads, m, n, *self.split(dqkv))
        return (dqkv,)


def packed_attention(qkv: TensorLike, num_heads: int, num_kv_heads: int | None = None, causal: bool = False,
                     key_padding: Integers | None = None, mask: TensorLike | None = None, scale: float | None = None) -> Tensor:
    """`attention` of q, k and v that lie side by side in one array; see `PackedAttention`.

    Parameters
    ----------
    qkv : Tensor, shape (..., T, (H + 2 KV) hd)
        For every token its H query heads, KV key heads and KV value heads: what GPT-2's c_attn gives, with KV = H.
    num_heads : int
        H.
    num_kv_heads : int, optional
        KV; by default H.
    causal, key_padding, mask, scale
        As in `attention`, with S = T.

    Returns
    -------
    Tensor, shape (..., T, H hd)

    Raises
    ------
    ShapeError
        If the last axis does not hold H + 2 KV heads, or a mask does not fit.
    ConfigError
        If a number of heads is not an int >= 1, H is not a multiple of KV, or `scale` is not a finite number.

    Examples
    --------
    >>> import numpy, minilora
    >>> qkv = minilora.tensor(numpy.ones((2, 5, 3 * 8)))
    >>> minilora.ops.packed_attention(qkv, num_heads=4, causal=True).shape
    (2, 5, 8)
    """
    H, KV = check_heads(num_heads, num_kv_heads)
    shape = shape_of(floating(qkv))
    hd = check_packed(shape, H, KV)
    masks = prepare_masks(qkv, (*shape[:-2], H, shape[-2], hd), shape[-2], key_padding, mask)
    return apply(PackedAttention, qkv, heads=(H, KV), scale=check_scale(scale, hd), causal=bool(causal), masks=masks)


def check_packed(shape: tuple[int, ...], H: int, KV: int) -> int:
    """hd; `ShapeError` unless the shape is (..., T, (H + 2 KV) hd) with T and hd >= 1."""
    if len(shape) < 2 or shape[-2] < 1 or shape[-1] < 1 or shape[-1] % (H + 2 * KV):
        raise ShapeError(f"packed_attention: expected (..., T, {H + 2 * KV} hd) for {H} query heads, {KV} key heads and {KV} "
                         f"value heads, with T and hd >= 1, got {shape}: is the last axis a multiple of {H + 2 * KV}?")
    return shape[-1] // (H + 2 * KV)


def check_heads(num_heads: Any, num_kv_heads: Any = None) -> tuple[int, int]:
    """The numbers of query heads and of key and value heads; `ConfigError` unless the first is a multiple of the second."""
    given = {"num_heads": num_heads, "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads}
    H, KV = (whole(f"attention: {name}", value) for name, value in given.items())
    if H % KV:
        raise ConfigError(f"attention: num_heads must be a multiple of num_kv_heads, got {H} and {KV}: every key and value "
                          "head serves the same number of query heads")
    return H, KV
