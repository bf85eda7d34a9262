"""What stands in front, and how it begins: the names and meanings of PEFT's PrefixTuningConfig and PromptTuningConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import ConfigError
from ..settings import whole
from ..shown import tersely

__all__ = ["PrefixConfig", "PromptConfig", "VirtualConfig"]

CLASSES = ("SEQ_CLS", "TOKEN_CLS")  # task types for which PEFT trains what is called so, if there is such a module
HEADS = ("classifier", "score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualConfig:
    """What prefix and prompt tuning share. Take `PrefixConfig` or `PromptConfig`.

    Parameters
    ----------
    num_virtual_tokens : int
        N: how many stand in front.
    token_dim, num_layers, num_attention_heads : int, optional
        Those of the model: found when it is injected, and compared if given. For a prefix with fewer heads of keys than of
        queries num_attention_heads is the number of the former, and token_dim is that times the numbers of a head.
    modules_to_save : list of str, optional
        Modules that are trained too and saved with it, such as a new output head: they are trained where they are.
    task_type : str, optional
        As in PEFT. With SEQ_CLS and TOKEN_CLS modules called classifier or score are trained too.
    base_model_name_or_path : str, optional
    """

    num_virtual_tokens: int
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    peft_type: ClassVar[str]

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError("\n  ".join([f"{type(self).__name__}: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
                                           *problems]))

    def problems(self) -> list[str]:
        """One line for each field that is out of range."""
        found = []
        for name in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", *self.more_sizes()):
            value = getattr(self, name)
            if value is None and name != "num_virtual_tokens":
                continue
            try:
                object.__setattr__(self, name, whole(name, value))
            except ConfigError as error:
                found.append(str(error))
        saved = self.modules_to_save
        if saved is not None and (not isinstance(saved, (list, tuple)) or not all(isinstance(s, str) and s for s in saved)):
            found.append(f"modules_to_save must be a list of names, got {saved!r}")
        for name in ("task_type", "base_model_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                found.append(f"{name} must be a text or None, got {getattr(self, name)!r}")
        return found

    def more_sizes(self) -> tuple[str, ...]:
        """Fields of a subclass that are sizes or None."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT's adapter_config.json has them."""
        return {"peft_type": self.peft_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """From such fields; others are left aside. `ConfigError` if one is out of range."""
        names = {field.name for field in dataclasses.fields(cls)}
        if "num_virtual_tokens" not in data:
            raise ConfigError(f"{cls.__name__}: num_virtual_tokens is missing")
        return cls(**{name: value for name, value in data.items() if name in names})


@tersely
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig(VirtualConfig):
    """Prefix tuning: keys and values in front of those of every layer. Besides `VirtualConfig`:

    Parameters
    ----------
    prefix_projection : bool
        Train a table (N, e) and an MLP that makes the keys and values of it, which trains more steadily; e is token_dim.
    encoder_hidden_size : int, optional
        h, the width of that MLP; token_dim by default.
    init_weights : {None, "zero"}
        None: drawn. "zero": keys and values begin as zeros.

    Examples
    --------
    >>> PrefixConfig(num_virtual_tokens=0, init_weights="ones")
    Traceback (most recent call last):
    minilora.errors.ConfigError: PrefixConfig: 2 problems
      num_virtual_tokens must be an int >= 1, got 0
      init_weights must be None or 'zero', got 'ones'
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.prefix_projection, bool):
            found.append(f"prefix_projection must be True or False, got {self.prefix_projection!r}")
        if self.init_weights not in (None, "zero"):
            found.append(f"init_weights must be None or 'zero', got {self.init_weights!r}")
        return found

    def more_sizes(self) -> tuple[str, ...]:
        return ("encoder_hidden_size",)


@tersely
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig(VirtualConfig):
    """Prompt tuning: vectors in front of the embedded tokens. Besides `VirtualConfig`:

    Parameters
    ----------
    prompt_tuning_init : {"RANDOM", "SAMPLE_VOCAB", "TEXT"}
        Drawn; vectors of tokens that are drawn; those of the tokens of a text, whose ids `tuners.inject` is given.
    prompt_tuning_init_text, tokenizer_name_or_path : str, optional
        As in PEFT: written into files, and not read here.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            found.append(f"prompt_tuning_init must be 'RANDOM', 'SAMPLE_VOCAB' or 'TEXT', got {self.prompt_tuning_init!r}")
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                found.append(f"{name} must be a text or None, got {getattr(self, name)!r}")
        return found
