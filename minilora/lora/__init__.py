"""Everything that knows LoRA. `gradient` is where to start reading."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers import Linear, adapt
from .loralib import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable

if TYPE_CHECKING:
    from .analysis import amplification, expected_similarity, subspace_similarity
    from .combine import cat, combine_adapters, linear_sum, svd
    from .compress import Compressed, extract, recompress
    from .config import Config
    from .costs import Storage
    from .factors import LowRank
    from .matching import Match, match
    from .merge_report import MergeReport, WeightReport
    from .merging import merge_weight, unmerge_weight
    from .planning import Plan, plan
    from .published import published_figures
    from .sparse import dare, ties
    from .spectra import spectrum
    from .transaction import merge, unmerge

__all__ = [
    "Compressed", "Config", "Linear", "LoRALinear", "LowRank", "Match", "MergeReport", "Plan", "Storage",
    "WeightReport", "adapt", "amplification", "cat", "combine_adapters", "dare", "delta", "expected_similarity",
    "extract", "linear_sum", "load_lora_state_dict", "lora_linear", "lora_state_dict", "mark_only_lora_as_trainable",
    "match", "merge", "merge_weight", "plan", "published_figures", "recompress", "scaling", "spectrum",
    "subspace_similarity", "svd", "ties", "unmerge", "unmerge_weight",
]

# The rooms that a training loop does not need, and the names in them, are loaded when first used: importing them all would
# more than double the time of `import minilora`. No room may bear the name of one of its functions: it would hide it.
_LATER = {name: room for room, names in {
    "analysis": "amplification expected_similarity subspace_similarity",
    "combine": "cat combine_adapters linear_sum svd",
    "compress": "Compressed extract recompress",
    "config": "Config",
    "costs": "Storage",
    "factors": "LowRank",
    "matching": "Match match",
    "merge_report": "MergeReport WeightReport",
    "merging": "merge_weight unmerge_weight",
    "planning": "Plan plan",
    "published": "published_figures",
    "sparse": "dare ties",
    "spectra": "spectrum",
    "transaction": "merge unmerge",
}.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
