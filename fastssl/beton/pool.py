"""The worker processes: they read, decode, encode and write; this process tells them what.

Images are handed out in chunks. A worker that has encoded its chunk waits for its turn, learns
where in the file it goes, lets the next one have its turn and only then writes. So the file does
not depend on the number of workers, and no image passes through another process on its way.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from pathlib import Path

import numpy as np

from fastssl.beton.images import Case, Plan, encode_all, quiet_decoders
from fastssl.beton.sample import ImageSource
from fastssl.beton.write import ROW, place
from fastssl.common.errors import UserError

CHUNK = 32  # images handed to a worker at once
UNDER_WAY = 16  # chunks a worker handed out at most: enough to do while a slow disk is waited for


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Pool]:
    """Worker processes that end with the block; one that dies ends the block with a UserError."""
    pool = Pool(workers)
    try:
        yield pool
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "A worker process died or ran out of memory (dmesg names what the kernel killed): try again "
            f"with {f'fewer than {workers} --workers' if workers > 1 else 'more memory'}. What a build had "
            "finished is kept. (In a script of your own, call it under `if __name__ == '__main__':`.)"
        ) from error
    finally:
        pool.shutdown()


class Pool:
    """Processes started anew (spawn): a fork would copy the locks of torch's threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        context = multiprocessing.get_context("spawn")
        self._turns = Turns(context)
        self._executor = ProcessPoolExecutor(workers, context, _start_worker, (self._turns,))

    def in_order(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """function(*task) for every task, in their order; only a few are under way at a time.

        So memory does not grow with their number, and nobody waits for who is slower for long.
        """
        tasks = iter(tasks)
        pending: deque[Future] = deque()
        while True:
            for task in itertools.islice(tasks, UNDER_WAY * self.workers - len(pending)):
                pending.append(self._executor.submit(function, *task))
            if not pending:
                return
            yield pending.popleft().result()

    def write_encoded(
        self, path: Path, position: int, images: Iterable[ImageSource], plan: Plan
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Encode `images` and write them to the file from byte `position` on, in their order.

        Yields for each chunk its rows (ROW, index and label left 0), and the reason for each of
        them that is Case.BAD. What has been yielded has been written, if not yet to the disk.
        """
        self._turns.restart(position)
        chunks = in_chunks(images, CHUNK)
        tasks = ((path, turn, chunk, plan) for turn, chunk in enumerate(chunks))
        return self.in_order(_write_encoded, tasks)

    def shutdown(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def in_chunks(images: Iterable[ImageSource], size: int) -> Iterator[list[ImageSource]]:
    images = iter(images)
    while chunk := list(itertools.islice(images, size)):
        yield chunk


class Turns:
    """Shared by the workers: whose turn it is to be given a place in the file, and which."""

    def __init__(self, context: SpawnContext) -> None:
        self._changed = context.Condition()
        self._turn = context.Value("q", 0, lock=False)
        self._position = context.Value("q", 0, lock=False)
        self._failed = context.Value("b", False, lock=False)

    def restart(self, position: int) -> None:
        """Only while no worker waits."""
        self._turn.value, self._position.value = 0, position

    def place(self, turn: int, sizes: list[int]) -> list[int]:
        """Wait for this turn and take it: gives the samples' places in the file."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn.value == turn or self._failed.value)
            # A later chunk may have failed already; the first error in order is the one that the user is told.
            if self._turn.value != turn:
                raise RuntimeError("an earlier chunk failed")
            pointers, self._position.value = place(sizes, self._position.value)
            self._turn.value += 1
            self._changed.notify_all()
        return pointers

    def give_up(self) -> None:
        """Nobody may wait for a turn that will not be taken."""
        with self._changed:
            self._failed.value = True
            self._changed.notify_all()


_turns: Turns  # of this worker process


def _start_worker(turns: Turns) -> None:
    global _turns
    _turns = turns
    quiet_decoders()
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed outright cannot end its workers: they watch for that themselves.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write_encoded(path: Path, turn: int, images: list[ImageSource], plan: Plan) -> tuple[np.ndarray, list[str]]:
    try:
        results = encode_all(images, plan)
        good = [result for result in results if not isinstance(result, str)]
        pointers = _turns.place(turn, [len(image.payload) for image in good])
    except BaseException:
        _turns.give_up()
        raise

    with open(path, "r+b") as file:
        for image, pointer in zip(good, pointers):
            file.seek(pointer)
            file.write(image.payload)

    rows = np.zeros(len(results), ROW)
    places = iter(pointers)
    for row, image in zip(rows, results):
        if isinstance(image, str):
            row["case"] = Case.BAD
            continue
        row["case"], row["mode"] = image.case, image.mode
        row["width"], row["height"] = image.width, image.height
        row["source_width"], row["source_height"] = image.source_width, image.source_height
        row["size"], row["crc32"] = len(image.payload), zlib.crc32(image.payload)
        row["data_ptr"], row["source_format"] = next(places), image.source_format
    return rows, [result for result in results if isinstance(result, str)]
