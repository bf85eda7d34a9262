"""The typed script of a user does at run time what its types say; .ci/run checks the types themselves with mypy."""
import inspect
import typing

import numpy as np
import pytest
import typed_user

import minilora
from minilora import Parameter, Tensor, ops
from minilora import typing as types


def test_what_is_typed_right_runs():
    assert np.isfinite(typed_user.right().item())


@pytest.mark.parametrize("mistake", typed_user.wrong(Tensor(np.ones((2, 3))), Parameter(np.ones((4, 3)))),
                         ids=lambda mistake: f"line {mistake.__code__.co_firstlineno}")
def test_what_is_typed_wrong_is_an_error(mistake):
    with pytest.raises((TypeError, AttributeError, ValueError)):
        mistake()


# What makes tables and settings for operations, not tensors.
TABLES = {"check_rotary_scaling", "distance_buckets", "rotary_frequencies", "rotary_tables", "scaled_rotary_frequencies"}


@pytest.mark.parametrize("name", [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))])
def test_no_operation_takes_anything(name):
    """An input annotated Any would take text without a word; and each gives a tensor."""
    given = inspect.signature(getattr(ops, name))
    first = next(iter(given.parameters.values()))
    assert first.annotation not in ("Any", "Array", inspect.Parameter.empty)
    if name not in TABLES | {"with_weights"}:  # while nothing is recorded, a network may give several
        assert given.return_annotation == ("tuple[Tensor, ...]" if name == "split" else "Tensor")


@pytest.mark.parametrize("name", types.__all__)
def test_types_can_be_used_at_run_time(name):
    def function(x):
        pass

    function.__annotations__["x"] = getattr(types, name)
    assert typing.get_type_hints(function, localns={"Tensor": Tensor})


def test_types_are_public():
    assert minilora.typing is types
