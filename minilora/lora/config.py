"""Config: what to adapt, and how. The names, meanings and defaults of PEFT's LoraConfig."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .config_checks import CHECKS, nearest
from .gradient import scaling

__all__ = ["ALL_LINEAR", "Config"]

ALL_LINEAR = "all-linear"

# What PEFT writes into adapter_config.json beside the fields of Config: about the file, not about the update.
ABOUT_THE_FILE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
                  "runtime_config", "task_type"}
# And features that minilora lacks, with the values under which they do nothing.
ABSENT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config",
                     "kasa_config", "layer_replication", "loftq_config", "lora_ga_config", "megatron_config",
                     "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
                     "velora_config"), (None, False, {}, [])),
    "megatron_core": (None, "megatron.core"),
    "qalora_group_size": (None, 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which layers get a low-rank update, and of what kind. Frozen; `dataclasses.replace` makes a changed copy.

    Parameters
    ----------
    r : int
        Rank of the updates.
    lora_alpha : float
        Numerator of the scaling s = lora_alpha / r.
    lora_dropout : float
        Probability in [0, 1) with which an element of an adapter's input is dropped in training.
    target_modules : list of str, or str
        Names: a layer is adapted if its dotted path is one of them, or ends in ``"." + name``. A string is a regular
        expression that must match the whole path, or ``"all-linear"``: every Linear but an output head.
    exclude_modules : list of str, or str, optional
        Read in the same way; wins over `target_modules`.
    layers_to_transform : int or list of int, optional
        Adapt in these layers of a model only: the number is the first one in the path (3 in ``"model.layers.3.mlp.up"``).
        A name in `target_modules` that is a whole path counts in any layer. Not with a string in `target_modules`.
    layers_pattern : str or list of str, optional
        Regular expression for the name in front of that number, for models with several lists. In it and in the keys below,
        flags have a scope: ``"(?i:layers)"``.
    rank_pattern, alpha_pattern : dict of str to int, dict of str to float
        Other values of r and lora_alpha for some layers. A key is a regular expression for the whole path or for the end of
        it behind a dot; ``"^..."`` for the whole path only. The first key that matches counts.
    bias : {"none", "all", "lora_only"}
        Which biases of the base are trained: none, all, or those of adapted layers.
    modules_to_save : list of str, optional
        Modules that are trained as a whole and saved with the adapter, such as a new output head. None inside another.
    use_rslora : bool
        s = lora_alpha / sqrt(r) in place of lora_alpha / r.
    use_dora : bool
        Train the length of each row of the weight apart from its direction.
    lora_bias : bool
        Give the update a bias.
    init_lora_weights : True, "gaussian", "pissa", "olora" or "orthogonal"
        How A and B start.
    fan_in_fan_out : bool
        Whether the adapted weights are stored as (in, out).

    Raises
    ------
    ConfigError
        With one line for every unknown name and every value outside its range.

    Notes
    -----
    Lists are kept as tuples. What a config hits in a given model is told by `match`, and what that costs by `plan`.

    Examples
    --------
    >>> config = Config(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    >>> config.scaling_for(config.r, config.lora_alpha)
    2.0
    >>> Config.from_dict(config.to_dict()) == config
    True
    >>> Config(rank=4, lora_dropout=1.5)
    Traceback (most recent call last):
    minilora.errors.ConfigError: lora.Config: 2 problems
      rank: there is no such setting. Is 'rank_pattern' meant, or r?
      lora_dropout: dropout must be a number in [0, 1), got 1.5: 1 would drop everything
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False

    def __new__(cls, **settings: Any) -> Config:
        # Here and not in __post_init__: the generated __init__ would stop at the first unknown name with a TypeError.
        _refuse(_problems(settings))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (list, tuple, set, frozenset)):
                value = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
                value = tuple(map(int, value)) if field.name == "layers_to_transform" else value
            elif isinstance(value, Mapping) or (value is None and field.name in ("rank_pattern", "alpha_pattern")):
                value = {key: plain(v) for key, v in (value or {}).items()}
            else:
                value = plain(value)
            object.__setattr__(self, field.name, value)

    def scaling_for(self, r: int, lora_alpha: float) -> float:
        """s for a layer of this rank and alpha: `gradient.scaling` with this config's rule."""
        return scaling(lora_alpha, r, self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, under PEFT's names, and ``peft_type``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"peft_type": "LORA", **{name: list(value) if isinstance(value, tuple) else
                                        dict(value) if isinstance(value, dict) else value for name, value in fields.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """A config from PEFT's names, as `to_dict` and adapter_config.json have them.

        Keys about the file (``base_model_name_or_path``, ``task_type`` ...) are left out, and so are features of PEFT that
        minilora lacks, where they are switched off.

        Raises
        ------
        ConfigError
            With one line for every unknown key, every feature that minilora lacks, and every value outside its range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"lora.Config: expected a dict of settings, got {type(data).__name__}")
        problems = []
        if data.get("peft_type", "LORA") != "LORA":
            problems.append(f"peft_type: expected 'LORA', got {data['peft_type']!r}: this is another method's file")
        for name in ABSENT.keys() & data.keys():
            if data[name] not in ABSENT[name]:
                problems.append(f"{name}: this feature of PEFT is not part of minilora, got {data[name]!r}")
        own = {name: value for name, value in data.items() if name not in ABOUT_THE_FILE and name not in ABSENT}
        own = {name: value for name, value in own.items() if value not in ([], "") or name == "target_modules"}  # as None
        _refuse(sorted(problems) + _problems(own))
        return cls(**own)


# __new__ takes anything, to name all that is wrong at once; what it is given are the fields.
Config.__signature__ = inspect.signature(Config.__init__).replace(  # type: ignore[attr-defined]
    parameters=[*inspect.signature(Config.__init__).parameters.values()][1:])


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, since JSON has no numpy.int64; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _refuse(problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"lora.Config: {count}", *problems]))


def _problems(settings: Mapping[str, Any]) -> list[str]:
    """A line for everything that is wrong with these settings."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    problems = []
    for name in settings:
        if name not in fields:
            close = nearest(str(name), fields, 1)
            meant = " Is 'rank_pattern' meant, or r?" if name == "rank" else f" Is {close[0]!r} meant?" if close else ""
            problems.append(f"{name}: there is no such setting.{meant or ' The settings are ' + ', '.join(fields)}")
    defaults = {name: {} if field.default is dataclasses.MISSING else field.default for name, field in fields.items()}
    values = {**defaults, **{name: value for name, value in settings.items() if name in fields}}
    for name, check in CHECKS.items():
        try:
            text = check(values[name])
        except ConfigError as error:
            text = str(error)
        if text:
            problems.append(text if text.startswith(f"{name} ") else f"{name}: {text}")
    return problems + ([] if problems else _conflicts(values))


def _conflicts(values: Mapping[str, Any]) -> list[str]:
    """A line for every pair of settings, each sound in itself, that contradict each other."""
    lines = []
    if isinstance(values["target_modules"], str):
        for name in ("layers_to_transform", "layers_pattern"):
            if values[name] is not None:
                lines.append(f"{name}: works with a list in target_modules only, not with {values['target_modules']!r}: put "
                             "the layer numbers into the regular expression, or give names")
    elif values["layers_pattern"] is not None and values["layers_to_transform"] is None:
        lines.append("layers_pattern: says where the numbers of layers_to_transform stand: give layers_to_transform too")
    if values["lora_bias"] and values["use_dora"]:
        lines.append("lora_bias: not together with use_dora")
    if values["lora_bias"] and values["init_lora_weights"] is not True:
        lines.append(f"lora_bias: only with init_lora_weights=True, got {values['init_lora_weights']!r}")
    return lines
