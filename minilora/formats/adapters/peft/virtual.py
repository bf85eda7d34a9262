"""PEFT's folders of prefix and prompt tuning: one tensor, and a config that says how to read it. Damaged ones are refused.

    adapter_model.safetensors    prompt_embeddings: (N, 2 L D) or (N, d); base_model.<path>: modules trained with it
    adapter_config.json          peft_type PREFIX_TUNING or PROMPT_TUNING, num_virtual_tokens, num_layers, token_dim ...
    minilora_prefix.safetensors  ours: P0 and the MLP, of which PEFT's file holds what they make, and which PEFT cannot train on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from ....errors import ConfigError, FileError, FormatError
from ....lora.config_checks import is_off
from ....shown import shown
from ....tuners.config import PrefixConfig, PromptConfig
from ..dialect import Source
from ..faults import Faults, shortened
from ..found import CONFIG, find, read_json
from ..reading import nonfinite
from .writing import VERSION

__all__ = ["FORMAT", "MLP", "OURS", "RESUMABLE", "SavedPrefix", "is_virtual", "is_virtual_folder", "read_prefix",
           "settings_of"]

Array = Any
RESUMABLE, FORMAT = "minilora_prefix.safetensors", "minilora.prefix/1"
MLP = ("embedding", "hidden_weight", "hidden_bias", "output_weight", "output_bias")
OURS = {"written_by": "minilora"}  # in the metadata
KINDS: dict[str, Any] = {"PREFIX_TUNING": PrefixConfig, "PROMPT_TUNING": PromptConfig}
VALUES, BASE = "prompt_embeddings", "base_model."
FLOATS = ("float16", "bfloat16", "float32", "float64")
APART = {"peft_type": None, "auto_mapping": None, "peft_version": VERSION, "revision": None, "inference_mode": True,
         "num_transformer_submodules": 1}  # settings of PEFT that are none of a prefix, as it writes them


@shown
@dataclasses.dataclass(frozen=True, eq=False)
class SavedPrefix:
    """A prefix or prompt without a model.

    Attributes
    ----------
    config : PrefixConfig or PromptConfig
    values : array
        P (N, 2 L D), or the prompt (N, d).
    saved : mapping of str to array
        Parameters of modules that were trained with it, by path.
    mlp : mapping of str to array
        What makes P, to train it on; empty if the file has none.
    source : str
    ours : bool
        Whether minilora wrote it.
    notes : tuple of str
        What deserves a look.
    """

    config: PrefixConfig | PromptConfig
    values: Array
    saved: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    mlp: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    source: str = "a value"
    ours: bool = True
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        c = self.config
        what = f"prompt of {c.num_virtual_tokens} virtual tokens of {c.token_dim} numbers"
        if isinstance(c, PrefixConfig):
            what = (f"prefix of {c.num_virtual_tokens} virtual tokens, {c.num_layers} layers, {c.num_attention_heads} key and "
                    f"value heads of {int(c.token_dim or 0) // int(c.num_attention_heads or 1)}")
        numbers = int(numpy.prod(self.values.shape))
        lines = [f"{what}: {numbers:,} numbers, {self.values.dtype.name}"]
        lines += [f"made by an MLP of {self.mlp['hidden_weight'].shape[0]}, which can be trained on"] if self.mlp else []
        lines += [f"trained with it: {shortened(path)} {tuple(array.shape)}" for path, array in self.saved.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def is_virtual(config: Mapping[str, Any] | None) -> bool:
    """Whether a config file is of prefix or prompt tuning."""
    return config is not None and config.get("peft_type") in list(KINDS)


def is_virtual_folder(path: Any) -> bool:
    """Whether a folder holds a prefix or a prompt; False for whatever else is there, or wrong."""
    beside = Path(path) / CONFIG
    try:
        return beside.is_file() and is_virtual(read_json(beside))
    except (FormatError, FileError):
        return False


def read_prefix(path: Any, *, name: str | None = None, allow_nonfinite: bool = False) -> SavedPrefix:
    """Read a folder of prefix or prompt tuning, that PEFT or minilora wrote, without a model.

    Parameters
    ----------
    path : path
    name : str, optional
        Of one of several adapters in sub-folders.
    allow_nonfinite : bool
        Take NaN and inf too.

    Raises
    ------
    FileError
        If it cannot be read.
    FormatError
        With all that is damaged, missing, or not understood.
    """
    source = find(path, name)
    if not is_virtual(source.config):
        what = "no adapter_config.json is beside it" if source.config is None else \
            f"its peft_type is {shortened(repr(source.config.get('peft_type')))}"
        cure = "load it with minilora.formats.load_adapter" if source.config is not None else "put the config beside it"
        raise FormatError(f"{source.path}: no prefix and no prompt: {what}. {cure}")
    assert source.config is not None
    config, notes = _config(source)
    faults = Faults()
    saved = {key.removeprefix(BASE): source.tensors[key] for key in source.tensors if key != VALUES}
    _check_tensors(source, config, faults)
    mlp, resumable = {}, source.path.with_name(RESUMABLE)
    if resumable.is_file():
        mlp = _mlp(resumable, config, faults)
    bad = {} if allow_nonfinite else {**nonfinite(source.tensors), **nonfinite(mlp)}
    for key, text in bad.items():
        faults.add(key, text)
    faults.refuse(source.path, "To read it all the same: allow_nonfinite=True" if len(bad) == len(faults) else "")
    ours = OURS.items() <= dict(source.metadata).items()
    return SavedPrefix(config, source.tensors[VALUES], saved, mlp, str(source.path), ours, notes)


def _config(source: Source) -> tuple[PrefixConfig | PromptConfig, tuple[str, ...]]:
    data = dict(source.config or {})
    kind = KINDS[data["peft_type"]]
    fields = {field.name for field in dataclasses.fields(kind)}
    unknown = {name: value for name, value in data.items() if name not in fields and name not in APART}
    problems = [f"{shortened(name)}: {shortened(repr(value))}: there is no such setting" for name, value in unknown.items()
                if not is_off(value)]
    if data.get("num_transformer_submodules") not in (None, 1):
        problems.append(f"num_transformer_submodules: {shortened(repr(data['num_transformer_submodules']))}: for a model with "
                        "an encoder and a decoder, which minilora has none of")
    try:
        config = kind.from_dict(data)
    except (ConfigError, TypeError) as error:
        problems += [shortened(line.strip(), 400) for line in str(error).splitlines()[1:]] or [shortened(error)]
    else:
        needed = ("token_dim", "num_layers", "num_attention_heads") if kind is PrefixConfig else ("token_dim",)
        problems += [f"{name}: missing" for name in needed if getattr(config, name) is None]
        if not problems and kind is PrefixConfig and config.token_dim % config.num_attention_heads:
            problems.append(f"token_dim: {config.token_dim} is no multiple of num_attention_heads, "
                            f"{config.num_attention_heads}")
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise FormatError("\n  ".join([f"{source.path}: adapter_config.json: {count}", *problems]))
    off = [f"settings that minilora does not know, and that are off: {', '.join(map(shortened, sorted(unknown)))}"]
    return config, tuple(off if unknown else ())


def _check_tensors(source: Source, config: Any, faults: Faults) -> None:
    width = config.token_dim * (2 * int(config.num_layers or 0) if isinstance(config, PrefixConfig) else 1)
    expected = config.num_virtual_tokens, width
    if VALUES not in source.tensors:
        faults.add(VALUES, f"missing: expected {expected}")
    for key in source.tensors:
        array = source.tensors[key]
        if array.dtype.name not in FLOATS:
            faults.add(key, f"{array.dtype.name}: expected one of {', '.join(FLOATS)}", array)
        elif key == VALUES and tuple(array.shape) != expected:
            letters = "(N, 2 num_layers token_dim)" if isinstance(config, PrefixConfig) else "(N, token_dim)"
            faults.add(key, f"expected {expected} = {letters} by the config", array)
        elif key != VALUES and not key.startswith(BASE):
            faults.add(key, f"neither {VALUES} nor a parameter of the model, {BASE}...", array)


def _mlp(path: Path, config: Any, faults: Faults) -> dict[str, Array]:
    """P0 and the MLP of our own file, if this is what it says."""
    from ...tensors.reading import open_state

    state = open_state(path)
    if state.metadata.get("format") != FORMAT or not isinstance(config, PrefixConfig):
        faults.add(path.name, f"expected a file of the format {FORMAT!r} beside a prefix, got "
                   f"{shortened(state.metadata.get('format'))!r}")
        return {}
    e = int(config.token_dim or 0)
    h = config.encoder_hidden_size or e
    width = 2 * int(config.num_layers or 0) * e
    shapes: dict[str, Any] = {"embedding": (config.num_virtual_tokens, e), "hidden_weight": (h, e), "hidden_bias": (h,),
                              "output_weight": (width, h), "output_bias": (width,)}
    for key in {**shapes, **dict.fromkeys(state)}:
        if key not in state or key not in shapes:
            faults.add(f"{path.name}: {key}", "missing" if key in shapes else "unexpected")
        elif tuple(state[key].shape) != shapes[key] or state[key].dtype.name not in FLOATS:
            faults.add(f"{path.name}: {key}", f"expected {shapes[key]} of floats, got {state[key].dtype.name}", state[key])
    return dict(state)


def settings_of(config: PrefixConfig | PromptConfig, task_type: str | None) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it."""
    data = {**APART, **config.to_dict()}
    return {**data, "task_type": config.task_type or task_type}
