"""run_ahead: order, how far it runs ahead, exceptions, and the end of its thread."""

import threading
import time

import pytest

from fastssl.loading.prefetch import run_ahead


def counting(made, closed, stop=100):
    """Yields 0, 1, ...; `made` grows with each item, `closed` gets an entry when the generator ends."""
    try:
        for number in range(stop):
            made.append(number)
            yield number
    finally:
        closed.append(threading.current_thread().name)


def test_all_items_come_in_order_from_the_thread():
    made, closed = [], []
    assert list(run_ahead(counting(made, closed, 20), ready=2)) == list(range(20))
    assert closed == ["fastssl-reader"]


@pytest.mark.parametrize("ready", [1, 3])
def test_the_thread_runs_ahead_by_the_ready_items_and_one_that_waits_for_room(ready):
    before, made, closed = threading.active_count(), [], []
    items = run_ahead(counting(made, closed), ready)
    assert [next(items), next(items)] == [0, 1]
    until = time.monotonic() + 10
    while len(made) < 3 + ready and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 3 + ready  # the two taken, the ready ones, and the one in the thread
    items.close()
    assert closed == ["fastssl-reader"] and threading.active_count() == before


def test_an_exception_comes_after_the_items_before_it():
    def failing():
        yield 1
        raise KeyError("broken")

    items = run_ahead(failing(), ready=2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken"):
        next(items)


def test_an_exception_of_the_caller_ends_the_thread():
    before, made, closed = threading.active_count(), [], []
    with pytest.raises(ZeroDivisionError):
        for number in run_ahead(counting(made, closed), ready=1):
            number / 0
    assert len(closed) == 1 and threading.active_count() == before
