"""What every JSON that is read must keep."""

import json

import pytest

from minilora.formats.json_rules import TwiceError, no_number, once


def read(text):
    return json.loads(text, object_pairs_hook=once, parse_constant=no_number)


def test_what_keeps_the_rules_is_read():
    assert read('{"a": {"b": [1, {"b": 2}]}, "b": 0, "": {}}') == {"a": {"b": [1, {"b": 2}]}, "b": 0, "": {}}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'])
def test_a_name_twice_at_any_depth(text):
    with pytest.raises(TwiceError, match="the name 'a' is there twice") as caught:
        read(text)
    assert caught.value.name == "a" and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_calls_no_number(word):
    with pytest.raises(ValueError, match=f"{word} is no number"):
        read(f'{{"a": [{word}]}}')
