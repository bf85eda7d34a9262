"""What a family of models must say of itself, so that its checkpoints are read and written.

A checkpoint is a config.json and tensors. A family says which fields make its config, which heads there are and what
transformers calls them, and where the names or the orientation of its tensors differ from ours. Everything else, the reading,
the checks, the matching of names and the writing, is done once, in `checkpoints`, from this description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


__all__ = ["Family", "Head"]


@dataclasses.dataclass(frozen=True)
class Head:
    """One use of a family: a body, and what stands on it.

    Attributes
    ----------
    architecture : str
        What transformers calls the class, as in "architectures" of config.json.
    model : type
        Ours: ``model(config, *, dtype, rng)``, or ``model(config, labels, *, dtype, rng)`` if `labelled`. No two heads of a
        family have one model.
    labelled : bool
        Whether it takes `Labels`: a classifier does.
    body : str
        In front of the names of the body's parameters in our model: ``"bert."``; nothing where they stand at the root.
    tied : mapping of str to str
        Names that a file may hold although they are copies of others, as transformers calls both: such tensors are compared,
        and not taken. Names that our model has by itself (a head that is not tied) are none.
    optional : mapping of str to str
        The beginning of names that a file may lack, as transformers calls them, to the attribute that is None then.
    fixed : mapping of str to tuple
        As `Family.fixed`, for this head only.
    aliases : tuple of str
        Other classes of transformers whose files hold this head, with parts beside it that are left aside.
    """

    architecture: str
    model: type[Any]
    labelled: bool = False
    body: str = ""
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of one `model_type`.

    Attributes
    ----------
    model_type : str
        As in config.json.
    config : type
        The dataclass of ours. A field is read from, and written to, the field of that name in config.json; those that are
        named otherwise, or made from several, in `read` and `write` of a subclass. Its `__post_init__` checks them. No two
        families have one config (a subclass without a line of its own is enough), for `save` finds the family by it.
    prefix : str
        In front of the body's names in files of models with a head: ``"bert."``. Files of a bare body lack it; both are read.
    heads : mapping of str to Head
        By what `load(head=...)` calls them: ``"base"``, ``"causal_lm"``, ``"masked_lm"``, ``"sequence_classification"``,
        ``"token_classification"``.
    layers : str
        The field of `config` that says how many layers there are.
    others : tuple of str
        Beginnings of names of all heads, and, behind `prefix`, of parts of the body that some heads lack (``"bert.pooler."``).
        Where the model that is made has no such part they are left aside, and noted. Whatever else is
        unexpected is refused.
    defaults : mapping
        What a field means that config.json leaves out, where that is not the default of `config`: transformers' dropouts.
    fixed : mapping of str to tuple
        Fields that change the function, and are computed in one way here: the values that mean that way; the first of them is
        what a file means that leaves the field out. Any other value is refused.
    lacking : tuple of str
        Fields of config.json that count in training only and are not computed here, as dropout of attention probabilities:
        noted where they are not 0.
    transposed : tuple of str
        Endings of the names of matrices that the file has as (in, out): they are used as transposed views.
    renamed : tuple of (str, str)
        Endings that old files have, and what they are today.
    buffers : tuple of (str, str)
        What files may hold that is no weight and is computed here: a regular expression for the end of the name, and one for
        the kind, which is the file's dtype and the shape: ``"BOOL (1, 1, 8, 8)"``. Only what fits both is left aside.
    """

    model_type: str
    config: type
    prefix: str
    heads: Mapping[str, Head]
    layers: str = "num_hidden_layers"
    others: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    buffers: tuple[tuple[str, str], ...] = ()

    def read(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `config` from config.json. For more than names and defaults a subclass overrides it.

        Fields of which there are two spellings (``torch_dtype``, ``rope_theta`` with ``rope_scaling``) are in the new one
        already: ``rope_parameters``, where either was there, is a dict with ``rope_type`` and whatever else the file says.
        What is wrong raises `ConfigError`, all of it in one; where in the file it was is added by the caller.
        """
        known = {field.name for field in dataclasses.fields(self.config)}
        return {**self.defaults, **{name: value for name, value in fields.items() if name in known}}

    def write(self, config: Any) -> dict[str, Any]:
        """The fields of config.json for a config, in transformers' newest spelling: the inverse of `read`."""
        return {**{name: values[0] for name, values in self.fixed.items()}, **dataclasses.asdict(config)}
