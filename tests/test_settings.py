"""Settings that are numbers: Python's and NumPy's are taken alike, and become Python's own; all else is refused."""
import math
from fractions import Fraction

import numpy as np
import pytest

from minilora import lora, nn
from minilora.errors import ConfigError
from minilora.settings import number, whole

NO_NUMBERS = [True, False, np.True_, "1", None, [1.0], np.ones(1), 1j, math.nan, math.inf, -math.inf]
TOO_LARGE = [10 ** 400, -10 ** 400]  # as JSON may have them: no float holds them


@pytest.mark.parametrize("value", [1, 3, np.int8(1), np.int64(7), np.uint64(9)], ids=repr)
def test_whole_numbers(value):
    assert whole("n", value) == value and type(whole("n", value)) is int


@pytest.mark.parametrize("value", [0, -1, np.int64(0), 1.0, np.float64(2.0), Fraction(2), *NO_NUMBERS], ids=repr)
def test_no_whole_numbers(value):
    with pytest.raises(ConfigError, match="^n must be an int >= 1, got "):
        whole("n", value)


@pytest.mark.parametrize("value", [0, 0.25, np.float16(0.5), np.float32(0.1), np.float64(0.75), np.int64(0), Fraction(1, 4)],
                         ids=repr)
def test_numbers(value):
    assert number("p", value, 0.0, 1.0) == value and type(number("p", value, 0.0, 1.0)) is float


@pytest.mark.parametrize("value", [1, -0.1, np.float32(1.0), *NO_NUMBERS[:1], *NO_NUMBERS[2:]], ids=repr)
def test_no_numbers(value):
    with pytest.raises(ConfigError, match=r"^p must be a number in \[0, 1\), got .*: why$"):
        number("p", value, 0.0, 1.0, why=": why")


@pytest.mark.parametrize("value", TOO_LARGE, ids=["above", "below"])
def test_whole_numbers_that_no_float_holds(value):
    with pytest.raises(ConfigError, match="^p must be a number in "):
        number("p", value, -math.inf)


@pytest.mark.parametrize(("ends", "inside"), [("[)", [0, 0.5]), ("[]", [0, 0.5, 1]), ("()", [0.5]), ("(]", [0.5, 1])])
def test_ends(ends, inside):
    taken = []
    for value in (0, 0.5, 1):
        try:
            number("p", value, 0.0, 1.0, ends=ends)
        except ConfigError as error:
            assert f"{ends[0]}0, 1{ends[1]}" in str(error)
        else:
            taken.append(value)
    assert taken == inside


LAYERS = {  # the layer made with NumPy's numbers, and with Python's
    "Dropout": (lambda f, i: nn.Dropout(f(0.5), rng=0)),
    "LayerNorm": (lambda f, i: nn.LayerNorm(i(4), f(0.5))),
    "RMSNorm": (lambda f, i: nn.RMSNorm(i(4), f(0.5))),
    "GroupNorm": (lambda f, i: nn.GroupNorm(i(2), i(4), f(0.5))),
    "CrossEntropyLoss": (lambda f, i: nn.CrossEntropyLoss(ignore_index=i(-1), label_smoothing=f(0.5))),
    "Embedding": (lambda f, i: nn.Embedding(i(4), i(3), i(1), rng=0)),
    "Conv2d": (lambda f, i: nn.Conv2d(i(2), i(4), i(3), i(2), i(1), i(1), i(2), rng=0)),
    "MultiheadAttention": (lambda f, i: nn.MultiheadAttention(i(8), i(4), i(2), rng=0)),
    "RotaryEmbedding": (lambda f, i: nn.RotaryEmbedding(i(8), f(512.0))),
    "Flatten": (lambda f, i: nn.Flatten(i(1), i(2))),
    "lora.Linear": (lambda f, i: lora.Linear(i(3), i(2), r=i(2), lora_dropout=f(0.5), rng=0)),
}


def settings_of(module):
    """Every plain attribute, to any depth, with its type."""
    return [(path, name, type(value), value) for path, part in module.named_modules()
            for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple, np.generic))]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_take_numpy_numbers_and_keep_python_s(make):
    """A NumPy float kept as a constant would promote float32 arrays."""
    assert settings_of(make(np.float64, np.int64)) == settings_of(make(float, int))
    assert settings_of(make(np.float32, np.int32)) == settings_of(make(float, int))
