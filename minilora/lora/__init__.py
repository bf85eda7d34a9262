"""Everything that knows LoRA. `gradient` is where to start reading; each room behind it needs only those before it:

    gradient, config  <-  gradients, algebra, merging  <-  layers  <-  adapters  <-  planning
"""

from typing import TYPE_CHECKING

from ..later import later

from .adapters.loralib import load_lora_state_dict, lora_state_dict, mark_only_lora_as_trainable
from .gradient import LoRALinear, delta, lora_linear, scaling
from .layers.kinds import adapt
from .layers.linear import Linear

if TYPE_CHECKING:
    from .adapters.frozen_factor import freeze_A
    from .adapters.injection import Injection, inject, remove
    from .adapters.learning_rates import lora_plus_groups
    from .adapters.matching import Match, match
    from .adapters.status import Status, status
    from .adapters.switching import activate, disabled, mixed
    from .adapters.transfer import hotswap, inject_updates, low_rank_updates
    from .adapters.weights import bake, merge, unmerge
    from .algebra.analysis import analyse, analysis_table
    from .algebra.angles import principal_angles
    from .algebra.combine import cat, combine_adapters, linear_sum, svd
    from .algebra.compress import Compressed, extract, recompress
    from .algebra.factors import LowRank
    from .algebra.sparse import dare, ties
    from .algebra.spectra import spectrum
    from .algebra.subspaces import amplification, expected_similarity, subspace_similarity
    from .config import Config
    from .layers.adapter import Adapter
    from .layers.attention import ProjectedAttention
    from .layers.convolution import Conv1d, Conv2d
    from .layers.embedding import Embedding
    from .layers.fused import MergedLinear
    from .merging.report import MergeReport, WeightReport
    from .merging.weight import merge_weight, unmerge_weight
    from .planning.costs import Storage
    from .planning.fits import Fit, Fits, what_fits
    from .planning.plan import Plan, plan
    from .planning.published import published_figures

__all__ = [
    "Adapter", "Compressed", "Config", "Conv1d", "Conv2d", "Embedding", "Fit", "Fits", "Injection", "Linear", "LoRALinear",
    "LowRank", "Match", "MergeReport", "MergedLinear", "Plan", "ProjectedAttention", "Status", "Storage", "WeightReport",
    "activate", "adapt", "amplification", "analyse", "analysis_table", "bake", "cat", "combine_adapters", "dare", "delta",
    "disabled", "expected_similarity", "extract", "freeze_A", "hotswap", "inject", "inject_updates", "linear_sum",
    "load_lora_state_dict", "lora_linear", "lora_plus_groups", "lora_state_dict", "low_rank_updates",
    "mark_only_lora_as_trainable", "match", "merge", "merge_weight", "mixed", "plan", "principal_angles", "published_figures",
    "recompress", "remove", "scaling", "spectrum", "status", "subspace_similarity", "svd", "ties", "unmerge",
    "unmerge_weight", "what_fits",
]

# What a training loop does not need is loaded when first used: importing it all would more than double the time of
# `import minilora`. No room may bear the name of a function: importing the room would hide it.
__getattr__, __dir__ = later(globals(), {
    "adapters.injection": "Injection inject remove",
    "adapters.learning_rates": "lora_plus_groups",
    "adapters.matching": "Match match",
    "adapters.status": "Status status",
    "adapters.frozen_factor": "freeze_A",
    "adapters.switching": "activate disabled mixed",
    "adapters.transfer": "hotswap inject_updates low_rank_updates",
    "adapters.weights": "bake merge unmerge",
    "algebra.analysis": "analyse analysis_table",
    "algebra.angles": "principal_angles",
    "algebra.combine": "cat combine_adapters linear_sum svd",
    "algebra.compress": "Compressed extract recompress",
    "algebra.factors": "LowRank",
    "algebra.sparse": "dare ties",
    "algebra.spectra": "spectrum",
    "algebra.subspaces": "amplification expected_similarity subspace_similarity",
    "config": "Config",
    "layers.adapter": "Adapter",
    "layers.attention": "ProjectedAttention",
    "layers.convolution": "Conv1d Conv2d",
    "layers.embedding": "Embedding",
    "layers.fused": "MergedLinear",
    "merging.report": "MergeReport WeightReport",
    "merging.weight": "merge_weight unmerge_weight",
    "planning.costs": "Storage",
    "planning.fits": "Fit Fits what_fits",
    "planning.plan": "Plan plan",
    "planning.published": "published_figures",
})
