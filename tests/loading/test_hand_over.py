"""What a loader does on a device that is not the CPU: tensors without memory (meta) take the place of a GPU's."""

import threading
from contextlib import contextmanager

import pytest
import torch

from fastssl.loading import BetonLoader, estimate_memory, resident
from fastssl.loading import loader as loader_module
from fastssl.loading.decoding import Buffers
from fastssl.loading.loader import pinned_bytes, to_device

META, CPU = torch.device("meta"), torch.device("cpu")


class FakeGpu:
    """The calls of torch.cuda that a loader makes, in order, with the thread that made each."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.pinned = {}  # by address; all of it is kept, so that no address comes again
        gpu = self

        class Stream:
            device = META

            def __init__(self, device):
                gpu.note("new stream")

            def record_event(self):
                gpu.note("record")
                return Event()

            def wait_event(self, event):
                gpu.note("wait for event")

        class Event:
            def synchronize(self):
                gpu.note("synchronize")

        @contextmanager
        def stream(chosen):
            gpu.note("enter stream")
            yield

        def pin_memory(tensor):
            gpu.note("pin")
            copy = tensor.clone()
            gpu.pinned[copy.untyped_storage().data_ptr()] = copy
            return copy

        def to(tensor, device, non_blocking=False):
            assert non_blocking and tensor.untyped_storage().data_ptr() in gpu.pinned
            gpu.note("copy")
            return torch.empty_like(tensor, device=device)

        def take(buffers, shape):
            assert buffers.pinned
            gpu.note("pin")
            image = torch.empty(shape, dtype=torch.uint8)
            gpu.pinned[image.untyped_storage().data_ptr()] = image
            return image

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: callers)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: gpu.note(f"device {device}"))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.untyped_storage().data_ptr() in gpu.pinned)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: gpu.note("used by caller"))
        monkeypatch.setattr(Buffers, "take", take)
        callers = Stream(META)
        self.calls.clear()

    def note(self, call):
        self.calls.append((threading.current_thread().name, call))

    def of_reader(self):
        return [call for thread, call in self.calls if thread == "fastssl-reader"]


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def test_a_loader_hands_over_tensors_of_the_device(canvas, gpu):
    loader = BetonLoader(canvas / "train.beton", 16, device=META)
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        assert [tensor.device for tensor in batch] == [META] * 6
        assert batch.image.shape == (16, 32, 32, 3) and batch.image.dtype == torch.uint8
    calls = gpu.of_reader()
    # Its own device comes before all that could make a context on GPU 0.
    assert calls[:2] == ["device meta", "enter stream"]
    # The image is decoded into pinned memory, the five columns are copied there; one event after all six copies.
    assert calls.count("pin") == 3 * 6 and calls.count("copy") == 3 * 6 and calls.count("record") == 3
    first = calls.index("record")
    assert calls[:first].count("copy") == 6
    main = [call for thread, call in gpu.calls if thread != "fastssl-reader"]
    assert main == ["new stream", *(["wait for event"] + ["used by caller"] * 6) * 3]


def test_all_epochs_share_one_stream(canvas, gpu):
    """The allocator keeps the memory of each stream apart."""
    loader = BetonLoader(canvas / "train.beton", 16, device=META)
    for _ in range(3):
        list(loader)
    assert [call for _, call in gpu.calls].count("new stream") == 1
    assert gpu.of_reader().count("device meta") == 3


@pytest.mark.parametrize("size", ["canvas", "canvas_jpeg"])
def test_a_resident_set_is_copied_once_with_two_copies_under_way(request, gpu, size, monkeypatch):
    monkeypatch.setattr(resident, "PIECE", 16 * 32 * 32 * 3)
    loader = BetonLoader(request.getfixturevalue(size) / "train.beton", 16, device=META, resident=True)
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, source, non_blocking: copies.append((x, source, non_blocking)))
    for _ in range(2):
        assert all(tensor.device == META for batch in loader for tensor in batch.tensors())
    # Three pieces of pinned memory go straight to the memory of the whole set.
    assert len(copies) == 3 and sum(len(x) for x, _, _ in copies) == 48
    for x, source, non_blocking in copies:
        assert x.device == META and non_blocking and source.untyped_storage().data_ptr() in gpu.pinned
    assert gpu.of_reader().count("record") == 0 and gpu.of_reader().count("copy") == 0
    main = [call for thread, call in gpu.calls if thread != "fastssl-reader"]
    assert [call for call in main if call in ("record", "synchronize")] == ["record"] + 2 * ["synchronize", "record"]


def test_a_tensor_that_is_on_the_device_stays_there(gpu):
    there = torch.empty(3, device=META)
    assert to_device(there, META) is there and gpu.calls == []
    here = torch.zeros(3)
    assert to_device(here, CPU) is here and gpu.calls == []
    assert to_device(here, META).device == META
    assert [call for _, call in gpu.calls] == ["pin", "copy"]


def test_pinning_a_tensor_of_a_device_is_an_error():
    """Why `to_device` looks at the device first."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device=META).pin_memory()


@pytest.mark.parametrize("size, taken", [(1, 1), (2, 2), (3, 4), (256 * 256 * 256 * 3, 2**26), (2**26, 2**26)])
def test_pinned_memory_is_rounded_to_a_power_of_two(size, taken):
    assert pinned_bytes(size) == taken


def test_the_estimate_knows_pinned_memory(canvas, gpu):
    loader = BetonLoader(canvas / "train.beton", 16, device=META)
    estimate = estimate_memory(loader)
    assert estimate["5 batches of 16, pinned"] == 5 * 65536  # 16 x 32 x 32 x 3 are 49,152 bytes
    assert estimate["3 batches of 16, device"] == 3 * 49152


def test_more_pinned_memory_than_the_machine_has_is_refused(canvas, gpu, monkeypatch):
    monkeypatch.setattr(loader_module, "total_memory", lambda: 5 * 60_000)
    BetonLoader(canvas / "train.beton", 16)
    with pytest.raises(Exception, match="lower train.batch_size"):
        BetonLoader(canvas / "train.beton", 16, device=META)
