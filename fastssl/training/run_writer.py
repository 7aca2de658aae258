"""Everything that a run shows and writes: messages, metrics, checkpoints, and the files at its end."""

import signal
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastssl.common.distributed import is_main_process
from fastssl.common.errors import EXIT_REQUEUE, Stopped, UserError
from fastssl.common.files import write_atomically, write_error
from fastssl.models.checkpoint import LAST
from fastssl.training.display import Display
from fastssl.training.run_dir import describe_run, save_views
from fastssl.training.setup import TrainingRun
from fastssl.training.signals import StopRequest
from fastssl.training.tracking import MetricsFile, start_trackers


class RunWriter:
    """Writes what a run shows and stores. Use as a context manager.

    Only the main process writes; on other ranks the methods write nothing. A full disk does not end training: a
    checkpoint that cannot be written costs a warning, and the next log step tries again.
    """

    def __init__(self, run: TrainingRun, run_dir: Path):
        self.run = run
        self.run_dir = run_dir
        self.save_failed = False  # whether last.pt is missing the last step that was to be saved
        self.display: Display | None = None
        if not is_main_process():
            return
        recipe, state = run.recipe, run.state
        try:
            describe_run(run_dir, recipe, run.device, state.step)
            self.metrics_file = MetricsFile(run_dir / "metrics.jsonl", state.step, state.epochs_probed, self.print)
            self.trackers = start_trackers(run_dir, recipe, state.step)
        except OSError as error:
            raise write_error(run_dir, error) from None
        title = f"{recipe.name}  ({run.device.type}, {run.precision})"
        self.display = Display(title, state.step, run.schedule.total_steps)

    def __enter__(self) -> "RunWriter":
        if self.display:
            self.display.__enter__()
        name, step = self.run.recipe.name, self.run.state.step
        where = f"on {self.run.device.type} ({self.run.precision}) in {self.run_dir}"
        if step == 0:
            self.print(f"Training {name} {where}")
            self.save()  # a run that is killed before its first regular checkpoint can be resumed too
        else:
            self.print(f"Resuming {name} after step {step} {where}")
        return self

    def __exit__(self, *error: object) -> None:
        if self.display:
            self.metrics_file.close()
            for tracker in self.trackers.values():
                tracker.close()
            self.display.__exit__(*error)

    def print(self, message: str) -> None:
        if self.display:
            self.display.print(message)

    def show_step(self, step: int) -> None:
        """Move the progress bar."""
        if self.display:
            self.display.step(step)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of the current step to metrics.jsonl, the trackers and the terminal.

        A tracker whose disk is full is left out from then on.
        """
        if not self.display:
            return
        step = self.run.state.step
        self.metrics_file.write(step, metrics)
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.write(step, metrics)
            except OSError as error:
                del self.trackers[name]
                self.print(f"Warning: {name} cannot be written ({error}): from here on only metrics.jsonl has metrics.")
        self.display.log(step, metrics)

    def save_views(self, views: tuple[Tensor, ...]) -> None:
        if self.display:
            try:
                save_views(self.run_dir, views, self.run.recipe.views)
            except OSError as error:
                self.print(f"Warning: views.png cannot be written ({error.strerror}).")

    def save(self, name: str = LAST) -> bool:
        """Write checkpoints/NAME. Returns whether that worked; prints a warning where it did not."""
        if self.display:
            self.metrics_file.flush()  # before the checkpoint: a resume continues after the last line that it covers
        failure = None
        try:
            self.run.state.save(self.run_dir, name)
        except OSError as error:
            failure = error.strerror
        if failure and not (name == LAST and self.save_failed):
            then = "the next log step tries again" if name == LAST else f"{name} is left out"
            self.print(
                f"Warning: the checkpoint of step {self.run.state.step} cannot be written ({failure}): "
                f"training continues, and {then}."
            )
        if name == LAST:
            self.save_failed = failure is not None
        return failure is None

    def stop(self, request: StopRequest) -> None:
        """End the process after the checkpoint that a signal asked for.

        Raises:
            Stopped: with the exit code that belongs to the signal.
            UserError: if the checkpoint could not be written.
        """
        step = self.run.state.step
        if self.save_failed:
            raise UserError(
                f"Stopped at step {step}, which could not be saved: free some space, then --resume {self.run_dir} "
                "continues from the checkpoint before."
            )
        name = signal.Signals(request.received).name if request.received else "another process"
        self.print(f"Stopped by {name} after step {step}, which is saved: --resume {self.run_dir} continues.")
        raise Stopped(request.exit_code if request.received else EXIT_REQUEUE)

    def finish(self, problem: str | None = None) -> None:
        """Write the last checkpoint, and encoder.safetensors: the backbone's weights under timm's names.

        problem: a sentence about the training that the user should read before using the result.

        Raises:
            UserError: if one of them cannot be written.
        """
        self.save()
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
                f"{self.run_dir} is trained, but the result cannot be written: free some space, then "
                f"--resume {self.run_dir} continues from its last checkpoint."
            )
        best = ", ".join(f"{name} {value:.4g}" for name, value in state.best.items() if name != "step")
        if best:
            self.print(f"Best probe: {best} at step {state.best['step']} (checkpoints/best.pt)")
        if problem:
            self.print(f"Finished, but {problem} The run is in {self.run_dir}.")
            return
        self.print(f"Done: {self.run_dir} (look at {self.run_dir / 'views.png'} first)")
