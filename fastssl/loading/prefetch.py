"""Run a generator in a thread, ahead of the loop that takes its items."""

from collections.abc import Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

from fastssl.loading.spans import span

Item = TypeVar("Item")


def run_ahead(items: Generator[Item, None, None], ready: int) -> Iterator[Item]:
    """Yield the items of a generator that runs in its own thread; up to `ready` finished items wait for the caller.

    An exception in the thread is raised here instead of its next item. When the caller stops taking items, for any
    reason, the generator is closed and the thread ends.
    """
    finished: SimpleQueue[Item | BaseException | None] = SimpleQueue()  # None: no more items
    room = Semaphore(ready)
    stop = Event()

    def run() -> None:
        try:
            with closing(items):
                for item in items:
                    with span("wait for room"):
                        room.acquire()
                    if stop.is_set():
                        return
                    finished.put(item)
                    del item  # its buffer is free for another batch as soon as the caller lets go of it
            finished.put(None)
        except BaseException as error:
            finished.put(error)

    thread = Thread(target=run, name="fastssl-reader", daemon=True)
    try:
        thread.start()  # within `try`: Ctrl-C may interrupt this call after the thread has started
        while (item := finished.get()) is not None:
            room.release()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        room.release()  # the thread may be waiting for it
        if thread.is_alive():
            thread.join()
