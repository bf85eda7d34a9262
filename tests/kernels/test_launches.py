"""What a whole training step asks of a GPU may not grow unnoticed; the budgets are in tests/launches.py."""
from pathlib import Path

import launches
import pytest
import standin

import minilora


@pytest.mark.parametrize("name", launches.JOBS)
def test_launches_copies_and_waits_of_a_step(name):
    job, counts = launches.JOBS[name], launches.counts_of(name)
    assert (counts.syncs, counts.d2h) == (0, 0), "a step waits for the GPU nowhere"
    assert counts.h2d <= job.copies, counts
    assert counts.launches <= job.launches, f"{name}: {counts}"


def test_a_launch_more_and_a_wait_are_noticed():
    def with_a_mistake(mistake):
        def make():
            step = launches.main_job()

            def careless():
                step()
                mistake(minilora.to_device(launches.numpy.ones(1)))
            return careless
        return launches.counted(make)

    clean = launches.counted(launches.main_job)
    assert with_a_mistake(lambda x: x + x).launches == clean.launches + 1
    assert with_a_mistake(lambda x: None).h2d == clean.h2d + 1
    assert with_a_mistake(lambda x: float(x.sum())).syncs == 1


def test_the_page_says_what_is_counted():
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "\n".join(launches.rows()) in page, "put the output of tests/launches.py into docs/gpu.md"


def test_the_card_is_forgotten():
    launches.counted(launches.main_job)
    with pytest.raises(minilora.errors.ConfigError):
        minilora.use("card")
    with standin.card() as card:
        assert minilora.current_device() is card
