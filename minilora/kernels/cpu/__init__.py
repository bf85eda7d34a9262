"""CPU: a pass over memory in blocks that stay in the cache. Importing the package registers every version there is for it.

On one thread. A second one, measured on two cores, won a quarter on Adam alone but nothing in a training step: OpenBLAS keeps
its own threads spinning for tens of milliseconds after a product, and they occupy the cores that ours would need.
"""

from . import attention, cross_entropy, elementwise, halves, low_rank, norm, normal, silu  # noqa: F401
from .memory import keep_freed_memory

keep_freed_memory()
