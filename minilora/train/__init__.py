"""The training loop, and what stands beside it, each a small object that a run may do without.

    loop           `fit`: the loop itself
    run            a run on its way, and how one update is made; made, last_good: its optimizer, and what a step may spoil
    settings       what a run is: numbers only, so that they can be written down and compared
    batch          what the loop asks of data
    beside         what the loop calls after each step; such objects are
                   evaluation, metrics, progress (with its header), report, outcome: what they are called
    divergence     which array was the first that is not finite
    memory         what a run needs, and what it has needed
    sanity         checks before a run: is what is about to be trained able to learn?
    data           files of texts, and arrays, as such data
    checkpoints    the whole state of a run, on the disk and back to the bit
    distributed    the same run in several processes
"""

from typing import TYPE_CHECKING

from ..later import later

if TYPE_CHECKING:
    from .batch import Batch, Data
    from .beside import Beside
    from .evaluation import Scored, evaluate
    from .loop import fit
    from .result import Evaluation, Result
    from .settings import Settings

__all__ = ["Batch", "Beside", "Data", "Evaluation", "Result", "Scored", "Settings", "evaluate", "fit"]

__getattr__, __dir__ = later(globals(), {
    "batch": "Batch Data",
    "beside": "Beside",
    "result": "Evaluation Result",
    "evaluation": "Scored evaluate",
    "settings": "Settings",
    "loop": "fit",
    "data": "data",
    "checkpoints": "checkpoints",
    "sanity": "sanity",
})
