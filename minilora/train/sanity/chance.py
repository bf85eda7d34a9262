"""The loss of a model that knows nothing, against the one that must come out then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from ... import backend
from ...engine import no_grad
from ...half import mixed
from ...nn.mode import in_mode
from ...nn.module import Module
from ...shown import shown
from ..batch import Data
from ..evaluation import predicts_tokens
from ..run import LossFunction, loss_of_model
from ..settings import Settings
from .finding import FAILED, LOOK, OK, SKIPPED, Finding
from .passes import Goal, Seen, plain, watched
from .picked import Picked, pick
from .rehearsal import rehearsed

__all__ = ["Chance", "loss_at_chance"]

SHARE = 0.25  # of the expected loss, that a fresh model may be off: its logits are small and not 0
LEAST = 0.5  # nats that it may be off in any case
SPREAD = 1.5  # of the loss of one target: the mean over n of them is off by so much over the root of n
OF_SQUARES = 4.0  # the factor by which a mean square may be off: outputs are not 0 either
LARGE = 20.0  # a logit: e^20 to 1 is more certainty than a fresh model can have


@shown
@dataclasses.dataclass(frozen=True)
class Chance(Finding):
    """What `loss_at_chance` found.

    Attributes
    ----------
    loss : float
        The mean over the targets; NaN where it could not be computed.
    chance : float or None
        The expected one.
    """

    loss: float = math.nan
    chance: float | None = None


def loss_at_chance(model: Module, data: Data, settings: Settings | None = None, *, loss: LossFunction = loss_of_model,
                   expected: float | None = None, fresh: bool | None = None, batches: int = 4) -> Chance:
    """Compare the loss before any training with that of guessing.

    Guessing one of C classes costs ln C: so much a fresh classifier must lose, and a fresh language model ln V. Guessing 0 for
    numbers t costs the mean of t^2. What is compared is seen in the loss itself: its cross-entropy or mean square.

    Parameters
    ----------
    model : Module
    data : Data
    settings : Settings, optional
        For batch_size, seed and precision.
    loss : callable
        As of `fit`.
    expected : float, optional
        The loss of guessing, where it is another.
    fresh : bool, optional
        True: nothing in the model was trained before, so that it must not be better than guessing either. Otherwise it may be:
        a pre-trained model knows something.
    batches : int
        How many are looked at.

    Returns
    -------
    Chance
        With likely causes where the loss is far off. The model is as it was before.

    Raises
    ------
    ConfigError
        If there is no target in the data.

    Examples
    --------
    >>> import numpy, minilora
    >>> from minilora.train.data import Arrays
    >>> data = Arrays(x=numpy.random.default_rng(0).standard_normal((64, 5)).astype("float32"), y=numpy.arange(64) % 10)
    >>> model = minilora.nn.Linear(5, 10, rng=0)
    >>> found = loss_at_chance(model, data, fresh=True, loss=lambda model, inputs: minilora.ops.cross_entropy(
    ...     model(minilora.tensor(inputs["x"])), inputs["y"]))
    >>> found.outcome, found.expected
    ('ok', 'ln 10 = 2.303')
    """
    settings = settings or Settings()
    picked = pick(data, settings, batches)
    came, guessed, seen = rehearsed(lambda: measured(model, picked, settings, loss), model, loss)
    text, chance = told(seen, guessed if expected is None else expected, expected)
    targets = sum(batch.targets for batch in picked.batches)
    outcome, high, low = judged(came, chance, targets, seen, fresh, expected)
    words: list[str] = []
    if chance is None:
        words.append("Which loss this is could not be seen: it has no cross-entropy, mean square or softmax, or several. Say "
                     "what guessing costs: expected=...")
    words += causes(came, chance, seen, high, low, predicts_tokens(model))
    words += [text for batch, look in zip(picked.batches[:1], seen[:1]) for text in leaks(batch.inputs, look)
              if loss is not loss_of_model]
    if outcome == OK and words:
        outcome = LOOK
    better = "" if chance is None or high or low or came >= 0.9 * chance else ", better than chance"
    return Chance("loss at chance", outcome, text, f"{came:.4g}{better}", tuple(words), came, chance)


def measured(model: Module, picked: Picked, settings: Settings, loss: LossFunction) -> tuple[float, float | None, list[Seen]]:
    """The mean loss over the targets of all batches, that of guessing, and what the passes made."""
    total, guessed, seen = 0.0, 0.0, []
    with in_mode(model, training=False), no_grad(), numpy.errstate(all="ignore"):
        for batch in picked.batches:
            with watched() as look:
                if settings.precision == "mixed":
                    with mixed():
                        came = loss(model, batch.inputs)
                else:
                    came = loss(model, batch.inputs)
            total += came.item() * batch.targets
            guess = guess_of(look)
            guessed += math.nan if guess is None else guess * batch.targets
            seen.append(look)
    targets = sum(batch.targets for batch in picked.batches)
    return total / targets, None if math.isnan(guessed) else guessed / targets, seen


def guess_of(look: Seen) -> float | None:
    """What guessing costs in a pass; None where that cannot be seen."""
    if len(look.goals) == 1:
        return math.log(look.goals[0].classes) if look.goals[0].kind == "classes" else mean_square(look.goals[0])
    return math.log(look.softmax) if look.softmax and not look.goals else None


def mean_square(goal: Goal) -> float:
    return float((backend.to_host(goal.wanted).astype("float64") ** 2).mean())


def told(seen: list[Seen], chance: float | None, given: float | None) -> tuple[str, float | None]:
    """The expected loss in words."""
    if chance is None:
        return "", None
    classes = {look.goals[0].classes if look.goals else look.softmax for look in seen}
    if given is None and len(classes) == 1 and 0 not in classes:
        return f"ln {classes.pop():,} = {chance:.3f}", chance
    return f"mean of t^2 = {chance:.4g}" if given is None and 0 in classes else f"{chance:.4g}", chance


def judged(came: float, chance: float | None, targets: int, seen: list[Seen], fresh: bool | None,
           given: float | None) -> tuple[str, bool, bool]:
    """The outcome, and whether the loss is far too high, or far too low for a fresh model."""
    if not math.isfinite(came):
        return FAILED, True, False
    if chance is None:
        return SKIPPED, False, False
    if given is None and seen[0].goals and seen[0].goals[0].kind == "numbers":
        high, low = came > OF_SQUARES * chance, came < chance / OF_SQUARES
    else:
        room = max(SHARE * chance, LEAST) + SPREAD / math.sqrt(targets)
        high, low = came > chance + room, came < chance - max(SHARE * chance, SPREAD / math.sqrt(targets))
    low = low and fresh is True
    return (FAILED if high or low else OK), high, low


def causes(came: float, chance: float | None, seen: list[Seen], high: bool, low: bool, tokens: bool) -> Iterator[str]:
    """What may be the matter with a loss."""
    goals = [goal for look in seen[:1] for goal in look.goals]
    if not math.isfinite(came):
        yield "The loss is not finite: train.fit names the first array that is not."
    if len(goals) == 1 and math.isfinite(came):
        value = plain(goals[0].value)
        factor = float(came / value) if value and len(seen) == 1 else 0.0
        if factor and not 0.99 < factor < 1.01:
            what = "cross-entropy" if goals[0].kind == "classes" else "mean square"
            yield (f"The loss is {factor:.3g} times the mean {what} in it: is it multiplied, summed over rows, divided "
                   "twice, or has it a second term? A loss of fit is the mean over its targets.")
    if not (high or low):
        return
    largest = max((plain(goal.largest) for goal in goals if goal.largest is not None), default=0.0)
    if high and largest > LARGE and goals[0].kind == "classes":
        yield (f"The largest logit is {largest:.3g}: logits are multiplied, or weights of the last layer are too large at the "
               "start.")
    if goals and goals[0].kind == "numbers":
        wanted = backend.to_host(goals[0].wanted)
        yield (f"The targets have mean {wanted.mean():.3g} and standard deviation {wanted.std():.3g}, the largest output is "
               f"{largest:.3g}: bring targets and inputs to mean 0 and deviation 1.")
    elif high:
        yield ("Worse than guessing: are the labels those of this model (their order, shifted by one), is the tokenizer the "
               "model's own, is the mask right?")
    if low:
        yield ("Better than guessing before any training: does the input hold the answer, is the loss divided twice, or is "
               "the model not fresh (fresh=None)?" + (" A decoder must not see the token that it predicts." if tokens else ""))


def leaks(inputs: Mapping[str, Any], look: Seen) -> Iterator[str]:
    """Inputs that hold what is wanted."""
    if len(look.goals) != 1:
        return
    wanted = numpy.ravel(backend.to_host(look.goals[0].wanted))
    if len(wanted) < 4 or (wanted == wanted[0]).all():
        return
    for name, value in inputs.items():
        array = getattr(value, "data", value) if not isinstance(value, numpy.ndarray) else value
        if not isinstance(array, numpy.ndarray) or array.ndim != 2 or len(array) != len(wanted) or array.shape[1] < 2:
            continue
        same = numpy.flatnonzero((array == wanted[:, None]).all(axis=0))
        if len(same):
            yield f"Column {same[0]} of {name} is the answer itself: leave it out of the inputs."
