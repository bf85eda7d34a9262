"""Frozen weights in low precision: how they are held, made, and decoded some rows at a time; see `stored`."""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .four_bit import FourBit
    from .int8 import Int8Rows
    from .model import Quantized, QuantizedWeight, dequantize, quantize, stored
    from .sixteen import Sixteen, half_products

__all__ = ["FourBit", "Int8Rows", "Quantized", "QuantizedWeight", "Sixteen",
           "dequantize", "half_products", "quantize", "stored"]

# Loaded when first used: most programs hold their weights in full precision.
__getattr__, __dir__ = later(globals(), {
    "four_bit": "FourBit",
    "int8": "Int8Rows",
    "model": "Quantized QuantizedWeight dequantize quantize stored",
    "sixteen": "Sixteen half_products",
})
