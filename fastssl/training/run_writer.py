"""Everything that a run shows and writes: messages, metrics, checkpoints, and the files at its end."""

import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastssl.common.commands import training_command
from fastssl.common.distributed import is_main_process
from fastssl.common.errors import EXIT_REQUEUE, Stopped, UserError
from fastssl.common.files import write_atomically, write_error
from fastssl.common.terminal import time_in_words
from fastssl.models.checkpoint import LAST, SavedState, is_run_dir, write_checkpoint
from fastssl.recipe import Recipe
from fastssl.training.display import Display
from fastssl.training.metric_text import label, shown
from fastssl.training.run_dir import describe_run, save_views
from fastssl.training.setup import TrainingRun
from fastssl.training.signals import StopRequest
from fastssl.training.snapshot import Snapshot
from fastssl.training.tracking import MetricsFile, start_trackers

# Returns the command that evaluates a run, given its recipe and its directory; None: the user is told of none.
EvaluationCommand = Callable[[Recipe, Path], str | None]


class PendingSave(NamedTuple):
    """A checkpoint that the thread writes."""

    name: str
    step: int
    written: Future[None]


class RunWriter:
    """Writes what a run shows and stores. Use as a context manager.

    Only the main process writes; on other ranks the methods write nothing. A thread writes the checkpoints, one at a
    time, from copies of the state, while training goes on. A full disk does not end training: a checkpoint that cannot
    be written costs a warning, and the next log step tries again.
    """

    def __init__(self, run: TrainingRun, run_dir: Path, stop: StopRequest, evaluation_command: EvaluationCommand):
        self.run = run
        self.run_dir = run_dir
        self.first_step = run.state.step
        self.was_finished = self.first_step == run.schedule.total_steps
        self.evaluation_command = evaluation_command
        self.save_failed = False  # whether last.pt is missing the last step that was to be saved, as far as is known
        self.saved_at = time.monotonic()  # when the last.pt that was begun last was
        self.pending_save: PendingSave | None = None
        self.display: Display | None = None
        if not is_main_process():
            return
        recipe, state = run.recipe, run.state
        try:
            describe_run(run_dir, recipe, run.device, run.precision, state.step)
            self.metrics_file = MetricsFile(run_dir / "metrics.jsonl", state.step, state.epochs_probed, self.print)
            self.trackers = start_trackers(run_dir, recipe, state.step)
        except OSError as error:
            raise write_error(run_dir, error) from None
        self.snapshot = Snapshot()
        self.save_thread = ThreadPoolExecutor(1, "fastssl-checkpoint")
        title = f"{recipe.name}  ({run.device.type}, {run.precision})"
        self.display = Display(
            title,
            state.step,
            run.schedule.total_steps,
            recipe.train.epochs,
            is_stopping=lambda: stop.received is not None,
            log_every=recipe.log.every,
        )

    def __enter__(self) -> "RunWriter":
        if self.display and not self.was_finished:
            self.display.__enter__()
        name, step = self.run.recipe.name, self.run.state.step
        where = f"on {self.run.device.type} ({self.run.precision}) in {self.run_dir}"
        if step == 0:
            self.print(f"Training {name} {where}")
            self.save()  # a run that is killed before its first regular checkpoint can be resumed too
            self.wait_for_save()
        elif self.was_finished:
            self.print(f"{name} is already finished: no step is left to train {where}")
        else:
            self.print(f"Resuming {name} after step {step} {where}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.display:
            return
        try:
            self.wait_for_save()  # after an error too: it may be the newest checkpoint, or the only one
        finally:
            self.save_thread.shutdown(wait=False)
            self.metrics_file.close()
            for tracker in self.trackers.values():
                tracker.close()
            self.display.close()
            if kind is KeyboardInterrupt:
                self.print("Ended without a checkpoint of the last step. To continue from the one before:")
                self.print_command(training_command("--resume", self.run_dir))

    def print(self, message: str) -> None:
        if self.display:
            self.display.print(message)

    def print_command(self, command: str, heading: str = "  ") -> None:
        if self.display:
            self.display.print(heading + command, wrap=False)

    def explain_number(self, taken: Path) -> None:
        """Say that the run is not in `taken`, which exists, and how to continue that one."""
        self.print(f"{taken} exists, so this new run goes to {self.run_dir}.")
        if is_run_dir(taken):
            self.print_command(training_command("--resume", taken), "To continue the other one instead: ")

    def show_step(self, step: int) -> None:
        """Move the progress bar."""
        if self.display:
            self.display.step(step)

    def during(self, activity: str) -> AbstractContextManager[None]:
        """Show what is done between two steps, inside the context."""
        return self.display.during(activity) if self.display else nullcontext()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of a step to metrics.jsonl, the trackers and the terminal.

        A tracker whose disk is full is left out from then on.
        """
        if not self.display:
            return
        self.metrics_file.write(step, metrics)
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.write(step, metrics)
            except OSError as error:
                del self.trackers[name]
                self.print(f"warning: {name} cannot be written ({error}): from here on only metrics.jsonl has metrics.")
        self.display.log(step, metrics)

    def save_views(self, views: tuple[Tensor, ...]) -> None:
        if self.display:
            try:
                save_views(self.run_dir, views, self.run.recipe.views)
            except OSError as error:
                self.print(f"warning: views.png cannot be written ({error.strerror}).")

    def save(self, name: str = LAST) -> None:
        """Begin to write checkpoints/NAME with the state of this step, once the checkpoint before it is written."""
        if not self.display:
            return
        self.wait_for_save()
        self.metrics_file.flush()  # before the checkpoint: a resume continues after the last line that it covers
        saved = self.snapshot.take(self.run.state.state_dict())
        written = self.save_thread.submit(self._write_checkpoint, name, saved)
        self.pending_save = PendingSave(name, self.run.state.step, written)
        if name == LAST:
            self.saved_at = time.monotonic()

    def _write_checkpoint(self, name: str, saved: SavedState) -> None:
        self.snapshot.wait_for_device()
        write_checkpoint(self.run_dir, name, saved)

    def wait_for_save(self) -> bool:
        """Wait until the pending checkpoint is written. Returns whether that worked; prints a warning if it did not."""
        if not self.pending_save:
            return True
        name, step, written = self.pending_save
        failure = None
        try:
            written.result()
        except OSError as error:
            failure = error.strerror or str(error) or type(error).__name__
        self.pending_save = None
        if failure and not (name == LAST and self.save_failed):
            then = "the next log step tries again" if name == LAST else f"{name} is left out"
            self.print(
                f"warning: the checkpoint of step {step} cannot be written ({failure}): training continues, and {then}."
            )
        if name == LAST:
            self.save_failed = failure is not None
        return failure is None

    def save_is_due(self, is_log_step: bool) -> bool:
        """Return whether last.pt is older than checkpoint.every_minutes, or should be tried again. Does not wait."""
        if not self.display:
            return False
        if self.pending_save and self.pending_save.written.done():
            self.wait_for_save()
        minutes = self.run.recipe.checkpoint.every_minutes
        is_old = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        tries_again = is_log_step and self.save_failed and not self.pending_save
        return is_old or tries_again

    def stop(self, request: StopRequest) -> None:
        """End the process after the checkpoint that a signal asked for.

        Raises:
            Stopped: with the exit code that belongs to the signal.
            UserError: if the checkpoint could not be written.
        """
        self.wait_for_save()
        if self.display:
            self.display.close()
        step = self.run.state.step
        resume = training_command("--resume", self.run_dir)
        if self.save_failed:
            raise UserError(
                f"Stopped at step {step}, which could not be saved",
                hint=f"free some space, then continue from the checkpoint before with {resume}",
            )
        name = signal.Signals(request.received).name if request.received else "another process"
        self.print(f"Stopped by {name} after step {step:,} of {self.run.schedule.total_steps:,}, saved. To continue:")
        self.print_command(resume)
        raise Stopped(request.exit_code if request.received else EXIT_REQUEUE)

    def finish(self, problem: str | None = None) -> None:
        """Write the last checkpoint, and encoder.safetensors: the backbone's weights under timm's names.

        problem: a sentence about the training that the user should read before using the result.

        Raises:
            UserError: if one of them cannot be written.
        """
        self.save()
        self.wait_for_save()
        state = self.run.state
        encoder = (state.average.model if state.average else state.model).encoder
        try:
            if is_main_process() and not self.save_failed:
                weights = {name: weight.contiguous().cpu() for name, weight in encoder.state_dict().items()}
                write_atomically(self.run_dir / "encoder.safetensors", to_safetensors(weights))
        except OSError:
            self.save_failed = True
        if self.save_failed:
            raise UserError(
                f"{self.run_dir} is trained, but the result cannot be written",
                hint=f"free some space, then continue with {training_command('--resume', self.run_dir)}",
            )
        if self.display:
            self.display.close()
        if problem:
            self.print(f"Finished, but {problem} The run is in {self.run_dir}.")
            return
        done = "Already finished" if self.was_finished else "Done"
        took = time_in_words(state.count_seconds())
        starts = ", all starts together" if self.first_step else ""  # what a checkpoint has counted is in it
        self.print(f"{done}: {state.step:,} steps in {took}{starts}. Saved in {self.run_dir}:")
        for name, content in self._saved_files().items():
            self.print(f"  {name.ljust(19)}  {content}")
        if self.display and (evaluate := self.evaluation_command(self.run.recipe, self.run_dir)):
            self.print_command(evaluate, "Evaluate:     ")
        longer = f"train.epochs={2 * self.run.recipe.train.epochs}"
        self.print_command(training_command("--resume", self.run_dir, longer), "Train longer: ")

    def _saved_files(self) -> dict[str, str]:
        """What the files of the run hold that a user looks for first."""
        files = {
            "encoder.safetensors": "weights of the encoder, with timm's names",
            "checkpoints/last.pt": "the whole model, and all that --resume needs",
        }
        best = dict(self.run.state.best)
        step = best.pop("step", 0)
        if best:
            metrics = ", ".join(f"{label(name)} {shown(name, value)}" for name, value in best.items())
            files["checkpoints/best.pt"] = f"the best model of the probe: {metrics}, step {step:,}"
        files["views.png"] = "augmented views: check that you recognize the images"
        return files
