"""A child process for a fuzz: it takes cases through a pipe, and may hang or die of one."""

import multiprocessing
from collections.abc import Callable
from typing import Any


class ChildProcess:
    """A process that is started again after it was stopped. It runs target(connection, *arguments)."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.target = target
        self.arguments = arguments
        self.process: Any = None  # None: not started, or stopped

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=self.target, args=(other, *self.arguments))
        self.process.start()
        other.close()

    def stop(self) -> None:
        """Kill the process, whatever it does."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None
