"""What a log step writes: metrics of the step, the speed since the last log step, and warnings about both."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.common.distributed import gather_rows, world_size
from fastssl.objectives.metrics import rankme
from fastssl.recipe import Recipe, SupervisedConfig
from fastssl.training.collapse import CollapseWarning
from fastssl.training.meters import DataWaitWarning, Interval, Meter, MeterReading, compile_counts, speed_metrics
from fastssl.training.run_writer import RunWriter
from fastssl.training.setup import StepOutput, TrainingRun

Diagnose = Callable[[TrainingRun, MeterReading], str]  # returns the sentence that a warning about long waits ends with


class HostCopy:
    """Scalars on their way from the device to the host: the CPU waits for them in `read` only."""

    def __init__(self, scalars: Mapping[str, Tensor]):
        self.names = list(scalars)
        self.values = torch.stack([scalar.double() for scalar in scalars.values()])
        self.copied: torch.cuda.Event | None = None
        if self.values.is_cuda:
            on_device = self.values
            self.values = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self.values.copy_(on_device, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> dict[str, float]:
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist()))


class LogLine(NamedTuple):
    """A line of metrics whose values the device may not have computed yet."""

    step: int
    known: dict[str, float]  # epoch and learning rate
    values: HostCopy
    ranks: dict[str, float]  # RankMe, if it is due
    interval: Interval  # since the last log step
    bad_samples: int
    seconds: float  # of training, over all resumes


class CountWarning:
    """Warns when a count that should stay 0 does not, and each time that it has doubled."""

    def __init__(self, metric: str, counted: str):
        self.metric = metric
        self.counted = counted
        self.next = 1

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Return the warning if it is due now."""
        count = int(metrics.get(self.metric, 0))
        if count < self.next:
            return None
        self.next = 2 * count
        return f"warning: {self.counted}: {count:,} so far."


class StepLog:
    """Logs steps.

    On a GPU the line of a log step is written at the next one, or when `finish` is called, which comes before every
    checkpoint: by then the device has passed the step, so the CPU does not wait for an empty queue. Without a GPU it is
    written immediately. All processes take part.
    """

    def __init__(self, run: TrainingRun, writer: RunWriter, diagnose: Diagnose):
        self.run = run
        self.writer = writer
        self.meter = Meter(run.device)
        self.data_wait_warning = DataWaitWarning(lambda reading: diagnose(run, reading))
        train = run.recipe.train
        self.collapse_warning = CollapseWarning(train.batch_size // train.accumulate, embedding_width(run.recipe))
        self.count_warnings = [
            CountWarning("skipped_steps", "steps that were not finite, and left the weights as they were"),
            CountWarning("bad_samples", "images that could not be decoded, replaced by others of their batches"),
        ]
        self.line: LogLine | None = None  # not written yet

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error, write the line that waits, if the device still answers; several processes leave it out."""
        if kind and world_size() == 1:
            with suppress(Exception):
                self.finish()

    def is_log_step(self) -> bool:
        """Whether the step that was just taken is to be logged: every log.every-th, and the last one."""
        step = self.run.state.step
        return step % self.run.recipe.log.every == 0 or step == self.run.schedule.total_steps

    def log(self, output: StepOutput, epoch: int, rate: float) -> None:
        """Log the step that was just taken.

        Raises:
            UserError: if more steps were skipped than train.max_skipped_steps allows; on a GPU one log step later.
        """
        self.finish()
        run, state = self.run, self.run.state
        values = run.guard.over_ranks(output.terms)
        h = gather_rows(output.h, None)
        z = state.model.mean_z(h)
        values["std_z"] = z.std(dim=0).mean()
        copy = HostCopy(values)
        ranks = {}
        if self._is_rank_due():
            ranks = {"rankme_h": rankme(h), "rankme_z": rankme(z)}  # the CPU waits for the device here
        self.line = LogLine(
            state.step, {"epoch": epoch, "lr": rate}, copy, ranks, self.meter.take(), state.loader.bad_samples,
            state.count_seconds(),
        )  # fmt: skip
        if run.device.type != "cuda":
            self.finish()

    def finish(self) -> None:
        """Write the line of the last log step if it is not written yet. Raises UserError as `log` does."""
        if self.line is None:
            return
        line, self.line = self.line, None
        run, writer = self.run, self.writer
        metrics = line.known | line.values.read() | line.ranks
        metrics["skipped_steps"] = int(metrics["skipped_steps"])
        if metrics["skipped_steps"] > run.recipe.train.max_skipped_steps:
            writer.save()
            raise run.guard.error(writer.run_dir)
        reading = line.interval.read()
        speed = speed_metrics(reading, line.bad_samples, run.state.loader.resident)
        compiled = compile_counts() if run.compiled else {}
        writer.log({**metrics, **speed, **compiled, "seconds": line.seconds}, line.step)
        warnings = [
            *(count.check({**metrics, **speed}) for count in self.count_warnings),
            self.data_wait_warning.check(speed["data_wait"], reading),
            self.collapse_warning.check(line.step, metrics),
        ]
        for warning in warnings:
            if warning:
                writer.print(warning)

    def _is_rank_due(self) -> bool:
        """Whether this log step computes RankMe.

        It does at the first one after every log.rank_every steps, at the last one, and while the embeddings look
        collapsed.
        """
        every, step = self.run.recipe.log.rank_every, self.run.state.step
        if every == 0:
            return False
        if every == "epoch":
            every = self.run.schedule.total_steps // self.run.recipe.train.epochs
        before = step - self.run.recipe.log.every
        is_last = step == self.run.schedule.total_steps
        return step // every > before // every or is_last or self.collapse_warning.is_suspicious


def embedding_width(recipe: Recipe) -> int:
    """The dimensions of z: those of the projector, or the logits of a classifier."""
    objective = recipe.objective
    return objective.classes if isinstance(objective, SupervisedConfig) else recipe.model.projector.out
