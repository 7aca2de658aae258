"""The stages on the device (a GPU, or without one torch's threads): views, the step and its phases, both together."""

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fastssl.common.distributed import world_size
from fastssl.common.randomness import quantiles
from fastssl.loading import Batch
from fastssl.models import ModelInput, ViewOutput
from fastssl.models.small_convolution import use_plain_convolutions
from fastssl.profiling.profile import Measurement, Stages
from fastssl.profiling.timing import StageTimer, difference_result, synchronize
from fastssl.profiling.wording import STAGE_NAMES
from fastssl.training.loop import optimize, train_step
from fastssl.training.optim import skips_on_device
from fastssl.training.setup import Network, TrainingRun

Result = TypeVar("Result")
PHASES = ("forward", "draws", "objective", "kl", "backward", "optimizer")


class DeviceStages:
    """Timers of views, step, communication and replay, on batches that stay on the device."""

    def __init__(self, run: TrainingRun, batches: list[Batch], epoch: int, short_seconds: float, step_seconds: float):
        self.run = run
        accumulate = run.recipe.train.accumulate
        groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
        views = run.views(batches[0], epoch)
        fixed = with_fixed_views(run, views)
        all_batches, all_groups = cycle(batches), cycle(groups)

        def make_views() -> int:
            batch = next(all_batches)
            run.views(batch, epoch)
            return len(batch.index)

        def step_without_exchange() -> int:
            with run.no_sync():
                return take_step(fixed, groups[0], epoch)

        self.views = StageTimer(make_views, run.device, short_seconds)
        self.step = StageTimer(partial(take_step, fixed, groups[0], epoch), run.device, step_seconds)
        self.replay = StageTimer(lambda: take_step(run, next(all_groups), epoch), run.device, step_seconds)
        # The step without the exchange of gradients; its difference to `step` is the stage `communication`.
        self.own_step = StageTimer(step_without_exchange, run.device, step_seconds) if world_size() > 1 else self.step
        self.phases = PhaseTimer(run, batches[0], views)
        self.flops = count_flops(run, batches[0], views)

    def timers(self) -> dict[str, StageTimer]:
        """Return the timers by what they time."""
        timers = {STAGE_NAMES["views"]: self.views, STAGE_NAMES["step"]: self.step}
        if self.own_step is not self.step:
            timers[f"{STAGE_NAMES['step']} without {STAGE_NAMES['communication']}"] = self.own_step
        return timers | {STAGE_NAMES["replay"]: self.replay}

    def add_results(self, stages: Stages, peak_flops: float) -> None:
        """Fill in these stages; on a GPU, first measure its kernels. peak_flops: what the device could reach."""
        stages.views = self.views.result()
        stages.views.busy_seconds, stages.views.kernels = gpu_kernels(self.views)
        step = self.step.result()
        step.busy_seconds, _ = gpu_kernels(self.own_step)
        step.phases = self.phases.results()
        if self.run.compiled:
            step.phases_note = "Compiled: the forward pass is one graph, draws, objective and KL included."
        step.flops = self.flops
        step.flops_per_second = self.flops * self.step.images_per_second().median / world_size()
        step.mfu = step.flops_per_second / peak_flops
        step.page_faults = statistics.median(w.page_faults / self.step.batches for w in self.step.windows)
        stages.step = step

        if self.own_step is not self.step:
            stages.communication = difference_result(self.step, self.own_step)
        else:
            stages.communication.missing = "One process: no gradients are exchanged."
        if self.run.device.type != "cuda":
            stages.launch.missing = "No GPU: nothing is launched."
        elif skips_on_device(self.run.state.optimizer):
            stages.launch = launch_timer(self.replay.work, self.run.device).result()
        else:
            name = self.run.recipe.optim.name
            stages.launch.missing = f"optim.name={name} waits for the GPU in each step: launching cannot be timed."
        stages.replay = self.replay.result()


def take_step(run: TrainingRun, batches: list[Batch], epoch: int) -> int:
    """Take one optimizer step and return its number of images, of this process."""
    run.state.step = 0  # else the schedule of a short recipe would come to its end
    train_step(run, batches, epoch, run.schedule.rate(0))
    return sum(len(batch.index) for batch in batches)


def with_fixed_views(run: TrainingRun, views: tuple[Tensor, ...]) -> TrainingRun:
    """Return the run with these views for every batch."""
    return replace(run, views=lambda batch, epoch: views)


def first_input(run: TrainingRun, batch: Batch, views: tuple[Tensor, ...]) -> ModelInput:
    """Return the network's input at step 0."""
    return ModelInput(views, batch.label, batch.index, torch.zeros((), dtype=torch.int64, device=run.device))


class PhaseTimer:
    """Seconds per image of each phase of the step, on one batch of ready views.

    forward: encoder and projector; in a compiled run the whole network, which is one graph. draws: what a stochastic
    embedding adds: heads, noise, and the projector's pass for every draw. objective. kl: to the prior, and monitoring
    sigma. backward. optimizer: gradient clipping, the guard against non-finite values, the step, and averaging.
    """

    def __init__(self, run: TrainingRun, batch: Batch, views: tuple[Tensor, ...]):
        self.run, self.batch = run, batch
        self.inputs = first_input(run, batch, views)
        self.network = plain_network(run)
        self.windows: dict[str, list[float]] = {}

    def measure(self) -> None:
        run = self.run
        (terms, _), forward = self._timed(lambda: run.network(self.inputs))
        _, backward = self._timed(lambda: run.state.scaler.scale(terms["loss"]).backward())
        _, optimizer = self._timed(lambda: optimize(run, terms))
        seconds = {"forward": forward, "backward": backward, "optimizer": optimizer}
        if not run.compiled:
            parts = self._parts_of_forward()
            seconds |= parts
            seconds["forward"] = max(0.0, forward - sum(parts.values()))
        for name, value in seconds.items():
            self.windows.setdefault(name, []).append(value / len(self.batch.index))

    def results(self) -> dict[str, Measurement]:
        return {name: Measurement.of(self.windows[name]) for name in PHASES if name in self.windows}

    def _parts_of_forward(self) -> dict[str, float]:
        """Return the seconds of what the forward pass does in addition to encoder and projector."""
        recipe, model = self.run.recipe, self.run.state.model
        # The passes through these modules, those of BYOL's target network included, are not draws.
        children = list(model.named_children())
        if isinstance(model.target, nn.Module):
            children += model.target.named_children()
        modules = [module for name, module in children if name in ("encoder", "projector", "predictor", "classifier")]
        passes: list[float] = []  # the times at which each began and ended

        def note_time(*_: object) -> None:
            synchronize(self.run.device)
            passes.append(time.perf_counter())

        hooks = [module.register_forward_pre_hook(note_time) for module in modules]
        hooks += [module.register_forward_hook(note_time) for module in modules]
        with torch.autocast(**self.network.autocast):
            views, in_model = self._timed(lambda: model(self.inputs))
        for hook in hooks:
            hook.remove()
        whole_loss, objective = self._seconds_of_loss(views)
        if recipe.embedding.stochastic == "none":
            return {"objective": whole_loss}
        draws = max(0.0, in_model - sum(end - start for start, end in zip(passes[::2], passes[1::2])))
        return {"draws": draws, "objective": objective, "kl": whole_loss - objective}

    def _seconds_of_loss(self, views: tuple[ViewOutput, ...]) -> tuple[float, float]:
        """Return the seconds of the whole loss, and of the objective in it.

        Both are of one call: of two calls on a busy machine, the objective alone took longer than the whole loss in
        five of six windows.
        """
        total_loss = self.network.total_loss
        objective_terms, objective = total_loss.objective_terms, 0.0

        def timed_terms(views: tuple[ViewOutput, ...], step: Tensor) -> dict[str, Tensor]:
            nonlocal objective
            terms, objective = self._timed(lambda: objective_terms(views, step))
            return terms

        total_loss.objective_terms = timed_terms  # type: ignore[method-assign]
        try:
            priors = self.run.state.model.priors
            _, whole_loss = self._timed(lambda: total_loss(views, priors, self.inputs.step))
        finally:
            del total_loss.objective_terms
        return whole_loss, objective

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        synchronize(self.run.device)
        start = time.perf_counter()
        result = work()
        synchronize(self.run.device)
        return result, time.perf_counter() - start


def plain_network(run: TrainingRun) -> Network:
    """Return the network without the wrappers of DistributedDataParallel and torch.compile."""
    network = getattr(run.network, "module", run.network)
    return getattr(network, "_orig_mod", network)


def count_flops(run: TrainingRun, batch: Batch, views: tuple[Tensor, ...]) -> float:
    """Count the floating-point operations of the forward and backward pass, per image.

    Two per multiplication in all convolutions and matrix products, as torch counts them. Pointwise operations do not
    count, as in the definition of MFU (arXiv 2204.02311, appendix B).
    """
    network, inputs = plain_network(run), first_input(run, batch, views)
    quantiles(run.device)  # a table that is made once, and must not be a fake
    fake: AbstractContextManager[object] = nullcontext()
    if world_size() == 1:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        network, inputs = to_fakes(network, inputs, fake)
    else:  # the processes exchange no fakes
        network = copy.deepcopy(network)  # leaves the run's hooks, statistics and gradients alone
    use_plain_convolutions(network)  # the others leave out products with padding, which a GPU computes and peaks count
    with fake, FlopCounterMode(display=False) as counter:
        terms, _ = network(inputs)
        terms["loss"].backward()
    return counter.get_total_flops() / len(batch.index)


def to_fakes(network: Network, inputs: ModelInput, mode: FakeTensorMode) -> tuple[Network, ModelInput]:
    """Copy both with tensors that have shapes and no values: they take no time and no memory of the device."""
    # `deepcopy` takes what the dictionary has for an object instead of copying it.
    copies: dict[int, Any] = {id(x): mode.from_tensor(x) for x in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, copies), tree_map_only(Tensor, mode.from_tensor, inputs)


class GpuKernels(NamedTuple):
    """A GPU's kernels and copies, as torch's profiler shows them; None where it shows none, and without a GPU."""

    busy_seconds: float | None  # per image, in which at least one runs
    per_batch: int | None


def gpu_kernels(timer: StageTimer) -> GpuKernels:
    if timer.device.type != "cuda":
        return GpuKernels(None, None)
    batches = 3
    synchronize(timer.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        images = sum(timer.work() for _ in range(batches))
        synchronize(timer.device)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if not e.is_user_annotation)
    if not spans:
        return GpuKernels(None, None)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:  # microseconds; spans of several streams overlap
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return GpuKernels(busy / 1e6 / images, len(spans) // batches)


def launch_timer(work: Callable[[], int], device: torch.device) -> StageTimer:
    """Time how long the main thread takes to launch the kernels of one batch on an idle GPU, five times."""
    synchronize(device)
    # A timer of the CPU does not wait for the kernels.
    timer = StageTimer(work, torch.device("cpu"), 0, skipped_batches=0, after=partial(synchronize, device), batches=1)
    for _ in range(5):
        timer.measure()
    return timer
