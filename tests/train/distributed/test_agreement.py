"""What processes agree on, and the one error that all of them get."""
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import together

from minilora.errors import StateError
from minilora.train.distributed.agreement import agree, first_told, gathered


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_texts_are_gathered_in_the_order_of_the_ranks(texts):
    assert together(len(texts), lambda comm: gathered(comm, texts[comm.rank])) == [texts] * len(texts)


def test_texts_of_very_different_lengths_and_odd_letters():
    texts = ["", "a" * 100_001, "naïve \x00 \udcff 漢字", ""]
    assert together(4, lambda comm: gathered(comm, texts[comm.rank])) == [texts] * 4
    assert together(4, lambda comm: first_told(comm, texts[comm.rank])) == [texts[1]] * 4
    assert together(3, lambda comm: first_told(comm, "")) == [""] * 3


FACTS = {"versions": "minilora 0.4", "settings": {"seed": 0, "steps": 10}, "data": "abc",
         "base": {"a.weight": "1", "b.weight": "2"}}


def refused(size, facts_of):
    def rank(comm):
        with pytest.raises(StateError) as error:
            agree(comm, facts_of(comm.rank))
        return str(error.value)

    texts = together(size, rank)
    assert len(set(texts)) == 1
    return texts[0]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_same_everywhere_is_fine_and_takes_two_messages(size):
    def rank(comm):
        agree(comm, FACTS)
        return len(comm.messages)

    assert together(size, rank) == [2 if size > 1 else 0] * size


def test_what_differs_is_named_with_the_ranks():
    text = refused(4, lambda rank: {**FACTS, "settings": {"seed": rank // 3, "steps": 10}})
    assert "settings: seed: ranks 0, 1, 2, another in rank 3" in text and "steps" not in text and "data" not in text


def test_all_differences_in_one_message():
    text = refused(2, lambda rank: {**FACTS, "data": rank, "base": {"a.weight": "1", "b.weight": str(rank)}})
    assert "data: rank 0, another in rank 1" in text and "base: b.weight" in text and "a.weight" not in text


def test_a_fact_that_one_lacks():
    text = refused(3, lambda rank: {**FACTS, "base": {"a.weight": "1"} if rank == 1 else FACTS["base"]})
    assert "base: b.weight: ranks 0, 2, another in rank 1 has none" in text


def test_many_differences_and_ranks_are_cut_short():
    text = refused(12, lambda rank: {"base": {f"layer.{i}": rank > 0 for i in range(30)}})
    assert "and 22 more" in text and "rank 0, another in ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more" in text


def test_a_dict_here_and_a_value_there():
    assert "base" in refused(2, lambda rank: {"base": {"a": 1} if rank else 1})
    assert "base" in refused(2, lambda rank: {"base": {} if rank else None})
