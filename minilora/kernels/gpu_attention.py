"""GPU: attention in blocks as large as a card likes them. No kernel of its own: the reference, with another size of block."""

from __future__ import annotations

import math
from typing import Any

from ..backend import override
from ..ops.attention import Attention, ScaledDotProduct
from ..ops.packed_attention import PackedAttention

__all__ = ["LargeBlockAttention", "LargeBlockPackedAttention"]

Array = Any

# Scores of the queries that are done together: 64 MB of float32. A block costs some 56 launches there and back, however small
# it is; a pass over so many scores takes a card longer than the host needs for the next launch, so that larger blocks would
# spare nobody's time and only meet more masked keys. (Reckoned, at 10 us a launch and 3 TB/s; not measured.)
SCORES = 1 << 24


class _LargeBlocks(ScaledDotProduct):
    def attend(self, q: Array, k: Array, v: Array, y: Array) -> tuple[Array, Array]:
        parts = max(1, math.ceil(math.prod(q.shape[:-1]) * k.shape[-2] / SCORES))
        step = ScaledDotProduct.block
        self.block = step * math.ceil(max(1, q.shape[-2]) / parts / step)  # backward takes the same
        return super().attend(q, k, v, y)


@override(Attention, device="gpu")
class LargeBlockAttention(_LargeBlocks, Attention):
    """`Attention`, as many queries at a time as make 2^24 scores (4 times that, where no key is masked by causality)."""


@override(PackedAttention, device="gpu")
class LargeBlockPackedAttention(_LargeBlocks, PackedAttention):
    """`PackedAttention`, likewise."""
