"""Threads for compiled code, which runs without Python's lock."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVarTuple

import torch

Arguments = TypeVarTuple("Arguments")

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # its threads stay in the parent, and the child would wait for them


def run_in_threads(function: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
    """Call a function in as many threads as torch may use, each with the same arguments, and wait for all of them.

    The caller waits, so there are never more busy threads than with torch alone. Raises what a thread raised.
    """
    global _pool
    threads = torch.get_num_threads()
    if _pool is None or _pool._max_workers != threads:
        _pool = ThreadPoolExecutor(threads, "fastssl-compute")
    for thread in [_pool.submit(function, *arguments) for _ in range(threads)]:
        thread.result()
