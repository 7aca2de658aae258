"""The legs on the device, a GPU or without one torch's threads: views, the step and its parts, both together."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl.loading import Batch
from fastssl.models import View
from fastssl.objectives.total import in_chunks, objective_terms
from fastssl.profiling.timing import Window, figure_of, wait_for
from fastssl.training.loop import network_inputs, optimise, train_step
from fastssl.training.setup import Network, Run

Made = TypeVar("Made")


def take_step(run: Run, batches: list[Batch], epoch: int) -> int:
    """One optimiser step; returns its images, of this process."""
    run.state.step = 0  # the schedule of a short recipe would come to its end
    train_step(run, batches, epoch, run.schedule.rate(0))
    return sum(len(batch.index) for batch in batches)


def first_step(run: Run) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=run.device)


def with_fixed_views(run: Run, views: tuple[Tensor, ...]) -> Run:
    """The run, with these in place of making views."""
    return replace(run, views=lambda batch, epoch: views)


class Phases:
    """Seconds an image of the step's phases, on one batch of views that are made.

    forward: encoder and projector; of a compiled run all of the network, whose parts are one graph. draws: what a
    stochastic embedding adds, heads, noise and a projector's pass for every draw. objective; kl: to the prior, and
    watching sigma. backward. optimiser: clipping, guard, step, and what follows it.
    """

    def __init__(self, run: Run, batch: Batch, views: tuple[Tensor, ...]):
        self.run, self.batch = run, batch
        self.inputs = network_inputs(run.recipe, batch, views, first_step(run))
        self.network = plain_network(run)
        self.windows: dict[str, list[float]] = {}

    def measure(self) -> None:
        run, model, seconds = self.run, self.run.state.model, {}
        terms, _ = self._add(seconds, "forward", lambda: run.network(*self.inputs))
        self._add(seconds, "backward", lambda: run.state.scaler.scale(terms["loss"]).backward())
        self._add(seconds, "optimiser", partial(optimise, run, terms))
        if not run.compiled:
            parts = self._parts(model)
            seconds |= parts
            seconds["forward"] = max(0.0, seconds["forward"] - sum(parts.values()))
        for name, value in seconds.items():
            self.windows.setdefault(name, []).append(value / len(self.batch.index))

    def figures(self) -> dict[str, dict]:
        order = ("forward", "draws", "objective", "kl", "backward", "optimiser")
        return {name: figure_of(self.windows[name]) for name in order if name in self.windows}

    def _parts(self, model: nn.Module) -> dict[str, float]:
        """Seconds of what the forward pass does beside encoder and projector."""
        recipe, parts, of_loss = self.run.recipe, {}, {}
        with torch.autocast(**self.network.autocast), self._timed_modules(model) as in_modules:
            made: tuple[View, ...] = self._add(parts, "draws", lambda: model(*self.inputs))
        self._add(of_loss, "all", lambda: self.network.loss_terms(*made, model.priors, self.inputs[-1]))
        if recipe.embedding.stochastic == "none":
            return {"objective": of_loss["all"]}
        parts["draws"] -= sum(in_modules)
        compare = in_chunks(objective_terms(recipe.objective), recipe.embedding.chunk)
        self._add(parts, "objective", lambda: compare(*made))
        return parts | {"kl": max(0.0, of_loss["all"] - parts["objective"])}

    @contextmanager
    def _timed_modules(self, model: nn.Module) -> Iterator[list[float]]:
        """Seconds of each pass through encoder and projector (or classifier), BYOL's target's too, within."""
        parts = [*model.named_children(), *(model.target.named_children() if model.target is not None else [])]
        modules = [module for name, module in parts if name in ("encoder", "projector", "predictor", "classifier")]
        starts, seconds = [], []

        def before(*_) -> None:
            wait_for(self.run.device)
            starts.append(time.perf_counter())

        def after(*_) -> None:
            wait_for(self.run.device)
            seconds.append(time.perf_counter() - starts.pop())

        hooks = [module.register_forward_pre_hook(before) for module in modules]
        hooks += [module.register_forward_hook(after) for module in modules]
        try:
            yield seconds
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, seconds: dict[str, float], name: str, work: Callable[[], Made]) -> Made:
        wait_for(self.run.device)
        start = time.perf_counter()
        made = work()
        wait_for(self.run.device)
        seconds[name] = time.perf_counter() - start
        return made


def plain_network(run: Run) -> Network:
    """The network below torch.compile and DistributedDataParallel."""
    network = getattr(run.network, "_orig_mod", run.network)
    return getattr(network, "module", network)


def count_flops(run: Run, batch: Batch, views: tuple[Tensor, ...]) -> float:
    """Floating-point operations of one image's forward and backward pass: two a multiplication of all convolutions
    and matrix products, as torch counts them; operations on single values are left out, as MFU's definition does
    (arXiv 2204.02311, appendix B)."""
    network = copy.deepcopy(plain_network(run))  # its hooks, statistics and gradients stay out of this
    inputs = network_inputs(run.recipe, batch, views, first_step(run))
    with FlopCounterMode(display=False) as counter:
        terms, _ = network(*inputs)
        terms["loss"].backward()
    return counter.get_total_flops() / len(batch.index)


def busy_seconds(work: Callable[[], int], device: torch.device) -> tuple[float, int]:
    """Seconds an image in which the GPU runs kernels or copies, gaps between them left out; and kernels a batch."""
    batches = 3
    activities = [torch.profiler.ProfilerActivity.CUDA]
    wait_for(device)
    with torch.profiler.profile(activities=activities) as profile:
        images = sum(work() for _ in range(batches))
        wait_for(device)
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if not e.is_user_annotation)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:  # microseconds; streams run beside each other
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / images, len(spans) // batches


def launch_windows(work: Callable[[], int], device: torch.device) -> list[Window]:
    """What it takes to tell an idle GPU what to do, of five batches."""
    windows = []
    for _ in range(5):
        wait_for(device)
        start, cpu_start = time.perf_counter(), time.process_time()  # autograd launches from a thread of its own
        images = work()
        windows.append(Window(images, time.perf_counter() - start, time.process_time() - cpu_start, 0))
    wait_for(device)
    return windows
