"""The Llama family: what its members have, each with the names and defaults of its config.json.

    member     biases            per head   window of keys                            d / heads = hd
    Llama      attention_bias    none       none                                      or head_dim
               (q, k, v, o),
               mlp_bias
    Mistral    none              none       sliding_window, in every layer            or head_dim
    Qwen2      q, k, v           none       where use_sliding_window, in the layers   always
                                            from max_window_layers on
    Qwen3      attention_bias    RMSNorm    the same                                  head_dim, 128 by default
               (q, k, v, o)      of q, k

Everything else is one model: `Llama` builds any of them, and asks its config for what differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ... import ops
from ...errors import ConfigError
from ...ops.rotary_scaling import check_rotary_scaling
from ...settings import whole
from ..activations import check_activation
from ..checks import check_config, check_multiple, check_tied

__all__ = ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"]

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class RotaryDecoder:
    """What all members have. Not made by itself; see `LlamaConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    classifier_dropout: float = 0.0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "max_position_embeddings"]
        sizes += [name for name in ("num_key_value_heads", "head_dim") if getattr(self, name) is not None]
        check_config(self, sizes, ["rms_norm_eps", "rope_theta", "initializer_range"], ["classifier_dropout"])
        if self.num_key_value_heads is not None:
            check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            check_multiple(self, "hidden_size", "num_attention_heads")
        if self.heads[2] % 2:
            raise ConfigError(f"{kind}: head_dim must be even, got {self.heads[2]}: rotary positions turn its halves as pairs")
        check_activation(self, "hidden_act")
        check_tied(self)
        for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
            if not isinstance(getattr(self, name, False), bool):
                raise ConfigError(f"{kind}: {name} must be True or False, got {getattr(self, name)!r}")
        pad = self.pad_token_id
        if pad is not None and not (type(pad) is int and -self.vocab_size <= pad < self.vocab_size):
            raise ConfigError(f"{kind}: pad_token_id must be None or an int in [-{self.vocab_size}, {self.vocab_size}), got "
                              f"{pad!r}")
        object.__setattr__(self, "rope_scaling", check_rotary_scaling(self.rope_scaling))
        ops.scaled_rotary_frequencies(self.heads[2], self.rope_theta, self.rope_scaling, self.max_position_embeddings)

    @property
    def heads(self) -> tuple[int, int, int]:
        """H heads of queries, KV heads of keys and values, and hd, the numbers of a head."""
        H = self.num_attention_heads
        return H, self.num_key_value_heads or H, self.head_dim or self.hidden_size // H

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """Whether q, k and v, whether o, and whether the MLP have biases."""
        return False, False, False

    @property
    def norm_heads(self) -> bool:
        """Whether queries and keys are normalised in every head."""
        return False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For every layer how many keys a query sees at most; None for all."""
        return (None,) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True)
class LlamaConfig(RotaryDecoder):
    """The shape of a Llama, with the names and defaults of its config.json: the first model of 7 billion.

    Parameters
    ----------
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads : int
        V, d, width of the MLP, layers, heads.
    num_key_value_heads : int, optional
        Heads of keys and values, of which num_attention_heads is a multiple; num_attention_heads by default.
    head_dim : int, optional
        Even; hidden_size / num_attention_heads by default.
    hidden_act : str
        Of the gate of the MLP.
    max_position_embeddings : int
        No limit here; some kinds of rope_scaling count from it.
    rms_norm_eps : float
    rope_theta : float
        Base of the rotary frequencies.
    rope_scaling : mapping, optional
        How they are changed for long texts; see `ops.scaled_rotary_frequencies`.
    tie_word_embeddings : bool
        Make the logits with the embedding's table, without an lm_head.
    initializer_range : float
        Standard deviation of the initial weights.
    pad_token_id : int, optional
        The id whose vector starts as zeros and is not trained; negative ones count from the end of the table, as old files have
        it. A classifier of texts takes the last token that is another.
    classifier_dropout : float
        Dropout in training, in front of a classifier of tokens. 0 here, 0.1 in the files.
    attention_bias, mlp_bias : bool
        Whether all linear layers of the attention, and of the MLP, have biases.

    Raises
    ------
    ConfigError
        With one line for every field that is out of range.

    Examples
    --------
    >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    >>> config.heads
    (4, 2, 16)
    """

    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, self.mlp_bias


@dataclasses.dataclass(frozen=True)
class MistralConfig(RotaryDecoder):
    """The shape of a Mistral: Mistral 7B by default. Without biases.

    Parameters
    ----------
    vocab_size ... classifier_dropout
        As in `LlamaConfig`.
    sliding_window : int, optional
        How many keys a query sees at most, its own among them; None for all.

    Examples
    --------
    >>> MistralConfig().heads, set(MistralConfig().windows)
    ((32, 8, 128), {4096})
    """

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True)
class Windowed(RotaryDecoder):
    """What Qwen2 and Qwen3 have. Not made by itself; see `Qwen2Config`."""

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "max_window_layers", whole(f"{type(self).__name__}: max_window_layers",
                                                            self.max_window_layers, 0))
        check_window(self)
        if self.layer_types is None:
            return
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        strange = sorted({str(kind) for kind in self.layer_types} - {FULL, SLIDING})
        if strange or len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(f"{type(self).__name__}: layer_types must say {FULL} or {SLIDING} for each of "
                              f"{self.num_hidden_layers} layers, got {len(self.layer_types)}"
                              + (f", among them {', '.join(strange)}" if strange else ""))

    @property
    def windows(self) -> tuple[int | None, ...]:
        window = self.sliding_window if self.use_sliding_window else None
        kinds = self.layer_types or [FULL if i < self.max_window_layers else SLIDING for i in range(self.num_hidden_layers)]
        return tuple(window if kind == SLIDING else None for kind in kinds)


@dataclasses.dataclass(frozen=True)
class Qwen2Config(Windowed):
    """The shape of a Qwen2 (Qwen2.5 too). Biases on queries, keys and values.

    Parameters
    ----------
    vocab_size ... classifier_dropout
        As in `LlamaConfig`; head_dim is hidden_size / num_attention_heads.
    use_sliding_window : bool
        Whether any layer has a window.
    sliding_window : int, optional
        How many keys a query of such a layer sees at most, its own among them.
    max_window_layers : int
        The first layer with a window: those before see all keys.
    layer_types : sequence of str, optional
        ``"full_attention"`` or ``"sliding_attention"`` for every layer, in the place of max_window_layers.

    Examples
    --------
    >>> Qwen2Config(num_hidden_layers=3, use_sliding_window=True, max_window_layers=1, sliding_window=8).windows
    (None, 8, 8)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ConfigError(f"Qwen2Config: head_dim is hidden_size / num_attention_heads = {self.hidden_size} / "
                              f"{self.num_attention_heads} here, got {self.head_dim}: is it a Qwen3?")

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return True, False, False


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Windowed):
    """The shape of a Qwen3: queries and keys are normalised in every head, and head_dim is a number of its own.

    Parameters
    ----------
    vocab_size ... layer_types
        As in `Qwen2Config`.
    attention_bias : bool
        Whether all linear layers of the attention have biases.

    Examples
    --------
    >>> Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8).heads
    (16, 8, 128)
    """

    head_dim: int | None = 128
    attention_bias: bool = False

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        return self.attention_bias, self.attention_bias, False

    @property
    def norm_heads(self) -> bool:
        return True


def check_window(config: Any) -> None:
    """Make the field sliding_window a Python int; `ConfigError` unless it is None or an int >= 1."""
    if config.sliding_window is not None:
        window = whole(f"{type(config).__name__}: sliding_window", config.sliding_window)
        object.__setattr__(config, "sliding_window", window)
