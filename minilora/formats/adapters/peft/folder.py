"""The dialect of PEFT: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ....errors import ConfigError, FormatError
from ....lora.config import Config
from ..dialect import Source, Written
from ..diffusers import in_pipeline
from ..saved import SavedAdapter
from .keys import PREFIX, WRAPPERS, is_part
from .reading import read_tensors
from .settings import read_settings
from .writing import written

__all__ = ["Peft"]


class Peft:
    """What PEFT 0.21 writes, and what older versions wrote."""

    name = "peft"

    def recognise(self, source: Source) -> bool:
        """By `peft_type` in the config; without a config by the names of the tensors."""
        if source.config is not None:
            return "peft_type" in source.config or ("lora_alpha" in source.config and "fine_tune_type" not in source.config)
        if "lora_adapter_metadata" in source.metadata:  # diffusers' file of a single model: the same keys, nothing in front
            return any(PREFIX in f"{key}." for key in source.tensors)
        return any(PREFIX in f"{key}." or key.startswith(tuple(f"{w}." for w in WRAPPERS)) or
                   (is_part(key) and not key.endswith(".magnitude") and not in_pipeline(key)) for key in source.tensors)

    def read(self, source: Source, *, config: Config | None = None, allow_settings: Sequence[str] = ()) -> SavedAdapter:
        """What the folder says.

        Parameters
        ----------
        source : Source
        config : Config, optional
            For tensors without a config file. One that is there counts.
        allow_settings : list of str
            Settings in the config file that are on and unknown here, and that are to be passed over.
        """
        if config is not None and not isinstance(config, Config):
            raise ConfigError(f"config: expected a lora.Config, got {type(config).__name__}")
        if isinstance(allow_settings, str) or not all(isinstance(name, str) for name in allow_settings):
            raise ConfigError(f"allow_settings: expected a list of names, got {allow_settings!r}")
        notes: tuple[str, ...] = ()
        if source.config is not None:
            config, notes = read_settings(source.path, source.config, allow_settings)
        elif config is None:
            raise FormatError(
                f"{source.path}: tensors of a PEFT adapter, and no adapter_config.json beside them. Without it nobody knows "
                "lora_alpha, hence the scaling: put the file beside it, or give config=lora.Config(r=..., lora_alpha=..., "
                "target_modules=[...])")
        adapter = read_tensors(str(source.path), source.tensors, config)
        return dataclasses.replace(adapter, metadata=dict(source.metadata), notes=notes + adapter.notes)

    def write(self, adapter: SavedAdapter) -> Written:
        """The same adapter as PEFT writes it: from this folder it computes the same updates."""
        return written(adapter)
