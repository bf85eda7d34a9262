"""An adapter file into a model: all of it, or nothing and the reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ... import nn
from ...errors import ConfigError, DTypeError
from ...lora.adapters.switching import refuse_merged, refuse_running, refuse_taken
from ...lora.layers.adapter import check_name
from ...lora.undo import all_or_nothing
from ..adapters.reading import read_adapter
from ..adapters.saved import SavedAdapter
from .assembly import Assembly
from .names import NameMapping
from .report import LoadReport

__all__ = ["load_adapter"]


def load_adapter(model: nn.Module, source: Any, name: str = "default", *, mapping: NameMapping | None = None,
                 force: bool = False, trainable: bool = False, allow_nonfinite: bool = False, dialect: str | None = None,
                 **options: Any) -> LoadReport:
    """Put an adapter from a file into a model, beside those that it has, and make it the active one.

    Parameters
    ----------
    model : Module
        The base. Its weights stay as they are; biases that the adapter trained (`bias`) are set, as `lora.inject` trains them.
    source : path or SavedAdapter
        A folder or file, or what `read_adapter` gave.
    name : str
        Of the adapter in the model.
    mapping : dict of str to str, or function, optional
        From the file's paths to the model's, if they are not found: a dict of prefixes, such as ``{"thinker.": ""}``, or a
        function from path to path. See `names` for what is found without.
    force : bool
        Load onto a base that is another one than the file's fingerprint says. It is written into the report, and into the file
        when the adapter is saved again.
    trainable : bool
        Go on training it. By default everything is frozen.
    allow_nonfinite : bool
        Take NaN and inf too.
    dialect : str, optional
        Of the file, if it is not to be found out.
    **options
        What the dialect needs to know besides.

    Returns
    -------
    LoadReport

    Raises
    ------
    FormatError
        If the file is not understood, does not fit the model in one name, shape or kind, holds NaN or inf, or belongs to
        another base. All problems are listed, and the model is as it was before, bit for bit.
    FileError
        If it cannot be read.
    ConfigError
        If the name is taken or cannot be one, or the mapping changes nothing.
    StateError
        If a layer is merged, or two adapters would set the biases of the base.

    Notes
    -----
    s is the file's, layer by layer, whatever its config says. "pissa" and "olora" took their start out of the weight: it is
    computed from the model's weight again and becomes a part of the adapter, so the base stays (`lora.layers.start`).

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora import lora
    >>> from minilora.formats.adapters.saved import SavedAdapter, Update
    >>> model = minilora.nn.Sequential(minilora.nn.Linear(3, 2, rng=0))
    >>> update = Update("linear", numpy.ones((1, 3), "float32"), numpy.ones((2, 1), "float32"), s=2.0)
    >>> given = SavedAdapter({"model.0": update}, lora.Config(r=1, lora_alpha=2, target_modules=["0"]))
    >>> print(load_adapter(model, given, "given"))
    adapter 'given' from a value (peft): 1 layer
    layer  kind    r  lora_alpha  s  rule       and
    -----------------------------------------------
    0      linear  1           2  2  alpha / r
    names: 'model.' taken from the names
    fingerprint: the file has none, so that nothing tells whether this is its base
    """
    _check_call(model, name, source, dialect, options)
    saved, origin = _read(model, source, dialect, allow_nonfinite, options)
    parts = Assembly(model, saved, name, mapping, force)
    parts.fit()
    if not allow_nonfinite:
        parts.finite()
    parts.refuse(origin)
    return all_or_nothing(lambda: parts.put_in(origin, trainable), [model], parts.written())


def _check_call(model: Any, name: str, source: Any, dialect: str | None, options: Mapping[str, Any]) -> None:
    check_name(name)
    if not isinstance(model, nn.Module):
        raise DTypeError(f"load_adapter: expected a model, got {type(model).__name__}: write load_adapter(model, folder)")
    if isinstance(source, SavedAdapter) and (dialect is not None or options):
        given = ", ".join([*(["dialect"] if dialect is not None else []), *options])
        raise ConfigError(f"load_adapter: {given}: these say how to read a file, and this adapter is read already")
    refuse_taken(model, name)
    refuse_merged(model, "load_adapter")
    refuse_running(model, "load_adapter")


def _read(model: nn.Module, source: Any, dialect: str | None, allow_nonfinite: bool,
          options: Mapping[str, Any]) -> tuple[SavedAdapter, str]:
    if isinstance(source, SavedAdapter):
        return source, f"a value ({source.dialect})"
    saved = read_adapter(source, dialect=dialect, allow_nonfinite=allow_nonfinite, **options)
    if saved.dialect == "kohya" and "modules" not in options:  # its names have lost their dots: the model's modules tell them
        saved = read_adapter(source, dialect=dialect, allow_nonfinite=allow_nonfinite, modules=model, **options)
    return saved, f"{source} ({saved.dialect})"
