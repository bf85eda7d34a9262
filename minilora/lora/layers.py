"""Layers with a low-rank update beside a frozen weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from .. import backend, nn, ops
from ..engine import is_recording
from ..errors import ConfigError, DTypeError, StateError
from ..nn.linear import uniform
from ..ops.dropout import check_dropout
from ..tensor import Parameter, Tensor
from . import gradient

if TYPE_CHECKING:
    from .merge_report import MergeReport
    from .transaction import WayBack

__all__ = ["Linear", "adapt"]

Array = Any


class Linear(nn.Module):
    """y = x W^T + b + s (x A^T) B^T, with W and b frozen and s = lora_alpha / r.

    Parameters
    ----------
    in_features, out_features : int
    r : int
        Rank of the update.
    lora_alpha : float
    lora_dropout : float
        Probability in [0, 1) with which an element of the adapter's input is dropped in training; the frozen path sees the
        whole input.
    bias : bool
    init_lora_weights : True or "gaussian"
        How A starts: True draws from U(-1/sqrt(in), 1/sqrt(in)), as loralib and PEFT do; ``"gaussian"`` from N(0, 1/r^2),
        PEFT's option of that name. B starts at 0 in both, so that the layer starts as its base.
    dtype : dtype
    rng : numpy.random.Generator or int, optional
        Draws W, b, A and the dropout's seed, on the host.

    Attributes
    ----------
    weight : Parameter, shape (out, in), frozen
    bias : Parameter, shape (out,), frozen, or None
    lora_A : Parameter, shape (r, in)
    lora_B : Parameter, shape (out, r)
    scaling : float
    merged : bool

    Raises
    ------
    ConfigError
        For a setting outside its range.

    Notes
    -----
    Names as in loralib. To adapt a layer that is trained already, use `adapt`.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Examples
    --------
    >>> import numpy, minilora
    >>> layer = minilora.lora.Linear(4, 3, r=2, lora_alpha=4, rng=numpy.random.default_rng(0))
    >>> layer
    Linear(in_features=4, out_features=3, bias=True, r=2, lora_alpha=4, scaling=2)
    >>> [name for name, p in layer.named_parameters() if p.trainable]
    ['lora_A', 'lora_B']
    """

    def __init__(self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
                 bias: bool = True, *, init_lora_weights: bool | str = True, dtype: Any = "float32",
                 rng: numpy.random.Generator | int | None = None) -> None:
        rng = numpy.random.default_rng(rng)
        self._adapt(nn.Linear(in_features, out_features, bias, dtype=dtype, rng=rng), r, lora_alpha, lora_dropout,
                    init_lora_weights, rng)

    def _adapt(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str,
               rng: numpy.random.Generator | int | None) -> None:
        self.scaling = gradient.scaling(lora_alpha, r)
        check_dropout(lora_dropout)
        rng = numpy.random.default_rng(rng)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha = r, lora_alpha
        # Handles of our own on the base's arrays: freezing them, and merging, leave the base layer as it is.
        self.weight = Parameter(base.weight.data, trainable=False)
        self.bias = None if base.bias is None else Parameter(base.bias.data, trainable=False)
        with backend.use(self.weight.device.name):
            self.lora_A = _initial_A(init_lora_weights, (r, self.in_features), rng, self.weight.dtype)
            self.lora_B = Parameter(backend.asarray(numpy.zeros((self.out_features, r), self.weight.dtype)))
        self.lora_dropout = nn.Dropout(lora_dropout, rng=rng)
        self.way_back: WayBack | None = None  # while merged: what unmerge needs

    @property
    def merged(self) -> bool:
        """Whether the update is part of `weight` at present."""
        return self.way_back is not None

    def delta(self) -> Array:
        """D = s B A (out, in), what the update adds to the weight."""
        return gradient.delta(self.lora_A.data, self.lora_B.data, self.scaling)

    def forward(self, x: Any) -> Tensor:
        if self.merged:
            if self.training and is_recording() and (self.lora_A.trainable or self.lora_B.trainable):
                raise StateError("training while merged: lora_A and lora_B take no part in the forward pass, so they would "
                                 "get no gradient. Call unmerge() first, or eval() to run the merged layer")
            return nn.Linear.forward(self, x)  # type: ignore[arg-type]  # the same op as the base's: no added latency
        if self.training and self.lora_dropout.p:
            return ops.linear(x, self.weight, self.bias) + self.update(x)  # the branches read different arrays
        return gradient.lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling)

    def update(self, x: Any) -> Tensor:
        """The low-rank branch alone, s (x A^T) B^T: for callers who have the frozen branch's output of x already."""
        return ops.linear(ops.linear(self.lora_dropout(x), self.lora_A) * self.scaling, self.lora_B)

    def merge(self, *, rounding: str = "nearest", seed: int = 0, allow_lossy: bool = False) -> MergeReport:
        """Make the update part of the weight: W <- W + D. All or nothing; `unmerge` restores the original bits.

        Parameters, report and errors are those of `lora.merge`, which does the same for all layers of a model.

        Raises
        ------
        StateError
            If merged already, if the update or the sum is not finite, or if rounding would swallow the update: then nothing has
            changed.

        Notes
        -----
        While merged, the layer keeps instead of a second W what leads back from W': mostly less than 1 bit for each weight. The
        arithmetic is the host's: on a GPU the weight is copied there and back (sync points).
        """
        from .transaction import merge  # here, because most programs never merge

        return merge(self, rounding=rounding, seed=seed, allow_lossy=allow_lossy)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit.

        Raises
        ------
        StateError
            If the layer is not merged, or the merged weight was changed since.
        """
        from .transaction import unmerge

        unmerge(self)

    def check_movable(self) -> None:
        if self.merged:
            raise StateError("this layer is merged: its weight holds the update, and lora_A and lora_B hold it too, so that a "
                             "copy would count it twice. Call unmerge() first")

    def extra_repr(self) -> str:
        text = (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}")
        if self.lora_dropout.p:
            text += f", lora_dropout={self.lora_dropout.p:g}"
        return text + (", merged" if self.merged else "")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _initial_A(init: bool | str, shape: tuple[int, int], rng: numpy.random.Generator, dtype: Any) -> Parameter:
    r, in_features = shape
    if init is True:
        return uniform(rng, shape, in_features, dtype)
    if init == "gaussian":
        return Parameter(backend.asarray((rng.standard_normal(shape) / r).astype(dtype)))
    raise ConfigError(f"init_lora_weights must be True or 'gaussian', got {init!r}")


def adapt(base: nn.Linear, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0, *,
          init_lora_weights: bool | str = True, rng: numpy.random.Generator | int | None = None) -> Linear:
    """A `Linear` with a low-rank update on a layer that exists already.

    Parameters
    ----------
    base : nn.Linear
        Its arrays are shared, not copied; the base layer itself is left as it is.
    r, lora_alpha, lora_dropout, init_lora_weights, rng
        As in `Linear`.

    Raises
    ------
    ConfigError
        For a setting outside its range.
    DTypeError
        If `base` is not an `nn.Linear`.

    Examples
    --------
    >>> import numpy, minilora
    >>> base = minilora.nn.Linear(4, 3, rng=numpy.random.default_rng(0))
    >>> adapted = minilora.lora.adapt(base, r=2, lora_alpha=4, rng=numpy.random.default_rng(1))
    >>> x = minilora.tensor(numpy.ones((5, 4), "float32"))
    >>> bool((adapted(x).data == base(x).data).all())  # B = 0: the same output
    True
    """
    if not isinstance(base, nn.Linear):
        hint = "it has an update already" if isinstance(base, Linear) else "only nn.Linear can be adapted"
        raise DTypeError(f"adapt: expected an nn.Linear, got {type(base).__name__}: {hint}")
    adapted = Linear.__new__(Linear)
    adapted._adapt(base, r, lora_alpha, lora_dropout, init_lora_weights, rng)
    return adapted
