"""A loss that is not finite stops the loop: with the step, the last good value, likely causes and the line to type."""
import doctest
import math
from fractions import Fraction

import demo_runs
import numpy
import pytest

import minilora

divergence = demo_runs.piece("divergence")
Watch, Diverged = divergence.Watch, divergence.Diverged


def test_doctest():
    assert doctest.testmod(divergence).attempted and not doctest.testmod(divergence).failed


@pytest.mark.parametrize("loss", [0.5, 0, -3, numpy.float32(0.5), numpy.float16(0.5), numpy.int64(2), Fraction(1, 2)])
def test_a_finite_loss_comes_back_as_a_float(loss):
    value = Watch("").check(loss, 1)
    assert type(value) is float and value == loss


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, numpy.float32("nan"), numpy.float64("inf")])
def test_one_that_is_not_stops_with_all_that_is_known(loss):
    watch = Watch("a smaller lr may help", "python train.py --lr 0.01", "pre-training: the loss", "epoch")
    watch.check(0.75, 4)
    watch.check(0.5, 8)
    with pytest.raises(Diverged) as stop:
        watch.check(loss, 12)
    text = str(stop.value)
    assert text.startswith(f"pre-training: the loss is {float(loss)} in epoch 12: a smaller lr may help. ")
    assert " It was 0.5 in epoch 8; " in text
    assert "likely causes" in text and text.endswith(" Try: python train.py --lr 0.01")
    assert stop.value.step == 12 and stop.value.last == (0.5, 8) and not math.isfinite(stop.value.value)
    assert stop.value.status == f"diverged: {text}"
    assert isinstance(stop.value, (minilora.errors.MiniloraError, ArithmeticError))


def test_the_first_loss_has_no_history():
    with pytest.raises(Diverged, match="in step 1: .* No finite one was read before; .* NaN in the data"):
        Watch("look at the data").check(math.nan, 1)


@pytest.mark.parametrize("give", [
    lambda: minilora.tensor(numpy.array(0.5)), lambda: minilora.tensor(numpy.array(0.5)).data, lambda: "0.5", lambda: None,
    lambda: 1j])
def test_what_has_still_to_be_read_is_refused(give, device):
    watch = Watch("")
    if isinstance(give(), numpy.generic):  # NumPy makes a number on the host of a 0-d array
        return
    with pytest.raises(TypeError, match=r"read already, got .*watch\.check\(loss\.item\(\), step\)"):
        watch.check(give(), 1)
    assert watch.last is None


def test_following_that_advice_works(device):
    loss = minilora.tensor(numpy.array(0.5))
    assert Watch("").check(loss.item(), 1) == 0.5
