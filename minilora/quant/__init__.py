"""Frozen weights in low precision: how they are held, made, and decoded some rows at a time; see `stored`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .four_bit import FourBit
    from .int8 import Int8Rows
    from .model import Quantized, QuantizedWeight, dequantize, quantize, stored
    from .sixteen import Sixteen, half_products

__all__ = ["FourBit", "Int8Rows", "Quantized", "QuantizedWeight", "Sixteen",
           "dequantize", "half_products", "quantize", "stored"]

# Loaded when first used: most programs hold their weights in full precision.
_LATER = {name: place for place, names in {
    "four_bit": "FourBit",
    "int8": "Int8Rows",
    "model": "Quantized QuantizedWeight dequantize quantize stored",
    "sixteen": "Sixteen half_products",
}.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
