"""The threads of the BLAS: held to one, and set back whatever happens."""

import threading

import pytest

from minilora import blas

pytestmark = pytest.mark.skipif(not blas.can_hold(), reason="needs an OpenBLAS whose threads can be set")


@pytest.fixture
def threads():
    """How many there are, for a BLAS that has three."""
    calls = blas._calls()
    found = calls.get()
    calls.set(3)
    yield calls.get
    calls.set(found)


def test_held_within_and_set_back_after(threads):
    with blas.one_thread():
        assert threads() == 1
        with blas.one_thread():
            assert threads() == 1
        assert threads() == 1  # the outer one still holds
    assert threads() == 3
    with pytest.raises(KeyboardInterrupt), blas.one_thread():
        raise KeyboardInterrupt
    assert threads() == 3


def test_the_last_of_several_threads_sets_it_back(threads):
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def hold(event):
        with blas.one_thread():
            inside.wait()
            event.wait()

    workers = [threading.Thread(target=hold, args=(event,)) for event in leave]
    for worker in workers:
        worker.start()
    inside.wait()
    for worker, event, expected in zip(workers, leave, (1, 3)):
        assert threads() == 1
        event.set()
        worker.join()
        assert threads() == expected


def test_an_interrupt_while_leaving_sets_it_back(threads, monkeypatch):
    leave, times = blas._leave, []

    def interrupted(calls, me):
        times.append(0)
        if len(times) == 1:
            raise KeyboardInterrupt
        leave(calls, me)

    monkeypatch.setattr(blas, "_leave", interrupted)
    with pytest.raises(KeyboardInterrupt), blas.one_thread():
        pass
    assert threads() == 3


def test_another_blas_is_left_alone(threads, monkeypatch):
    monkeypatch.setattr(blas, "_calls", lambda: None)
    assert not blas.can_hold()
    with blas.one_thread():
        assert threads() == 3
    assert threads() == 3


def test_names_that_are_not_there_mean_another_blas(monkeypatch):
    monkeypatch.setattr(blas, "NAMES", ("nobody_{}_this",))
    assert blas._calls.__wrapped__() is None


def test_what_it_is_called_says_its_threads(threads):
    assert blas.described().endswith("threads: 3") and blas.described() == blas.described()
    with blas.one_thread():
        assert blas.described().endswith("threads: 1")


def test_a_limit_holds_from_then_on_and_lifts_nothing(threads):
    blas.limit(5)
    assert threads() == 3
    blas.limit(2)
    with blas.one_thread():
        assert threads() == 1
    assert threads() == 2


def test_a_limit_that_is_set_meanwhile_holds_afterwards(threads):
    with blas.one_thread():
        blas.limit(2)
        assert threads() == 1
    assert threads() == 2
