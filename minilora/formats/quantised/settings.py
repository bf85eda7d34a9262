"""``quantization_config`` of config.json: which 4-bit code a base is in, read and written as transformers does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import FormatError
from ...quant.codes import KINDS

__all__ = ["FIELD", "Settings", "read_settings"]

FIELD = "quantization_config"
METHODS = ("bitsandbytes", "bitsandbytes_4bit")
COMPUTE = ("float32", "float16", "bfloat16", "float64")
ELSEWHERE = "take the checkpoint that it was made from, and quantise that here: minilora quantize BASE -o OUT --kind nf4"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What minilora needs of it, and what it writes back.

    Attributes
    ----------
    kind : {"nf4", "fp4"}
    double : bool
        Whether scales are nested; each weight's own words hold, and this is what is written.
    skip : tuple of str or None
        Modules that are not quantised; None for those that transformers leaves by itself: the output head.
    compute : str
        The dtype in which transformers computes. minilora computes in that of the model.
    """

    kind: str
    double: bool = True
    skip: tuple[str, ...] | None = None
    compute: str = "float32"

    def fields(self) -> dict[str, Any]:
        """All that transformers writes."""
        return {"_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": self.compute,
                "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": self.kind,
                "bnb_4bit_use_double_quant": self.double, "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None if self.skip is None else list(self.skip),
                "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes"}


def read_settings(said: Any) -> Settings:
    """The settings in a ``quantization_config``.

    Raises
    ------
    FormatError
        If that is another method, or one of its settings is not computed here: what, and what to do.

    Examples
    --------
    >>> read_settings({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).double
    False
    """
    if not isinstance(said, Mapping):
        raise FormatError(f"{FIELD} must be an object, got {type(said).__name__}")
    four = said.get("load_in_4bit", said.get("_load_in_4bit"))
    eight = said.get("load_in_8bit", said.get("_load_in_8bit"))
    method = said.get("quant_method", "bitsandbytes" if four or eight else None)
    if method not in METHODS:
        raise FormatError(f"the weights are quantised by {method!r:.60} (quant_method), and only 4 bits of bitsandbytes are "
                          f"read here: {ELSEWHERE}")
    if eight:
        raise FormatError("the weights are in 8 bits (load_in_8bit), and only 4 bits of bitsandbytes are read here: "
                          f"{ELSEWHERE}")
    kind, storage = said.get("bnb_4bit_quant_type", "fp4"), said.get("bnb_4bit_quant_storage") or "uint8"
    double, skip = said.get("bnb_4bit_use_double_quant", False), said.get("llm_int8_skip_modules")
    problems = []
    if four is not True:
        problems.append(f"load_in_4bit is {four!r:.40}, expected true")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"bnb_4bit_quant_type is {kind!r:.60}, expected {' or '.join(KINDS)}")
    if not isinstance(double, bool):
        problems.append(f"bnb_4bit_use_double_quant is {double!r:.40}, expected true or false")
    if storage != "uint8":
        problems.append(f"bnb_4bit_quant_storage is {storage!r:.40}: bytes that are disguised as numbers of another dtype, and "
                        f"only uint8 is read here: {ELSEWHERE}")
    if skip is not None and not (isinstance(skip, Sequence) and all(isinstance(name, str) for name in skip)):
        problems.append(f"llm_int8_skip_modules is {skip!r:.60}, expected names of modules, or null")
    if problems:
        raise FormatError(f"{FIELD}: {'; '.join(problems)}")
    compute = said.get("bnb_4bit_compute_dtype")
    return Settings(str(kind), bool(double), None if skip is None else tuple(skip),
                    compute if isinstance(compute, str) and compute in COMPUTE else "float32")
