"""The worker processes: they read, decode, encode and write the images; the main process only hands out tasks.

Images are handed out in chunks. A worker that has encoded its chunk waits for its turn, reserves its range of the file,
passes the turn on and only then writes. So the file does not depend on the number of workers, and no image passes
through another process.

A worker may die: of a damaged image that crashes a decoder, of an image for which there is no memory, or because
somebody or the kernel kills it. Then the images that the workers had are encoded again, in one process that has one of
them at a time, and an image is bad only if the process dies again.
"""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastssl.beton.format import ROW, allocate
from fastssl.beton.images import Case, Encoded, StoragePlan, encode_all
from fastssl.beton.source import ImageSource
from fastssl.common.errors import UserError
from fastssl.common.files import machine_fix

COPIED = (  # fields of images.Encoded that format.ROW has too
    *("case", "mode", "width", "height", "source_width", "source_height", "source_format", "is_nearly_black"),
)
NONE_FAILED = 2**63 - 1
CHUNK = 32  # images per task
TASKS_PER_WORKER = 16  # submitted at a time: enough to do while a worker waits for a slow disk
# What a future raises whose process has died, or lacks memory.
WORKER_DIED = (BrokenProcessPool, MemoryError)
# Reasons of bad images.
DIED = "the worker process died"
NO_MEMORY = "there is not enough memory to decode it"

Item = TypeVar("Item")
Result = TypeVar("Result")


# Of a chunk of images that has been written: format.ROW of each image, with index and label 0, and for each row with
# Case.BAD why the image is bad.
WrittenChunk = tuple[np.ndarray, list[str]]


class Turns:
    """Lets the workers reserve ranges of the file in the order of the chunks. Shared memory of all processes."""

    def __init__(self, context: SpawnContext) -> None:
        self._changed = context.Condition()
        self._turn = context.Value("q", 0, lock=False)
        self._position = context.Value("q", 0, lock=False)
        self._failed = context.Value("q", NONE_FAILED, lock=False)  # the first chunk that failed

    def restart(self, position: int) -> None:
        """Begin again with chunk 0, at byte `position` of the file. No worker may be waiting."""
        self._turn.value = 0
        self._position.value = position

    def reserve(self, turn: int, sizes: list[int]) -> list[int]:
        """Wait for chunk `turn` to be the next one. Return the positions in the file for samples of these sizes."""
        with self._changed:
            # If a later chunk has failed already, this one is still written: the user gets the first error in order.
            self._changed.wait_for(lambda: self._turn.value == turn or self._failed.value < turn)
            if self._turn.value != turn:
                raise RuntimeError("an earlier chunk failed")
            pointers, self._position.value = allocate(sizes, self._position.value)
            self._turn.value += 1
            self._changed.notify_all()
        return pointers

    @property
    def turn(self) -> int:
        """How many chunks have reserved their range."""
        return int(self._turn.value)

    def fail(self, turn: int) -> None:
        """Wake all workers that wait for a turn after this one, which will never be taken."""
        with self._changed:
            self._failed.value = min(self._failed.value, turn)
            self._changed.notify_all()


class Pool:
    """Worker processes, spawned rather than forked: a fork would copy the locks of torch's threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._start(workers)

    def _start(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._turns = Turns(context)
        self.executor = ProcessPoolExecutor(workers, context, _start_worker, (self._turns,))

    def _restart(self, workers: int) -> None:
        """Replace the processes, one of which has died."""
        self.close()
        self._start(workers)

    def close(self) -> None:
        """End the processes, after the tasks that they are at."""
        state = vars(self.executor)
        if state["_broken"]:
            # The executor has terminated its other processes, but not one that was just starting. It would wait forever
            # for that one, which waits until somebody takes its result.
            for process in list((state["_processes"] or {}).values()):
                process.kill()
        self.executor.shutdown(cancel_futures=True)

    def in_order(
        self,
        function: Callable[..., Result],
        tasks: Iterable[tuple[object, ...]],
        tasks_per_worker: int = TASKS_PER_WORKER,
    ) -> Iterator[Result]:
        """Yield function(*task) for every task, in the order of the tasks.

        A limited number of tasks is submitted at a time, so memory does not grow with their number.
        """
        tasks = iter(tasks)
        pending: deque[Future[Result]] = deque()
        while True:
            for task in itertools.islice(tasks, tasks_per_worker * self.workers - len(pending)):
                pending.append(self.executor.submit(function, *task))
            if not pending:
                return
            yield pending.popleft().result()

    def write_encoded(
        self, path: Path, position: int, images: Iterable[ImageSource], plan: StoragePlan
    ) -> Iterator[WrittenChunk]:
        """Encode `images` and write them to the file from byte `position` on, in their order.

        The chunks that it yields have been written to the file, but perhaps not yet to the disk.
        """
        self._turns.restart(position)
        tasks = ((path, turn, chunk, plan) for turn, chunk in enumerate(in_chunks(images, CHUNK)))
        return self.in_order(_write_encoded, tasks)

    def count_begun(self) -> int:
        """Return how many of the images of the last `write_encoded` workers may have begun, also if one has died."""
        # Workers take the chunks in order, and a worker that has one waits for its turn before it takes the next.
        return (self._turns.turn + self.workers) * CHUNK

    def write_one_by_one(
        self, path: Path, position: int, images: Iterable[ImageSource], plan: StoragePlan
    ) -> Iterator[WrittenChunk]:
        """Do as `write_encoded` after a worker has died: an image that ends a process in which it is alone is bad."""

        def write(image: ImageSource) -> WrittenChunk:
            (written,) = self.write_encoded(path, position, [image], plan)
            return written

        for written in self._in_one_process(write, images, plan):
            if isinstance(written, str):
                written = np.zeros(1, ROW), [written]
            rows, _ = written
            position = max(position, int(rows["data_ptr"][0]) + int(rows["size"][0]))
            yield written

    def encode(
        self,
        images: Iterable[ImageSource],
        plan: StoragePlan,
        images_per_task: int = CHUNK,
        tasks_per_worker: int = TASKS_PER_WORKER,
    ) -> Iterator[Encoded | str]:
        """Yield what `encode_all` returns for each image, in order, and why an image is bad of which a process dies."""
        chunks = in_chunks(images, images_per_task)
        pending: deque[tuple[list[ImageSource], Future[list[Encoded | str]] | None]] = deque()

        def encode_alone(image: ImageSource) -> Encoded | str:
            ((result,),) = self.in_order(encode_all, [([image], plan)])
            return result

        while True:
            for chunk in itertools.islice(chunks, tasks_per_worker * self.workers - len(pending)):
                pending.append((chunk, self._submit(chunk, plan)))
            if not pending:
                return
            chunk, future = pending.popleft()
            try:
                if future is None:
                    raise BrokenProcessPool
                yield from future.result()
            except WORKER_DIED:
                # If it was another chunk of which the process died, this comes again with the next one.
                yield from list(self._in_one_process(encode_alone, chunk, plan))
                pending = deque(
                    each if _has_result(each[1]) else (each[0], self._submit(each[0], plan)) for each in pending
                )

    def _submit(self, images: list[ImageSource], plan: StoragePlan) -> "Future[list[Encoded | str]] | None":
        """Let a worker encode the images. Returns None if one has died."""
        try:
            return self.executor.submit(encode_all, images, plan)
        except BrokenProcessPool:
            return None

    def _in_one_process(
        self, function: Callable[[ImageSource], Result], images: Iterable[ImageSource], plan: StoragePlan
    ) -> Iterator[Result | str]:
        """Yield function(image), which has the pool encode one image, or why the image is bad: its process dies.

        Raises BrokenProcessPool or MemoryError if a plain image ends the process too: then the machine is at fault.
        """
        self._restart(1)
        for image in images:
            try:
                result: Result | str = function(image)
            except WORKER_DIED as error:
                self._restart(1)
                list(self.in_order(encode_all, [([plain_image(plan.channels)], plan)]))
                result = NO_MEMORY if isinstance(error, MemoryError) else DIED
            yield result
        self._restart(self.workers)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Pool]:
    """Start worker processes that end with the block. A worker that dies raises UserError."""
    try:
        pool = Pool(workers)
    except OSError as error:
        fix = machine_fix(error) or "make room in /dev/shm, or mount it, with write access"
        raise UserError(f"The worker processes cannot be started ({error.strerror or error})", hint=fix) from error
    try:
        yield pool
    except WORKER_DIED as error:
        raise UserError(
            "A worker process died or ran out of memory (dmesg names what the kernel killed)",
            hint=f"try again with {f'fewer than {workers} --workers' if workers > 1 else 'more memory'}; a build "
            "resumes where it stopped (in a script of your own, call it under `if __name__ == '__main__':`)",
        ) from error
    finally:
        pool.close()


def plain_image(channels: int) -> np.ndarray:
    """Return pixels that can be encoded wherever anything can."""
    return np.zeros((8, 8) if channels == 1 else (8, 8, channels), np.uint8)


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one perhaps shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _has_result(future: Future[Result] | None) -> bool:
    return future is not None and future.done() and not future.cancelled() and future.exception() is None


# --- in the worker processes --------------------------------------------------------------------

_turns: Turns  # of this process


def _start_worker(turns: Turns) -> None:
    global _turns
    _turns = turns
    # Pillow warns about unusual but readable files, of which a million files have many.
    warnings.simplefilter("ignore")
    # Where memory runs out, the kernel is to end a worker, and not another program of the user.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Ctrl-C and the signal before a SLURM job's time limit reach all processes; only the main process reacts to them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # A main process that is killed cannot end its workers, so they watch for that themselves.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _write_encoded(path: Path, turn: int, images: list[ImageSource], plan: StoragePlan) -> WrittenChunk:
    try:
        results = encode_all(images, plan)
        good = [result for result in results if not isinstance(result, str)]
        pointers = _turns.reserve(turn, [len(image.payload) for image in good])
    except BaseException:
        _turns.fail(turn)
        raise

    with open(path, "r+b") as file:
        for image, pointer in zip(good, pointers):
            file.seek(pointer)
            file.write(image.payload)

    rows = np.zeros(len(results), ROW)
    remaining = iter(pointers)
    for row, result in zip(rows, results):
        if isinstance(result, str):
            row["case"] = Case.BAD
            continue
        for name in COPIED:
            row[name] = getattr(result, name)
        row["size"] = len(result.payload)
        row["crc32"] = zlib.crc32(result.payload)
        row["data_ptr"] = next(remaining)
    return rows, [result for result in results if isinstance(result, str)]
