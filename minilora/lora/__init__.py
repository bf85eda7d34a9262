"""Everything that knows LoRA. `gradient` is where to start reading."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapting import adapt
from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers import Linear
from .loralib import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable

if TYPE_CHECKING:
    from .adapter import Adapter
    from .adapter_status import Status, status
    from .analysis import amplification, expected_similarity, subspace_similarity
    from .combine import cat, combine_adapters, linear_sum, svd
    from .compress import Compressed, extract, recompress
    from .config import Config
    from .conv_layers import Conv1d, Conv2d
    from .costs import Storage
    from .embedding_layer import Embedding
    from .factors import LowRank
    from .injecting import Injection, inject, remove
    from .matching import Match, match
    from .merge_report import MergeReport, WeightReport
    from .merged_linear import MergedLinear
    from .merging import merge_weight, unmerge_weight
    from .planning import Plan, plan
    from .plus import lora_plus_groups
    from .projected import ProjectedAttention
    from .published import published_figures
    from .sparse import dare, ties
    from .spectra import spectrum
    from .switching import activate, disabled, freeze_A, mixed
    from .transaction import merge, unmerge
    from .transfer import hotswap, inject_updates, low_rank_updates

__all__ = [
    "Adapter", "Compressed", "Config", "Conv1d", "Conv2d", "Embedding", "Injection", "Linear", "LoRALinear",
    "LowRank", "Match", "MergeReport", "MergedLinear", "Plan", "ProjectedAttention", "Status", "Storage",
    "WeightReport", "activate", "adapt", "amplification", "cat", "combine_adapters", "dare", "delta",
    "disabled", "expected_similarity", "extract", "freeze_A", "hotswap", "inject", "inject_updates",
    "linear_sum", "load_lora_state_dict", "lora_linear", "lora_plus_groups", "lora_state_dict",
    "low_rank_updates", "mark_only_lora_as_trainable", "match", "merge", "merge_weight", "mixed", "plan",
    "published_figures", "recompress", "remove", "scaling", "spectrum", "status", "subspace_similarity",
    "svd", "ties", "unmerge", "unmerge_weight",
]

# The rooms that a training loop does not need, and the names in them, are loaded when first used: importing them all would
# more than double the time of `import minilora`. No room may bear the name of one of its functions: it would hide it.
_LATER = {name: room for room, names in {
    "adapter": "Adapter",
    "adapter_status": "Status status",
    "analysis": "amplification expected_similarity subspace_similarity",
    "combine": "cat combine_adapters linear_sum svd",
    "compress": "Compressed extract recompress",
    "config": "Config",
    "conv_layers": "Conv1d Conv2d",
    "costs": "Storage",
    "embedding_layer": "Embedding",
    "factors": "LowRank",
    "injecting": "Injection inject remove",
    "matching": "Match match",
    "merge_report": "MergeReport WeightReport",
    "merged_linear": "MergedLinear",
    "merging": "merge_weight unmerge_weight",
    "planning": "Plan plan",
    "plus": "lora_plus_groups",
    "projected": "ProjectedAttention",
    "published": "published_figures",
    "sparse": "dare ties",
    "spectra": "spectrum",
    "switching": "activate disabled freeze_A mixed",
    "transaction": "merge unmerge",
    "transfer": "hotswap inject_updates low_rank_updates",
}.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return value
