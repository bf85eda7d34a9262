"""Tensors and config of a PEFT folder, as a SavedAdapter. What the file holds decides; what it contradicts is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....lora.config import Config
from ..faults import Faults
from ..parts import alike
from ..saved import SavedAdapter, TokenRows, Update
from .keys import Name, infixes, parse

__all__ = ["HEADS", "optional_heads", "read_tensors"]

Array = Any
FLOATS = ("float16", "bfloat16", "float32", "float64")
UPDATE_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_bias", "lora_magnitude_vector")
HEADS = ("classifier", "score")


def optional_heads(config: Config) -> tuple[str, ...]:
    """The names that PEFT puts into modules_to_save for these task types, whether the model has such modules or not."""
    return HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()


def read_tensors(where: str, tensors: Mapping[str, Array], config: Config) -> SavedAdapter:
    """What a PEFT file says.

    Parameters
    ----------
    where : str
        The file, for messages.
    tensors : mapping of str to array
    config : Config

    Raises
    ------
    FormatError
        With a table of everything that is not understood or contradicts something else.
    """
    reader = _Reader(tensors, config)
    reader.sort()
    reader.updates = {path: update for path in reader.parts if (update := reader.update(path))}
    reader.parameters()
    reader.read_tokens()
    reader.promised()
    reader.faults.refuse(where)
    return SavedAdapter(reader.updates, config, "peft", reader.saved, reader.biases, reader.tokens, {}, tuple(reader.notes))


class _Reader:
    """One pass over a file, which notes everything that is wrong."""

    def __init__(self, tensors: Mapping[str, Array], config: Config) -> None:
        self.tensors, self.config = tensors, config
        self.faults = Faults()
        self.notes: list[str] = []
        self.parts: dict[str, dict[str, str]] = {}  # module path: part of an update: key
        self.plain: dict[str, dict[str, str]] = {}  # module path: parameter of the model: key
        self.deltas: dict[str, str] = {}  # path of an embedding: key of its rows
        self.updates: dict[str, Update] = {}
        self.saved: dict[str, Array] = {}
        self.biases: dict[str, Array] = {}
        self.tokens: dict[str, TokenRows] = {}

    def fault(self, key: str, text: str) -> None:
        self.faults.add(key, text, self.tensors[key] if key in self.tensors else None)

    def sort(self) -> None:
        """Put every key into its place."""
        names: dict[str, Name] = {}
        told = infixes(filter(None, map(parse, self.tensors)))  # by the updates
        for key in self.tensors:
            name = parse(key, ["default", *told])
            if name is None:
                self.fault(key, "not an ending that PEFT writes")
            elif "nested" in name.marks:
                self.fault(key, "a second update around the same module: target_parameters, which minilora lacks")
            elif not name.part and any(word.startswith("lora_") for word in name.path.split(".")):
                self.fault(key, "a part of an update, by its name, and none that PEFT writes")  # never a module saved whole
            elif "original_module" in name.marks:
                self.notes.append(f"{key}: the base's own, left out")
            else:
                names[key] = name
        adapters = infixes(names.values())
        if len(adapters) > 1:
            key = next(key for key, name in names.items() if adapters[1] in name.infix)
            self.fault(key, f"several adapters in one file: {', '.join(adapters)}. Save them one by one")
        for key, name in names.items():
            self.place(key, name)

    def place(self, key: str, name: Name) -> None:
        if name.part == "trainable_tokens_delta":
            before = self.deltas.setdefault(name.path, key)
        elif name.part:
            before = self.parts.setdefault(name.path, {}).setdefault(name.part, key)
        else:
            before = self.plain.setdefault(name.path, {}).setdefault(name.parameter, key)
        # bias="all" writes the bias of a saved module under several names.
        if before != key and not _same(self.tensors[before], self.tensors[key]):
            self.fault(key, f"means the same as {before}, and differs")

    def update(self, path: str) -> Update | None:
        """The update of one module, or None if something is wrong with it."""
        keys, before = self.parts[path], len(self.faults)
        embedding = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if embedding and ("lora_A" in keys or "lora_B" in keys):
            self.fault(next(iter(keys.values())), "an embedding's update and a linear one of the same module")
        for here, other in ((first, second), (second, first)):
            if here not in keys:
                self.fault(keys.get(other, next(iter(keys.values()))), f"{other if other in keys else 'this'} without {here}")
        if len(self.faults) > before:
            return None
        A, B = self.tensors[keys[first]], self.tensors[keys[second]]
        kind = "embedding" if embedding else "convolution" if len(A.shape) > 2 else "linear"
        for key in keys.values():
            self.check_float(key)
        self.check_pair(keys[first], keys[second], A, B, kind)
        if len(self.faults) > before:
            return None
        r, wanted = int(A.shape[0]), self.config.rank_at(path)
        if r != wanted:
            self.fault(keys[first], f"rank {r}, and the config says {wanted}")
        extra = {field: self.vector(keys, part, B.shape[0], kind, flag, path) for field, part, flag in (
            ("bias", "lora_bias", "lora_bias"), ("magnitude", "lora_magnitude_vector", "use_dora"))}
        s = self.config.scaling_for(r, self.config.alpha_at(path))
        return Update(kind, *alike(A, B), s, **extra) if len(self.faults) == before else None  # type: ignore[arg-type]

    def check_float(self, key: str) -> None:
        if self.tensors[key].dtype.name not in FLOATS:
            self.fault(key, f"{self.tensors[key].dtype.name}: expected one of {', '.join(FLOATS)}")

    def check_pair(self, A_key: str, B_key: str, A: Array, B: Array, kind: str) -> None:
        a, b = tuple(A.shape), tuple(B.shape)
        if len(a) < 2 or 0 in a:
            self.fault(A_key, "expected (r, in), or (r, in, *kernel) for a convolution, none of them 0")
        elif kind == "convolution":
            groups = a[0] // b[1] if len(b) == len(a) and b[1] else 0
            if not groups or a[0] != groups * b[1] or b[2:] != (1,) * (len(a) - 2) or b[0] % groups or not b[0]:
                self.fault(B_key, f"A is {a}: expected (out, r / groups{', 1' * (len(a) - 2)})")
            elif len(a) > 5:
                self.fault(A_key, "a kernel of more than 3 axes")
        elif len(a) != 2 or len(b) != 2 or b[1] != a[0] or not b[0]:
            self.fault(B_key, f"A is {a}: expected (out, {a[0]})")

    def vector(self, keys: Mapping[str, str], part: str, out: int, kind: str, flag: str, path: str) -> Array | None:
        """lora_bias or the lengths of DoRA, flat; None if there are none."""
        asked = bool(getattr(self.config, flag)) and not (part == "lora_bias" and kind == "embedding")
        if part not in keys:
            if asked:
                self.fault(keys.get("lora_B", next(iter(keys.values()))), f"the config has {flag}, and {path} has no {part}")
            return None
        key, shape = keys[part], tuple(self.tensors[keys[part]].shape)
        if not asked:
            self.fault(key, f"the config does not have {flag}")
        allowed = [(out,)] if part == "lora_bias" else [(out,), *((1, out, *[1] * n) for n in range(4)), (out, 1)]
        if shape not in allowed:
            self.fault(key, f"expected ({out},), as many as the rows of B")
            return None
        return self.tensors[key].reshape(-1)

    def parameters(self) -> None:
        """Parameters of the model itself: trained biases, and modules that are saved whole."""
        unnamed: list[str] = []
        inside: list[str] = []
        for path, keys in self.plain.items():
            named = self.named(path)
            for parameter, key in keys.items():
                full = f"{path}.{parameter}"
                if parameter == "bias" and not named and self.is_bias(path):
                    self.biases[full] = self.tensors[key]
                    if self.config.bias == "none":
                        self.notes.append(f"{full}: a bias of the base, though the config says bias='none'")
                elif named or parameter in ("weight", "bias"):
                    self.saved[full] = self.tensors[key]
                    (inside if path in self.updates else [] if named else unnamed).append(full)
                else:
                    self.fault(key, "no part of an adapter, and no module in modules_to_save")
        if unnamed:
            self.notes.append(f"saved whole, though modules_to_save does not name it: {', '.join(unnamed)}")
        if inside:
            self.notes.append(f"the base's own, saved beside its update: {', '.join(inside)}")

    def is_bias(self, path: str) -> bool:
        return "weight" not in self.plain[path] and (path in self.updates or self.config.bias == "all")

    def named(self, path: str) -> str | None:
        """The entry of modules_to_save that means this module or one around it: PEFT asks for the end of a path, no dot."""
        words = path.split(".")
        paths = [".".join(words[:i + 1]) for i in range(len(words))]
        entries = (*(self.config.modules_to_save or ()), *optional_heads(self.config))
        return next((entry for entry in entries if any(p.endswith(entry) for p in paths)), None)

    def read_tokens(self) -> None:
        indices = self.config.trainable_token_indices
        for path, key in self.deltas.items():
            rows = self.tensors[key]
            self.check_float(key)
            found = next((at for name, at in indices.items() if path.endswith(name)), None) \
                if isinstance(indices, Mapping) else indices
            if found is None:
                self.fault(key, "which tokens? trainable_token_indices of the config does not say")
            elif len(rows.shape) != 2 or rows.shape[0] != len(found) or not rows.shape[1]:
                self.fault(key, f"trainable_token_indices has {len(found)} tokens: expected ({len(found)}, d)")
            else:
                self.tokens[path] = TokenRows(tuple(found), rows)

    def promised(self) -> None:
        """What the config says is there and is not."""
        for entry in self.config.modules_to_save or ():
            if entry not in optional_heads(self.config) and not any(self.named_by(entry, full) for full in self.saved):
                self.faults.add("modules_to_save", f"{entry!r}: the file holds no such module. If the base's own is meant, "
                                "take the name out of the config")
        indices = self.config.trainable_token_indices or {}
        for name in indices if isinstance(indices, Mapping) else [""]:
            if indices and not any(path.endswith(name) for path in self.deltas):
                self.faults.add("trainable_token_indices", f"{name or indices}: the file holds no trainable_tokens_delta")
        targets = self.config.target_modules
        for entry in targets if isinstance(targets, tuple) else ():
            if not any(path == entry or path.endswith(f".{entry}") for path in self.updates):
                self.notes.append(f"target_modules has {entry!r}, and the file no update for it")

    @staticmethod
    def named_by(entry: str, full: str) -> bool:
        words = full.split(".")
        return any(".".join(words[:i]).endswith(entry) for i in range(1, len(words)))


def _same(first: Array, second: Array) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and bool((first == second).all())
