"""GPU: one kernel in the place of a chain of them. Importing the package registers every version there is for it.

The CUDA texts are in kernels/cuda; what their rows share is block.cuh. Products are in kernels/cublas, recorded steps in
kernels/recorded. CuPy is imported when the first kernel starts, not here.
"""

from .. import nccl  # noqa: F401
from ..cublas import products  # noqa: F401
from ..recorded import graph  # noqa: F401
from . import attention, dora, elementwise, embedding, halves, linear, low_rank, merged  # noqa: F401
from . import prefix_attention, rotary, rows, window  # noqa: F401
