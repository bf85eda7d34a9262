"""Families of models: what each of them has in config.json and calls its weights. One file a family, and one line here."""

from .contract import Family, Head
from .gpt2 import GPT2_FAMILY

__all__ = ["FAMILIES", "Family", "Head"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (
    GPT2_FAMILY,
)}
