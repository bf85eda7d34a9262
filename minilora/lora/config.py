"""Config: what to adapt, and how. The names, meanings and defaults of PEFT's LoraConfig."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..shown import tersely
from .config_checks import CHECKS, KNOWN_ELSEWHERE, extra_problems, fits, is_off, nearest
from .gradient import scaling

__all__ = ["ALL_LINEAR", "Config"]

ALL_LINEAR = "all-linear"

# Not settings of an adapter: `peft_type` is always LORA here, and PEFT never stores a runtime_config.
APART = {"peft_type", "runtime_config"}
MAY_BE_EMPTY = {"exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
                "trainable_token_indices", "auto_mapping"}  # in a file: then it says None


@tersely
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
    init_lora_weights : True, False, "gaussian", "pissa", "olora", "orthogonal", "loftq", "eva" or "mica"
        How A and B start. "loftq" quantises the adapted weights too, see `layers.loftq`. "eva" and "mica" are the start of an
        adapter that was trained elsewhere, and False is for tests: both are random, and the model is another one from then on.
    loftq_config : dict
        Of "loftq": loftq_bits, 4 for nf4 (the default) or 8 for int8, and loftq_iter, the number of turns (1).
    fan_in_fan_out : bool
        Whether the adapted weights are stored as (in, out).
    trainable_token_indices : list of int, or dict of str to list of int, optional
        Rows of the token embedding that are trained in place of the base's, or of each embedding whose path ends so.
    task_type, base_model_name_or_path, revision, auto_mapping, inference_mode, peft_version
        What PEFT's files say about themselves and about the base model. Nothing here depends on them; written back as read.
    extra : dict
        Settings of a file that have no field here, all of them off, or about how training began. Written back as read.

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
    loftq_config: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fan_in_fan_out: bool = False
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    inference_mode: bool = False
    peft_version: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __new__(cls, *by_place: Any, **settings: Any) -> Config:
        # Here and not in __post_init__: the generated __init__ would stop at the first unknown name with a TypeError.
        _refuse([*_without_a_name(by_place), *_problems(settings)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("rank_pattern", "alpha_pattern", "loftq_config", "extra"):
                value = {}
            object.__setattr__(self, field.name, _kept(value))

    def scaling_for(self, r: int, lora_alpha: float) -> float:
        """s for a layer of this rank and alpha: `gradient.scaling` with this config's rule."""
        return scaling(lora_alpha, r, self.use_rslora)

    def rank_at(self, path: str) -> int:
        """The rank of a layer: that of the first key of rank_pattern that fits its path, else r."""
        return next((r for key, r in self.rank_pattern.items() if fits(key)(path)), self.r)

    def alpha_at(self, path: str) -> float:
        """lora_alpha of a layer: that of the first key of alpha_pattern that fits its path, else lora_alpha."""
        return next((a for key, a in self.alpha_pattern.items() if fits(key)(path)), self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, under PEFT's names, with those of `extra` among them, and ``peft_type``."""
        fields = {field.name: _for_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"peft_type": "LORA", **fields.pop("extra"), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """A config from PEFT's names, as `to_dict` and adapter_config.json have them.

        A setting without a field here that is off (null, false, or of length 0) is kept in `extra`.

        Raises
        ------
        ConfigError
            With one line for every unknown key and every feature that minilora lacks, if it is switched on; and for every
            value outside its range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"lora.Config: expected a dict of settings, got {type(data).__name__}")
        problems: list[str] = []
        extra: dict[str, Any] = {}
        own: dict[str, Any] = {}
        if data.get("peft_type", "LORA") != "LORA":
            problems.append(f"peft_type: expected 'LORA', got {data['peft_type']!r}: this is another method's file")
        fields = {field.name for field in dataclasses.fields(cls)}
        for name, value in data.items():
            if name in fields:
                empty = name in MAY_BE_EMPTY and value is not False and is_off(value)
                own.update({} if empty else {name: value})
            elif name in KNOWN_ELSEWHERE:
                extra.update({} if value == KNOWN_ELSEWHERE[name] else {name: value})
            elif name not in APART:
                (extra if is_off(value) else own)[name] = value
        _refuse(problems + extra_problems(extra) + _problems(own))
        return cls(**own, extra=extra)


# __new__ takes anything, to name all that is wrong at once; what it is given are the fields.
Config.__signature__ = inspect.signature(Config.__init__).replace(  # type: ignore[attr-defined]
    parameters=[*inspect.signature(Config.__init__).parameters.values()][1:])


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, since JSON has no numpy.int64; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _kept(value: Any) -> Any:
    """What a frozen config keeps of a value: tuples in place of lists, dicts of its own, Python's numbers."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_kept, value))
    if isinstance(value, Mapping):
        return {key: _kept(v) for key, v in value.items()}
    return plain(value)


def _for_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_for_json, value))
    return {key: _for_json(v) for key, v in value.items()} if isinstance(value, dict) else value


def _refuse(problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"lora.Config: {count}", *problems]))


def _without_a_name(values: Sequence[Any]) -> list[str]:
    """A line for values that were given without the names of their fields."""
    if not values:
        return []
    if len(values) == 1 and isinstance(values[0], Mapping):
        return ["a dict was given: write lora.Config(**settings), or lora.Config.from_dict(settings) for one of a file"]
    meant = ", ".join(f"{field.name}={value!r}" for field, value in zip(dataclasses.fields(Config), values))
    return [f"fields are given by name: write lora.Config({meant}), if that is meant"]


def _problems(settings: Mapping[str, Any]) -> list[str]:
    """A line for everything that is wrong with these settings."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    problems = []
    for name in settings:
        if name in KNOWN_ELSEWHERE:
            problems.append(f"{name}: this feature of PEFT is not part of minilora: leave it out")
        elif name in APART:
            problems.append(f"{name}: leave it out: a lora.Config is always of the type LORA, and keeps nothing else about it")
        elif name not in fields:
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
    if values["lora_bias"] and not isinstance(values["init_lora_weights"], bool):
        lines.append(f"lora_bias: only with init_lora_weights=True or False, got {values['init_lora_weights']!r}")
    return lines
