"""A device that runs later than the host and counts where the host waits for it: the loop of a GPU, on a CPU.

Results are those of the CPU, as each operation runs immediately. What is faked is time: the device has finished an
operation only `lag` operations after the host has queued it. Events, pinned memory and copies to it behave accordingly.
"""

import threading
from collections import deque

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

READS = {"tolist", "numpy", "cpu"}  # calls of the host that do not reach the dispatcher as a read
IS_CUDA = Tensor.is_cuda.__get__


class FakeDevice(TorchFunctionMode):
    """Within it, tensors claim to be on a GPU, but for those that are made without a device. First call `install`."""

    def __init__(self, lag: int):
        super().__init__()
        self.lag = lag
        self.queued = 0  # operations
        self.done = 0  # of them, those that the device has finished
        self.waits: list[str] = []  # why the main thread has waited for the device, each time
        self._host = WeakIdKeyDictionary()  # its keys are the tensors on the host
        self._copies: deque[tuple[int, Tensor, Tensor]] = deque()  # when they end, to where, what
        self._lock = threading.Lock()  # another thread may write checkpoints
        self._counting = CountingMode(self)

    def install(self, monkeypatch) -> "FakeDevice":
        device = self

        class Event:
            device = None

            def __init__(self, enable_timing: bool = False, blocking: bool = False):
                self.position = -1

            def record(self) -> None:
                self.position = device.queued

            def query(self) -> bool:
                return self.position <= device.done

            def synchronize(self) -> None:
                device.wait("event", until=self.position)

            def elapsed_time(self, other: "Event") -> float:
                assert self.query() and other.query(), "the device has not passed these events"
                return float(other.position - self.position)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait("synchronize"))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        return self

    def __enter__(self):
        self._counting.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._counting.__exit__(*error)

    def is_host(self, tensor: Tensor) -> bool:
        return tensor in self._host

    def on_host(self, function):
        """The function without the fake: its tensors are the host's."""

        def call(*args, **kwargs):
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return function(*args, **kwargs)

        return call

    def queue(self) -> None:
        self.queued += 1
        self._advance(self.queued - self.lag)

    def wait(self, reason: str, until: int | None = None) -> None:
        """The host waits until the device has finished the first `until` operations, all by default."""
        until = self.queued if until is None else until
        if until > self.done:
            if threading.current_thread() is threading.main_thread():
                self.waits.append(reason)
            self._advance(until)

    def _advance(self, done: int) -> None:
        with self._lock:
            self.done = max(self.done, done)
            while self._copies and self._copies[0][0] <= self.done:
                _, target, values = self._copies.popleft()
                self.on_host(target.copy_)(values)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        inputs += [x for part in args if isinstance(part, list | tuple) for x in part if isinstance(x, Tensor)]
        device = kwargs.get("device")
        # As in torch, what is made without a device is the host's, and so is what is computed from such tensors alone.
        is_host = all(map(self.is_host, inputs)) if device is None else torch.device(device).type == "cpu"
        if device is not None:
            kwargs["device"] = "cpu"
        if kwargs.pop("pin_memory", False):
            result = self.on_host(func)(*args, **kwargs)
            self._host[result] = True
            return result.fill_(float("nan") if result.is_floating_point() else 0)
        if func == IS_CUDA:
            return not is_host
        name = getattr(func, "__name__", "")
        if name == "copy_" and self.is_host(args[0]) and not is_host:
            if not kwargs.get("non_blocking"):
                self.wait("blocking copy")
            self.queue()
            self._copies.append((self.queued, args[0], args[1].detach().clone()))
            return args[0]
        if name in READS and not is_host:
            self.wait(name)
        if is_host or name in READS:
            result = self.on_host(func)(*args, **kwargs)
            result = result.clone() if name == "cpu" else result
            for x in result if isinstance(result, list | tuple) else [result]:
                if isinstance(x, Tensor):
                    self._host[x] = True
            return result
        return func(*args, **kwargs)


class CountingMode(TorchDispatchMode):
    """Queues every operation, and notices values of the device that become Python numbers."""

    def __init__(self, device: FakeDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            self.device.wait(name)
        elif not func.is_view:
            self.device.queue()
        return func(*args, **(kwargs or {}))
