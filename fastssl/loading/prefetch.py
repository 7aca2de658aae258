"""Run a generator in a thread, ahead of the loop that takes its items."""

import queue
from collections.abc import Generator, Iterator
from contextlib import closing
from threading import Event, Thread
from typing import TypeVar

from fastssl.loading.spans import span

Item = TypeVar("Item")


def run_ahead(items: Generator[Item, None, None], ready: int) -> Iterator[Item]:
    """Yield the items of a generator that runs in its own thread, up to `ready` items ahead.

    An exception in the thread is raised here instead of its next item. When the caller stops taking items, for whatever
    reason, the generator is closed and the thread ends.
    """
    finished: queue.Queue[Item | BaseException | None] = queue.Queue(ready)  # None: no more items
    stop = Event()

    def put(item: Item | BaseException | None) -> None:
        # A queue cannot wait for room and for `stop` at the same time.
        while not stop.is_set():
            try:
                return finished.put(item, timeout=0.05)
            except queue.Full:
                pass

    def run() -> None:
        try:
            with closing(items):
                for item in items:
                    with span("wait for room"):
                        put(item)
                    if stop.is_set():
                        return
                    del item  # its buffer is free for another batch as soon as the caller lets go of it
            put(None)
        except BaseException as error:
            put(error)

    thread = Thread(target=run, name="fastssl-reader", daemon=True)
    try:
        thread.start()  # within `try`: Ctrl-C may interrupt this call after the thread has started
        while (item := finished.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
