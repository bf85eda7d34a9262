"""Sanity checks before a training: is what is about to be trained able to learn, and does it?

    together    `check`: all of them, as one table
    chance      `loss_at_chance`: the loss of a model that knows nothing
    few_rows    `overfit`: a few rows can be learned by heart; floor: what no model can learn of them
    moves       `movement`: what should move and stands still, and the other way round; blame: why
    ratios      `update_ratios`: how large a step is beside the weights
    finding     what a check says
    picked      the batches that are looked at; passes: what a pass through the model reads and makes
    rehearsal   a training after which all is as it was; course: a few steps of one

After "Babysitting the learning process" of CS231n (cs231n.github.io/neural-networks-3). Whatever the checks do, the model, the
optimizer and all counters and generators of random numbers are as they were before, to the bit.
"""

from typing import TYPE_CHECKING

from ...later import later

if TYPE_CHECKING:
    from .chance import Chance, loss_at_chance
    from .few_rows import Overfit, overfit
    from .finding import Finding
    from .moves import Movement, movement
    from .ratios import Ratios, update_ratios
    from .together import Report, check

__all__ = ["Chance", "Finding", "Movement", "Overfit", "Ratios", "Report", "check", "loss_at_chance", "movement", "overfit",
           "update_ratios"]

__getattr__, __dir__ = later(globals(), {
    "chance": "Chance loss_at_chance",
    "few_rows": "Overfit overfit",
    "finding": "Finding",
    "moves": "Movement movement",
    "ratios": "Ratios update_ratios",
    "together": "Report check",
})
