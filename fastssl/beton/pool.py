"""The worker processes that decode and encode, with results in order and memory bounded."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fastssl.recipe import UserError

from .images import Encoded, Plan, encode_chunk, quiet_decoders
from .sample import ImageSource

CHUNK = 32  # images sent to a worker at once; a full-layout chunk comes back as about 5 MB


@contextlib.contextmanager
def encoder_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, started anew (spawn): a fork would copy the locks of torch's threads."""
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process of build-beton died (often the kernel's out-of-memory killer, see "
            f"dmesg); nothing unfinished is kept: try again with fewer than {workers} --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encoded_in_order(
    pool: ProcessPoolExecutor,
    images: Iterable[ImageSource],
    plan: Plan,
    workers: int,
) -> Iterator[Encoded | str]:
    """Yield every image encoded, or the reason why it is bad, in the order they came.

    At most two chunks a worker are under way, so memory does not grow with the data set, and
    what a slow disk has not taken yet is not encoded ahead.
    """
    images = iter(images)
    under_way: deque[Future[list[Encoded | str]]] = deque()
    while True:
        while len(under_way) < 2 * workers and (chunk := list(itertools.islice(images, CHUNK))):
            under_way.append(pool.submit(encode_chunk, chunk, plan))
        if not under_way:
            return
        yield from under_way.popleft().result()


def _start_worker() -> None:
    quiet_decoders()
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed outright cannot end its workers: they watch for that themselves.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
