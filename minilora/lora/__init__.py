"""Everything that knows LoRA. `gradient` is where to start reading."""

from .analysis import amplification, expected_similarity, subspace_similarity
from .combine import cat, combine_adapters, linear_sum, svd
from .compress import Compressed, extract, recompress
from .config import Config
from .costs import Storage
from .factors import LowRank
from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers import Linear, adapt
from .loralib import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable
from .match import Match, match
from .plan import Plan, plan
from .published import published_figures
from .sparse import dare, ties
from .spectra import spectrum

__all__ = [
    "Compressed", "Config", "Linear", "LoRALinear", "LowRank", "Match", "Plan", "Storage",
    "adapt", "amplification", "cat", "combine_adapters", "dare", "delta", "expected_similarity",
    "extract", "linear_sum", "load_lora_state_dict", "lora_linear", "lora_state_dict", "mark_only_lora_as_trainable",
    "match", "plan", "published_figures", "recompress", "scaling", "spectrum",
    "subspace_similarity", "svd", "ties",
]
