"""A whole model trained in d numbers: its intrinsic dimension is the smallest d that still does.

    θ = θ0 + P v                    a random P (D, d), drawn once and fixed; v is what is trained
    θ_i = θ0_i + λ_i (P v)_i        structure-aware: a trained factor for each tensor of weights

`Subspace` stands around a model. P is `Dense`, a matrix, or `Fastfood`, which is none.
Source: Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, arXiv 2012.13255.
"""

from .projections import Dense, Fastfood, Projection
from .subspace import Subspace

__all__ = ["Dense", "Fastfood", "Projection", "Subspace"]
