"""Match: which layers of a model a Config hits. PEFT's rules, but nothing that matches nothing passes in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ... import nn
from ...errors import ConfigError, DTypeError
from ..config import ALL_LINEAR, Config
from ..config_checks import key_regex, layer_regex
from ...tables import ranges
from .hits import Match, Target
from .inventory import ADAPTABLE, Described, Inventory, Layer, inventory, names_in, near_in, tied_head, uneven
from .token_rows import token_rows

__all__ = ["Match", "Target", "match", "match_layers"]

HEADS = ("lm_head", "classifier", "score")  # "all-linear" leaves these alone, at the top of a model or as a leaf


def match(model: nn.Module | Described, config: Config, *, allow_unmatched: bool = False) -> Match:
    """Tell which layers of a model a config hits, and refuse a config of which a part hits nothing.

    Parameters
    ----------
    model : Module, or list of (path, shape, count)
        The list is that of `plan`.
    config : Config
    allow_unmatched : bool
        Turn entries that hit nothing into notes.

    Returns
    -------
    Match

    Raises
    ------
    ConfigError
        With one line for every target, exclude, pattern key, layer number or module to save that hits nothing, for every hit
        layer that cannot be adapted, and for every module to save inside another. If nothing at all would be adapted, also
        with `allow_unmatched`.

    Notes
    -----
    The rules are PEFT's, with two differences. Layer numbers count from the first number in a path also where the list is at
    the root of the model. ``"all-linear"`` leaves out what is called lm_head, classifier or score.

    Examples
    --------
    >>> import minilora
    >>> model = minilora.nn.SimpleAttention(4, rng=0)
    >>> print(match(model, minilora.lora.Config(r=2, lora_alpha=4, target_modules=["keys", "values"])))
    2 layers are adapted
    layer   type    r  lora_alpha  s  named by
    ------------------------------------------
    values  Linear  2           4  2  values
    keys    Linear  2           4  2  keys
    """
    return match_layers(inventory(model), config, allow_unmatched)


def match_layers(layers: Inventory, config: Config, allow_unmatched: bool = False) -> Match:
    """`match` on an inventory that is made already."""
    if not isinstance(config, Config):
        raise DTypeError(f"expected a lora.Config, got {type(config).__name__}")
    if config.target_modules is None:
        raise ConfigError(f"target_modules: name the layers to adapt, or give 'all-linear'. {names_in(layers)}")
    search = _Search(layers, config)
    search.run()
    rows = token_rows(layers, config, [target.path for target in search.targets], search.saved)
    problems = search.unsound = search.unsound + rows.unsound
    unmatched = search.unmatched() + rows.unmatched
    names = names_in(layers) if search.hinted else ""
    cure = "To let it pass, give allow_unmatched=True" if unmatched and search.targets and not search.unsound else ""
    if not allow_unmatched or not search.targets:
        problems = unmatched + problems
    if problems or not search.targets:
        lines = problems or [f"every layer that a target names is left out: {'; '.join(map(': '.join, search.excluded[:5]))}"]
        raise ConfigError("\n  ".join([f"lora.Config and model do not fit, {len(lines)} "
                                       f"problem{'s' if len(lines) > 1 else ''}:", *lines, *filter(None, (names, cure))]))
    if names:
        unmatched[-1] += f". {names}"
    notes = uneven(search.layers, {target.path for target in search.targets}, search.chosen)
    return Match(config, tuple(search.targets), tuple(search.excluded), tuple(search.saved), (*unmatched, *notes),
                 tuple(rows.found.items()))


class _Search:
    """One pass over the layers, which notes what every entry of the config has hit."""

    def __init__(self, layers: Inventory, config: Config) -> None:
        self.config = config
        self.layers = [layer for layer in layers if layer.kind]
        chosen = config.layers_to_transform
        self.chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen or ())
        self.targets: list[Target] = []
        self.excluded: list[tuple[str, str]] = []
        self.saved: dict[str, str] = {}  # path to the entry of modules_to_save
        self.unsound: list[str] = []
        self.used: set[tuple[str, Any]] = set()  # (field, entry) that did something
        self.seen: set[tuple[str, Any]] = set()  # pattern keys that fit a target, even if an earlier key came first
        self.outside: dict[str, str] = {}  # target to the first layer that it names and layers_to_transform does not
        self.hinted = False
        self.tied = tied_head(layers)

    def run(self) -> None:
        for layer in self.layers:
            out = self.left_out(layer)
            entries = self.naming(layer)
            if not entries:
                continue
            if not self.in_layers(layer.path, entries) and not out:
                self.outside = {**dict.fromkeys(entries, layer.path), **self.outside}
                continue
            self.used.update(("target_modules", entry) for entry in entries)
            if out:
                self.excluded.append((layer.path, out))
            elif layer.kind not in ADAPTABLE:
                self.unsound.append(f"target_modules: {entries[0]!r} hits {layer.path}, a {layer.kind}: only "
                                    f"{', '.join(ADAPTABLE)} can be adapted. Name the layers inside it")
            else:
                self.add(layer, entries[0])
        self.unsound += self.nested()

    def add(self, layer: Layer, entry: str) -> None:
        r = self.pattern("rank_pattern", self.config.rank_pattern, layer.path, self.config.r)
        lora_alpha = self.pattern("alpha_pattern", self.config.alpha_pattern, layer.path, self.config.lora_alpha)
        if r % layer.groups:
            self.unsound.append(f"r={r} at {layer.path}: it has {layer.groups} groups, and r must be a multiple of that")
        self.targets.append(Target(layer.path, layer.module, layer.kind, r, lora_alpha,
                                   self.config.scaling_for(r, lora_alpha), entry))

    def naming(self, layer: Layer) -> list[str]:
        """The entries of target_modules that name this layer."""
        targets = self.config.target_modules
        if isinstance(targets, str):
            all_linear = targets.lower() == ALL_LINEAR
            return [targets] if (layer.kind == "Linear" if all_linear else re.fullmatch(targets, layer.path)) else []
        return _entries_for(layer.path, targets or ())

    def left_out(self, layer: Layer) -> str:
        """Why this layer is not adapted even if a target names it, or ""."""
        config, path, held = self.config, layer.path, ""
        for name in config.modules_to_save or ():
            found = re.match(rf"(?:^|.*\.){re.escape(name)}($|\..*)", path)
            if found:
                self.used.add(("modules_to_save", name))
                held = held or f"modules_to_save has {name!r}"
                # A name that no module has is that of a list, tuple or dict: then each module right in it is meant.
                if not found[1] or not any(path.startswith(f"{outer}.") for outer in self.saved):
                    self.saved.setdefault(path, name)
        if held:
            return held
        excludes = config.exclude_modules
        if isinstance(excludes, str):
            hits = [excludes] if re.fullmatch(excludes, path) else []
        else:
            hits = _entries_for(path, excludes or ())
        if hits:
            self.used.update(("exclude_modules", hit) for hit in hits)
            return f"exclude_modules has {hits[0]!r}"
        if layer.whole and layer.whole.path != path:
            return f"inside {layer.whole}"
        parts = path.split(".")
        head = next((name for name in HEADS if name in (parts[0], parts[-1])), None)
        if head and isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            return f"'all-linear' leaves output heads out ({head})"
        return ""

    def nested(self) -> list[str]:
        """A line for every entry of modules_to_save that names a module inside another one, of this config or an adapter's."""
        wholes = list(dict.fromkeys(layer.whole for layer in self.layers if layer.whole))
        lines: dict[Any, str] = {}  # one for each pair of entries, however many layers they hit
        for path, entry in self.saved.items():
            here = f"modules_to_save: {path} ({entry!r})"
            for outer, other in self.saved.items():
                if path.startswith(f"{outer}."):
                    lines.setdefault((entry, other), f"{here} lies inside {outer} ({other!r}): name one of the two")
            for whole in wholes:
                if path.startswith(f"{whole.path}."):
                    lines.setdefault((entry, "in", whole.adapters), f"{here} lies inside {whole}: name that one")
                elif whole.path.startswith(f"{path}."):
                    lines.setdefault((entry, "around", whole.adapters), f"{here} holds {whole}: name that one")
        return list(lines.values())

    def in_layers(self, path: str, entries: Sequence[str]) -> bool:
        """Whether layers_to_transform lets this path pass. A target that is the whole path passes always, as in PEFT."""
        if not self.chosen or path in entries:
            return True
        patterns = self.config.layers_pattern
        found = None
        for pattern in [patterns] if isinstance(patterns, str) else patterns or [""]:
            found = re.match(layer_regex(pattern), path)
            if found:
                self.used.add(("layers_pattern", pattern))
                break
        if not found:
            return False
        index = int(found["idx"])
        self.used.add(("layers_to_transform", index))
        return index in self.chosen

    def pattern(self, field: str, pattern: Mapping[str, Any], path: str, default: Any) -> Any:
        fitting = [key for key in pattern if re.match(key_regex(key), path)]
        self.seen.update((field, key) for key in fitting)
        self.used.update((field, key) for key in fitting[:1])
        return pattern[fitting[0]] if fitting else default

    def unmatched(self) -> list[str]:
        """A line for every entry of the config that hit nothing."""
        config, lines = self.config, []
        found = sorted(index for field, index in self.used if field == "layers_to_transform")
        stacks = dict.fromkeys(name for layer in self.layers for name in re.findall(r"([^.]+)\.\d+\.", layer.path))
        for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(config, field)
            for entry in [value] if isinstance(value, str) else value or ():
                if (field, entry) in self.used:
                    continue
                if field == "target_modules" and entry in self.outside:
                    # Where no chosen layer exists, that is the fault, and said below.
                    path = self.outside[entry]
                    if set(found) & set(self.chosen) or (found and not re.search(r"(^|\.)\d+\.", path)):
                        lines.append(f"{field}: {entry!r} matches nothing in layers_to_transform; outside of it, {path}")
                else:
                    hint = f"; numbers stand behind {', '.join(stacks) or 'no name'}" if field == "layers_pattern" else \
                        self.hint(entry, isinstance(value, str))
                    lines.append(f"{field}: {entry!r} matches nothing{hint}")
        for index in self.chosen:
            if index not in found:
                there = f"the targets have the layer numbers {ranges(found)}" if found else \
                    f"no path of a target has a layer number{' behind layers_pattern' if config.layers_pattern else ''}"
                lines.append(f"layers_to_transform: {index} matches nothing; {there}")
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                if (field, key) in self.seen and (field, key) not in self.used:
                    lines.append(f"{field}: {key!r} has no effect: an earlier key fits the same layers, and the first one "
                                 "counts. Put the narrower key first")
                elif (field, key) not in self.used:
                    idle = [layer.path for layer in self.layers if layer.kind in ADAPTABLE
                            and re.match(key_regex(key), layer.path)]
                    hint = f"; it fits {idle[0]}, which is not adapted" if idle else self.hint(key)
                    lines.append(f"{field}: {key!r} matches no adapted layer{hint}")
        return lines

    def hint(self, entry: str, regex: bool = False) -> str:
        """What an entry that hits nothing may mean."""
        self.hinted = True
        if self.tied and entry.split(".")[-1] == "lm_head":
            return self.tied
        if regex and any(_entries_for(layer.path, [entry]) for layer in self.layers):
            return f"; a string is a regular expression for the whole path: for a name write [{entry!r}]"
        close = near_in(self.layers, entry)
        start = "; ^ is the start of the whole path" if entry.startswith("^") else ""
        return f"{start}; nearest: {', '.join(close)}" if close else start


def _entries_for(path: str, entries: Iterable[str]) -> list[str]:
    """The entries that are the whole path or its end behind a dot; the whole path first."""
    return sorted((entry for entry in entries if path == entry or path.endswith(f".{entry}")), key=lambda e: e != path)
