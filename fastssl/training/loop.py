"""Train a recipe.

fastssl train recipes/zprob_barlow.yaml
fastssl train recipes/zprob_barlow.yaml train.epochs=1 data.train=x.beton
fastssl train --resume runs/zprob_barlow
fastssl train --resume runs/zprob_barlow train.epochs=400
torchrun --nproc-per-node 8 -m fastssl train recipes/zprob_barlow.yaml
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastssl.common.distributed import (
    any_rank,
    any_rank_each,
    broadcast_from_main,
    combine,
    is_main_process,
    joined_processes,
)
from fastssl.loading import Batch
from fastssl.loading.spans import span
from fastssl.models import Model, ModelInput, SSLModel
from fastssl.models.checkpoint import newest_checkpoint
from fastssl.recipe import BYOLConfig, Recipe
from fastssl.training.memory import explain_out_of_memory
from fastssl.training.optim import clip_gradients
from fastssl.training.run_dir import choose_run_dir, locked_run_dir, rename_damaged
from fastssl.training.run_writer import EvaluationCommand, RunWriter
from fastssl.training.schedule import image_size, target_momentum
from fastssl.training.setup import StepOutput, TrainingRun, choose_device, prepare
from fastssl.training.signals import ProbeInterrupted, StopRequest
from fastssl.training.step_log import Diagnose, StepLog

Probe = Callable[[Model], dict[str, float]]


def train(
    recipe: Recipe,
    *,
    resume: Path | Literal["auto"] | None = None,
    probe: Probe | None = None,
    diagnose: Diagnose = lambda run, reading: "`fastssl profile` says why.",
    evaluation_command: EvaluationCommand = lambda recipe, run_dir: None,
) -> Path:
    """Train to the recipe's last epoch and return the run directory.

    Args:
        resume: a path that `find_run_dir` takes, to continue that run; or "auto": continue the recipe's own run if
            there is one.
        probe: a function of the model, called in the main process every `probe.every` epochs and at the end. The
            metrics that it returns are logged, and the checkpoint with the best first metric is kept as best.pt.
        diagnose: returns the sentence that a warning about long waits for data ends with.
        evaluation_command: returns the command that the last lines of the run suggest.

    Raises:
        UserError: for everything that the user can fix.
        Stopped: (a SystemExit) after SIGTERM, SIGUSR1 or Ctrl-C, with a checkpoint of the last step.
    """
    with ExitStack() as stack:
        device = stack.enter_context(joined_processes(choose_device(recipe.train.device)))
        stop = stack.enter_context(StopRequest())
        restarted = any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
        run_dir, resumes, taken = broadcast_from_main(lambda: choose_run_dir(recipe, resume, restarted))
        stack.enter_context(explain_out_of_memory(recipe, device, run_dir))
        open_run_dir = partial(stack.enter_context, locked_run_dir(run_dir))
        if resumes:  # lock the directory before reading what another process might still write
            broadcast_from_main(open_run_dir)
        checkpoint = newest_checkpoint(run_dir) if resumes else None
        run, remarks = prepare(recipe, device, checkpoint)
        if not resumes:  # create the directory only now, when nothing is wrong with the recipe
            broadcast_from_main(open_run_dir)
        # After the directory is locked: loading may take minutes, in which another run could take the directory.
        needs_images = run.state.loader.resident and run.state.loader.epoch < recipe.train.epochs
        loaded = not needs_images or load_images(run, stop)
        if checkpoint and is_main_process():
            rename_damaged(checkpoint)
        writer = stack.enter_context(RunWriter(run, run_dir, stop, evaluation_command))
        if taken:
            writer.explain_number(taken)
        for remark in remarks:
            writer.print(remark)
        if not probe and recipe.probe.every and not recipe.data.val:
            writer.print("There is no probe in this run, as data.val=null leaves it no images to test on.")
        if probe and recipe.data.shards == "local" and not recipe.probe.train:
            writer.print(
                "The probe searches the images of one shard on the main process's node (data.shards=local); "
                "probe.train names others."
            )
        if not loaded:
            writer.stop(stop)
        fit(run, writer, stop, probe, diagnose)
    return run_dir


def load_images(run: TrainingRun, stop: StopRequest) -> bool:
    """Load a resident set, which may take minutes: before the display and the meters begin.

    Returns False if a process received a signal, which ends the loading there.
    """
    try:
        with stop.interruptible():
            run.state.loader.load_resident()
    except ProbeInterrupted:
        pass
    return not any_rank(stop.received is not None)


def fit(run: TrainingRun, writer: RunWriter, stop: StopRequest, probe: Probe | None, diagnose: Diagnose) -> None:
    """Train from the state's step to the last one.

    On a GPU the CPU only queues work and runs ahead of the device. It waits before a checkpoint, for a log line that is
    not written yet (with fp16 also for the loss scale), before a probe, and where a log step computes RankMe, and
    nowhere else (with an optimizer that cannot skip a step on the device, at every step: see FiniteGuard).
    """
    recipe, state, loader = run.recipe, run.state, run.state.loader
    with StepLog(run, writer, diagnose) as log:
        while True:
            # Between two epochs. A resumed run may have probed already after its last epoch: the state knows.
            at_epoch_end = loader.position == 0 and state.epochs_probed < loader.epoch
            if probe and at_epoch_end and is_probe_epoch(recipe, loader.epoch):
                log.finish()
                run_probe(run, writer, stop, probe)
                log.meter.restart()  # leaves the probe's time out of the training's
            if loader.epoch == recipe.train.epochs:
                break

            epoch = loader.epoch
            for remark in loader.begin_epoch():
                writer.print(remark)
            loader.views = recipe.views.model_copy(update={"size": image_size(recipe.views, epoch)})
            for batches in in_groups(log.meter.watch(loader), recipe.train.accumulate):
                if state.step == 0:
                    writer.save_views(run.views(batches[0], epoch))
                rate = run.schedule.rate(state.step)
                step_output = train_step(run, batches, epoch, rate)
                log.meter.images += recipe.train.batch_size
                writer.show_step(state.step)

                logs = log.is_log_step()
                if logs:
                    log.log(step_output, epoch, rate)
                # All processes stop if one of them received a signal. They agree by a message between CPUs.
                stops, save_is_due = any_rank_each([stop.received is not None, writer.save_is_due(logs)])
                if stops or save_is_due or state.step % recipe.checkpoint.every == 0:
                    log.finish()
                    writer.save()
                if stops:
                    writer.stop(stop)
            if recipe.checkpoint.keep and loader.epoch % recipe.checkpoint.keep == 0:
                log.finish()
                writer.save(f"epoch-{loader.epoch:04}.pt")
        log.finish()
        writer.finish(log.collapse_warning.problem())


def train_step(run: TrainingRun, batches: list[Batch], epoch: int, rate: float) -> StepOutput:
    """One optimizer step with learning rate `rate` on its micro-batches."""
    for group in run.state.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
    run.guard.remember()
    step_output = forward_and_backward(run, batches, epoch)
    with span("optimizer"):
        optimize(run, step_output.terms)
    run.state.step += 1
    return step_output


def forward_and_backward(run: TrainingRun, batches: list[Batch], epoch: int) -> StepOutput:
    """Add the gradients of the micro-batches' mean loss. Returns the terms over all of them, and the h of the last."""
    # A tensor, not a number: torch.compile would compile the network again for each number.
    step = torch.full((), run.state.step, device=run.device)
    per_microbatch = []
    for number, batch in enumerate(batches, 1):
        with span("views"):
            inputs = ModelInput(run.views(batch, epoch), batch.label, batch.index, step)
        if run.recipe.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # Under DDP the processes exchange gradients in the last backward pass only.
        with run.no_sync() if number < len(batches) else nullcontext():
            with span("forward"):
                terms, h = run.network(inputs)
            with span("backward"):
                run.state.scaler.scale(terms["loss"] / len(batches)).backward()
        per_microbatch.append(torch.stack([term.detach() for term in terms.values()]))
    values = combine([*terms], torch.stack(per_microbatch))
    return StepOutput(dict(zip(terms, values)), h)


def optimize(run: TrainingRun, terms: dict[str, Tensor]) -> None:
    """Everything after the backward pass. Adds `grad_norm`, the norm of the gradient before clipping, to the terms."""
    state, model, objective = run.state, run.state.model, run.recipe.objective
    terms["grad_norm"] = clip_gradients(model, state.optimizer, state.scaler, run.recipe.optim.clip)
    # `skipped` is a flag on the device: the CPU does not learn here whether the step was finite.
    skipped = run.guard.step(terms)
    state.optimizer.zero_grad()
    if isinstance(model, SSLModel) and isinstance(objective, BYOLConfig):
        momentum = target_momentum(state.step, run.schedule.total_steps, objective.momentum)
        model.update_target(momentum, skip=skipped)
    if state.average:
        state.average.update(state.step, skip=skipped)


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches in lists of `size`; an incomplete last list is left out."""
    batches = iter(batches)
    while len(group := list(islice(batches, size))) == size:
        yield group


def run_probe(run: TrainingRun, writer: RunWriter, stop: StopRequest, probe: Probe) -> None:
    """Call the probe in the main process, while the others wait, and save a checkpoint; best.pt too if it is better.

    A signal interrupts the probe; a resumed run then repeats it.
    """
    state, epochs_done = run.state, run.state.loader.epoch
    metrics: dict[str, float] = {}
    if is_main_process():
        try:
            with stop.interruptible(), writer.during("probe running"):
                metrics = probe(state.average.model if state.average else state.model)
        except ProbeInterrupted:
            pass
    if any_rank(stop.received is not None):
        writer.save()
        writer.stop(stop)
    metrics = broadcast_from_main(lambda: metrics)
    state.epochs_probed = epochs_done
    writer.log({"epoch": epochs_done - 1, **metrics}, state.step)
    name, value = next(iter(metrics.items()), ("", float("-inf")))
    if name and value > state.best.get(name, float("-inf")):
        before, state.best = state.best, {name: value, "step": state.step}
        # Written before last.pt, whose `best` must not name a file that the disk did not take.
        writer.save("best.pt")
        if not writer.wait_for_save():
            state.best = before
    writer.save()  # a resume from an earlier checkpoint would have to probe again


def is_probe_epoch(recipe: Recipe, epochs_done: int) -> bool:
    """Whether the probe runs after this many epochs: after every probe.every-th, and always after the last one."""
    if epochs_done == recipe.train.epochs:
        return True
    return recipe.probe.every > 0 and epochs_done % recipe.probe.every == 0
