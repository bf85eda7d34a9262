"""Arrays without numbers: a model runs on them in no memory, and what it would need is counted."""

from .step import Flops, Step, rehearse

__all__ = ["Flops", "Step", "rehearse"]
