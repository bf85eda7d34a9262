"""A choice for the whole process: who decides, and when the environment is read."""
import pytest

from minilora.choice import Choice
from minilora.errors import ConfigError

NAME = "MINILORA_NEVER"


def choice(usual=True):
    return Choice(NAME, lambda: usual, f"Type unset {NAME}")


@pytest.mark.parametrize("usual", [True, False])
def test_without_the_variable_it_is_as_usual(usual, monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    one = choice(usual)
    assert one.chosen is None and one.on() is usual and one.chosen is usual


@pytest.mark.parametrize(("word", "on"), [("on", True), ("1", True), ("off", False), ("0", False)])
def test_the_variable_decides_at_the_first_use_and_never_again(word, on, monkeypatch):
    one = choice(not on)
    monkeypatch.setenv(NAME, word)
    assert one.on() is on
    monkeypatch.setenv(NAME, "off" if on else "on")
    assert one.on() is on
    one.chosen = None
    assert one.on() is not on


@pytest.mark.parametrize("word", ["", "ON", "true", " on", "2"])
def test_another_word_is_refused_until_somebody_chooses(word, monkeypatch):
    monkeypatch.setenv(NAME, word)
    one = choice()
    for _ in range(2):  # nothing is remembered
        with pytest.raises(ConfigError, match=f"{NAME} is {word!r}: expected on or off .* Type unset {NAME}"):
            one.on()
    one.chosen = False
    assert one.on() is False
