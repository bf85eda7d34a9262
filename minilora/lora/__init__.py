"""Everything that knows LoRA. `gradient` is where to start reading."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Config
from .costs import Storage
from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers import Linear, adapt
from .loralib import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable
from .match import Match, match
from .merge import merge, unmerge
from .merge_report import MergeReport, WeightReport
from .merging import merge_weight, unmerge_weight
from .plan import Plan, plan

if TYPE_CHECKING:
    from .analysis import amplification, expected_similarity, subspace_similarity
    from .combine import cat, combine_adapters, linear_sum, svd
    from .compress import Compressed, extract, recompress
    from .factors import LowRank
    from .published import published_figures
    from .sparse import dare, ties
    from .spectra import spectrum

__all__ = [
    "Compressed", "Config", "Linear", "LoRALinear", "LowRank", "Match", "MergeReport", "Plan", "Storage",
    "WeightReport", "adapt", "amplification", "cat", "combine_adapters", "dare", "delta", "expected_similarity",
    "extract", "linear_sum", "load_lora_state_dict", "lora_linear", "lora_state_dict", "mark_only_lora_as_trainable",
    "match", "merge", "merge_weight", "plan", "published_figures", "recompress", "scaling", "spectrum",
    "subspace_similarity", "svd", "ties", "unmerge", "unmerge_weight",
]

# Names of rooms that training does not need are loaded when first used: importing them all takes a fifth of the import time.
_LATER = {
    "Compressed": "compress", "LowRank": "factors", "amplification": "analysis", "cat": "combine",
    "combine_adapters": "combine", "dare": "sparse", "expected_similarity": "analysis", "extract": "compress",
    "linear_sum": "combine", "published_figures": "published", "recompress": "compress", "spectrum": "spectra",
    "subspace_similarity": "analysis", "svd": "combine", "ties": "sparse",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
