"""Everything that knows LoRA. `gradient` is where to start reading."""

from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers import Linear, adapt

__all__ = ["Linear", "LoRALinear", "adapt", "delta", "lora_linear", "scaling"]
