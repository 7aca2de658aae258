"""What a run shows and writes, all of it in the first process."""

import signal
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor

from fastssl.common.distributed import is_main_process
from fastssl.common.errors import EXIT_REQUEUE, Stopped, UserError
from fastssl.common.files import write_atomically
from fastssl.models.checkpoint import LAST
from fastssl.training.display import Display
from fastssl.training.run_dir import describe_run, save_view_sheet
from fastssl.training.setup import TrainingRun
from fastssl.training.signals import StopRequest
from fastssl.training.tracking import Trackers


class Output:
    """Figures, checkpoints and the end of a run. Use as a context manager.

    A disk that takes no checkpoint costs a warning, not the run: the next log step tries again.
    """

    def __init__(self, run: TrainingRun, run_dir: Path):
        self.run, self.run_dir = run, run_dir
        self.save_failed = False  # of last.pt
        recipe, state, device = run.recipe, run.state, run.device
        if not is_main_process():
            self.display, self.trackers = None, None
            return
        try:
            describe_run(run_dir, recipe, device, state.step)
            self.trackers = Trackers(run_dir, recipe, state.step, state.epochs_probed, self.say)
        except OSError as error:
            reason = f"{run_dir} cannot be written ({error.strerror})"
            raise UserError(f"{reason}: free some space, or set run.dir.") from None
        title = f"{recipe.name}  ({device.type}, {run.precision})"
        self.display = Display(title, state.step, run.schedule.total_steps)

    def __enter__(self) -> "Output":
        if self.display:
            self.display.__enter__()
        recipe, state = self.run.recipe, self.run.state
        where = f"on {self.run.device.type} ({self.run.precision}) in {self.run_dir}"
        if state.step == 0:
            self.say(f"Training {recipe.name} {where}")
            self.save()  # whoever is killed before the first step that saves can resume too
        else:
            self.say(f"Going on with {recipe.name} behind step {state.step} {where}")
        return self

    def __exit__(self, *error) -> None:
        if self.display:
            self.trackers.close()
            self.display.__exit__(*error)

    def say(self, line: str) -> None:
        if self.display:
            self.display.say(line)

    def step(self, step: int) -> None:
        if self.display:
            self.display.step(step)

    def log(self, figures: dict) -> None:
        if self.display:
            entry = {"step": self.run.state.step, **figures}
            self.trackers.write(entry)
            self.display.log(entry)

    def save_view_sheet(self, views: tuple[Tensor, ...]) -> None:
        if self.display:
            try:
                save_view_sheet(self.run_dir, views, self.run.recipe)
            except OSError as error:
                self.say(f"Warning: views.png cannot be written ({error.strerror}).")

    def save(self, name: str = LAST) -> bool:
        """Whether the disk took it; a warning is said where it did not."""
        if self.trackers:
            self.trackers.flush()  # no line may be missing that the checkpoint has behind it
        failed = None
        try:
            self.run.state.save(self.run_dir, name)
        except OSError as error:
            failed = error.strerror
        if failed and not (name == LAST and self.save_failed):
            then = "tries again" if name == LAST else f"leaves out {name}"
            what = f"the checkpoint of step {self.run.state.step} cannot be written ({failed})"
            self.say(f"Warning: {what}: training goes on and {then}.")
        if name == LAST:
            self.save_failed = failed is not None
        return failed is None

    def stopped(self, stop: StopRequest) -> None:
        """End the process behind the checkpoint that was asked for."""
        step = self.run.state.step
        if self.save_failed:
            raise UserError(
                f"Stopped at step {step}, which the disk did not take: free some space, then --resume {self.run_dir} "
                "goes on from the checkpoint before."
            )
        name = signal.Signals(stop.received).name if stop.received else "another process"
        self.say(f"Stopped by {name} behind step {step}, which is saved: --resume {self.run_dir} goes on.")
        raise Stopped(stop.exit_code if stop.received else EXIT_REQUEUE)

    def finish(self) -> None:
        """The last checkpoint, and encoder.safetensors: the backbone's weights under timm's names."""
        self.save()
        state = self.run.state
        encoder = (state.average.model if state.average else state.model).encoder
        try:
            if is_main_process() and not self.save_failed:
                weights = {name: weight.contiguous().cpu() for name, weight in encoder.state_dict().items()}
                write_atomically(self.run_dir / "encoder.safetensors", lambda path: path.write_bytes(to_bytes(weights)))
        except OSError:
            self.save_failed = True
        if self.save_failed:
            raise UserError(
                f"{self.run_dir} is trained, but the disk does not take the result: free some space, then "
                f"--resume {self.run_dir} goes on from its last checkpoint."
            )
        best = ", ".join(f"{name} {value:.4g}" for name, value in state.best.items() if name != "step")
        if best:
            self.say(f"Best probe: {best} at step {state.best['step']} (checkpoints/best.pt)")
        self.say(f"Done: {self.run_dir} (look at {self.run_dir / 'views.png'} first)")
