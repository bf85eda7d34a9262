"""What is trained under one name: a prefix, with or without the MLP that makes it, or a prompt.

Prefix tuning trains keys and values in front of those of each layer. P (N, 2 L D) holds them, for N virtual tokens, L layers
and D = KV hd numbers a token; seen as (N, 2 L, KV, hd), index 2 l are the keys of layer l and 2 l + 1 its values. Trained is P
itself, or a smaller table P0 (N, e) and an MLP, with D = e:

    u = P0 W1^T + b1    (N, h)        g = tanh(u)        P = g W2^T + b2    (N, 2 L D)

Backward, with dP from the layers, each of which gives the slices that it read (`ops.prefix_attention`: dK and dV, sums over
the batch) and zeros elsewhere:

    db2 = sum_n dP_n        dW2 = dP^T g        dg = dP W2
    du = dg (1 - g^2)       db1 = sum_n du_n    dW1 = du^T P0        dP0 = du W1

All of it is `ops.linear`, `ops.tanh` and views. After training the MLP is of no more use: P alone is computed with.

Prompt tuning trains vectors (N, d) that go in before those of the tokens; each text looks up the same rows, so their gradient
is the sum over the batch that `ops.embedding` takes.

Sources: Li and Liang 2021, arXiv 2101.00190, section 4.3; Lester et al. 2021, arXiv 2104.08691.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from .. import backend, ops
from ..errors import ConfigError, ShapeError
from ..nn.front import FrontSizes
from ..nn.initial import first
from ..nn.linear import uniform
from ..nn.module import Module
from ..ops.indices import integers
from ..tensor import Parameter, Tensor
from .config import PrefixConfig, PromptConfig, VirtualConfig

__all__ = ["Prefix", "Prompt", "Virtual", "fitted", "made", "trained_dtype"]

Array = Any


def trained_dtype(dtype: Any) -> Any:
    """Of what is trained in front of a model of this dtype: float32 at least, as a step of Adam is lost in half precision."""
    return numpy.result_type(numpy.dtype(dtype), numpy.float32)


class Virtual(Module):
    """What stands in front under one name.

    Attributes
    ----------
    config : VirtualConfig
        With the sizes of the model.
    embedding : Parameter
    heads : tuple of str
        Paths of modules of the model that are trained with it.
    metadata : dict of str to str
        That of the file it came from.
    """

    config: VirtualConfig
    embedding: Parameter

    def __init__(self, config: Any, embedding: Parameter, heads: Sequence[str] = ()) -> None:
        self.config, self.embedding, self.heads = config, embedding, tuple(heads)
        self.metadata: dict[str, str] = {}

    @property
    def N(self) -> int:
        return self.config.num_virtual_tokens

    def values(self) -> Tensor:
        """What files hold: P (N, 2 L D), or the prompt (N, d)."""
        return self.embedding

    def dtype_for(self, dtype: Any) -> Any:
        return trained_dtype(dtype)

    def extra_repr(self) -> str:
        return f"{self.N} virtual tokens, {', '.join(map(str, self.embedding.shape))}"


class Prompt(Virtual):
    """Vectors in front of the embedded tokens: embedding (N, d)."""

    config: PromptConfig


class Prefix(Virtual):
    """Keys and values in front of those of each layer, with the mathematics at the top of this file.

    Attributes
    ----------
    embedding : Parameter
        P (N, 2 L D), or with the MLP P0 (N, e).
    hidden_weight, hidden_bias, output_weight, output_bias : Parameter or None
        W1 (h, e), b1 (h,), W2 (2 L D, h), b2 (2 L D,).
    """

    config: PrefixConfig
    hidden_weight: Parameter | None
    hidden_bias: Parameter | None
    output_weight: Parameter | None
    output_bias: Parameter | None
    PARTS = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")

    def __init__(self, config: PrefixConfig, embedding: Parameter, heads: Sequence[str] = (),
                 mlp: tuple[Parameter, Parameter, Parameter, Parameter] | None = None) -> None:
        super().__init__(config, embedding, heads)
        self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias = mlp or (None, None, None, None)

    def values(self) -> Tensor:
        if self.hidden_weight is None or self.output_weight is None:
            return self.embedding
        g = ops.tanh(ops.linear(self.embedding, self.hidden_weight, self.hidden_bias))
        return ops.linear(g, self.output_weight, self.output_bias)

    def by_layers(self) -> Tensor:
        """(2 L, KV, N, hd): keys and values of every layer."""
        config = self.config
        heads = int(config.num_attention_heads or 1)
        P = ops.reshape(self.values(), (self.N, 2 * int(config.num_layers or 1), heads, int(config.token_dim or 1) // heads))
        return ops.transpose(P, (1, 2, 0, 3))

    def folded(self) -> Prefix:
        """Without the MLP: what it makes, as a table of its own."""
        from ..engine import no_grad

        with no_grad():
            P = Parameter(self.values().data.copy())
        twin = Prefix(dataclasses.replace(self.config, prefix_projection=False), P, self.heads)
        twin.metadata = self.metadata
        return twin.train(self.training)

    def extra_repr(self) -> str:
        mlp = "" if self.hidden_weight is None else f" by an MLP of {self.hidden_weight.shape[0]}"
        return f"{self.config.num_layers} layers, {super().extra_repr()}{mlp}"


def fitted(config: VirtualConfig, sizes: FrontSizes) -> Any:
    """The config with the sizes of the model; `ConfigError` with all that are others."""
    prefix = isinstance(config, PrefixConfig)
    own: dict[str, Any]
    heads = sizes.heads if prefix or config.num_attention_heads is None else config.num_attention_heads
    own = {"num_layers": sizes.layers, "num_attention_heads": heads,
           "token_dim": sizes.heads * sizes.head_dim if prefix else sizes.width}
    words = {"num_layers": "layers", "num_attention_heads": "key and value heads" if prefix else "heads",
             "token_dim": f"{sizes.heads} key and value heads of {sizes.head_dim}" if prefix else "numbers of a token"}
    wrong = [f"{name}: {getattr(config, name)}, and this model has {value} ({words[name]})" for name, value in own.items()
             if getattr(config, name) not in (None, value)]
    if wrong:
        raise ConfigError("\n  ".join([f"{config.peft_type}: it is for another model:", *wrong]))
    if isinstance(config, PrefixConfig) and config.encoder_hidden_size is None:
        own["encoder_hidden_size"] = own["token_dim"]
    return dataclasses.replace(config, **own)


def made(config: Any, sizes: FrontSizes, table: Parameter, rng: numpy.random.Generator, token_ids: Any = None) -> Virtual:
    """A new one, as PEFT begins: drawn on the host from N(0, 1), an MLP as `nn.Linear`, or the vectors of tokens.

    Parameters
    ----------
    config : PrefixConfig or PromptConfig
        As `fitted` gives it.
    sizes : FrontSizes
    table : Parameter, shape (V, d)
        The embedding of the model.
    rng : numpy.random.Generator
    token_ids : sequence of int, optional
        For a prompt: the tokens whose vectors it begins with, from the first again if they are fewer than N.
    """
    N, dtype = config.num_virtual_tokens, trained_dtype(table.dtype)

    def normal(*shape: int) -> Parameter:
        return first(shape, dtype, lambda: rng.standard_normal(shape))

    if isinstance(config, PromptConfig):
        return Prompt(config, _prompt(config, table, normal, rng, token_ids))
    if token_ids is not None:
        raise ConfigError("token_ids: they are for a prompt (PromptConfig): a prefix is keys and values, not tokens")
    width, zero = 2 * sizes.layers * config.token_dim, config.init_weights == "zero"
    if not config.prefix_projection:
        return Prefix(config, _zeros(dtype, N, width) if zero else normal(N, width))
    e, h = config.token_dim, config.encoder_hidden_size
    table = normal(N, e)
    hidden = uniform(rng, (h, e), e, dtype), uniform(rng, (h,), e, dtype)
    out = (_zeros(dtype, width, h), _zeros(dtype, width)) if zero else (uniform(rng, (width, h), h, dtype),
                                                                        uniform(rng, (width,), h, dtype))
    return Prefix(config, table, (), (*hidden, *out))


def _zeros(dtype: Any, *shape: int) -> Parameter:
    return first(shape, dtype, lambda: numpy.zeros(shape))


def _prompt(config: PromptConfig, table: Parameter, normal: Callable[..., Parameter], rng: numpy.random.Generator,
            token_ids: Any) -> Parameter:
    V, d, N = *table.shape, config.num_virtual_tokens
    if token_ids is None and config.prompt_tuning_init == "RANDOM":
        return normal(N, d)
    if token_ids is None and config.prompt_tuning_init == "TEXT":
        raise ConfigError("prompt_tuning_init='TEXT': give the tokens of the text: tuners.inject(model, config, token_ids="
                          "tokenizer.encode(text).ids)")
    if token_ids is not None and not numpy.size(token_ids):
        raise ShapeError("token_ids: expected a list of ids, at least one, got none")
    ids = rng.integers(0, V, N) if token_ids is None else backend.to_host(integers("token id", token_ids, V))
    if ids.ndim != 1:
        raise ShapeError(f"token_ids: expected a list of ids, got shape {ids.shape}")
    with_ids = ops.embedding(numpy.resize(ids, N), Tensor(table.data))
    return Parameter(with_ids.data.astype(trained_dtype(table.dtype)))
