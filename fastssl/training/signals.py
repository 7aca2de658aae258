"""Being asked to stop: SIGTERM and SIGUSR1 (a scheduler takes the machine back), SIGHUP (the terminal goes) and Ctrl-C.

Training ends at the next step, with a checkpoint behind it, so that the same run can go on later.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastssl.common.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class ProbeInterrupted(BaseException):
    """Raised where a signal arrives inside `StopRequest.at_once`; no handler of ordinary errors takes it."""


class StopRequest:
    """Notes a signal while the context is open; a second Ctrl-C interrupts at once, as usual.

    A signal that the process was started to ignore (nohup does so) stays ignored. Outside the main thread, where Python
    allows no handlers, it notes nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        main = threading.current_thread() is threading.main_thread()
        heard = [number for number in SIGNALS if main and signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._at_once:
            raise ProbeInterrupted

    @property
    def exit_code(self) -> int:
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_REQUEUE

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises CutShort there and then: for what may take long and can be done again."""
        self._at_once = True
        try:
            if self.received is not None:
                raise ProbeInterrupted
            yield
        finally:
            self._at_once = False
