"""Requests to stop: SIGTERM and SIGUSR1 (a scheduler needs the machine), SIGHUP (the terminal closes) and Ctrl-C.

Training then finishes its step, saves a checkpoint and ends, so that the same run can continue later.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class ProbeInterrupted(BaseException):
    """Raised by a signal inside `StopRequest.interruptible`. Not an Exception, so that no error handler catches it."""


class StopRequest:
    """Records a signal that arrives inside the context. A second Ctrl-C raises KeyboardInterrupt.

    A signal that the process was started to ignore (as nohup does with SIGHUP) stays ignored. Outside the main thread,
    where Python allows no signal handlers, nothing is recorded.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the signal's number
        self._raises = False

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        handled = [number for number in SIGNALS if in_main_thread and signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._raises:
            raise ProbeInterrupted

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_REQUEUE

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context in which a signal raises ProbeInterrupted: for work that takes long and can be repeated."""
        self._raises = True
        try:
            if self.received is not None:
                raise ProbeInterrupted
            yield
        finally:
            self._raises = False
