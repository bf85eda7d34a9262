"""The names of the lora package that are loaded when first used."""

import dataclasses
import inspect
from pathlib import Path

import pytest

import minilora
from minilora import lora


@pytest.mark.parametrize("name", lora.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lora, name) is getattr(lora, name) and not hasattr(getattr(lora, name), "__path__")


def test_no_room_bears_the_name_of_what_is_in_it():
    # Importing a room sets its name in the package: a function of that name would be hidden.
    rooms = {path.stem for path in Path(lora.__file__).parent.glob("*") if path.suffix in ("", ".py")}
    assert rooms & set(lora.__all__) == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'murge'"):
        lora.murge


def test_what_an_editor_sees():
    assert set(lora.__all__) <= set(dir(lora)) and {"models", "testing"} <= set(dir(minilora)) and "GPT2" in dir(minilora.nn)
    settings = inspect.signature(lora.Config).parameters
    assert [*settings] == [field.name for field in dataclasses.fields(lora.Config)]
    assert settings["r"].default == 8 and settings["r"].kind is inspect.Parameter.KEYWORD_ONLY
