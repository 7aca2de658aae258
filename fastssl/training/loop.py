"""Train a recipe:

fastssl train recipes/zprob_barlow.yaml
fastssl train recipes/zprob_barlow.yaml train.epochs=1 data.train=x.beton
fastssl train recipes/zprob_barlow.yaml --resume runs/zprob_barlow
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
    broadcast_from_main,
    combine,
    gather_rows,
    is_main_process,
    joined_processes,
)
from fastssl.common.errors import UserError
from fastssl.loading import Batch
from fastssl.loading.spans import span
from fastssl.models import Model
from fastssl.models.checkpoint import newest_checkpoint
from fastssl.objectives import momentum_at
from fastssl.recipe import Recipe
from fastssl.training.guard import clip_gradients
from fastssl.training.meters import LongWait, Meter, Observed, compile_counts, rankme
from fastssl.training.output import Output
from fastssl.training.run_dir import choose_run_dir, opened_run_dir, set_damaged_aside
from fastssl.training.schedule import image_size
from fastssl.training.setup import Run, choose_device, prepare
from fastssl.training.signals import ProbeInterrupted, StopRequest

Probe = Callable[[Model], dict[str, float]]
Diagnose = Callable[[Run, Observed], str]


def train(
    recipe: Recipe,
    *,
    resume: Path | Literal["auto"] | None = None,
    probe: Probe | None = None,
    diagnose: Diagnose = lambda run, observed: "`fastssl profile` says why.",
) -> Path:
    """Train to the recipe's last epoch and return the run directory.

    resume: a run directory to continue, or "auto": continue the recipe's own where there is one. probe: called with
    the model, in the first process, every `probe.every` epochs and at the end; what it returns is logged, and the
    checkpoint with the highest first figure stays as best.pt. diagnose: gives the sentence that a run hears when it has
    waited for data for long.

    Raises UserError for everything that the user can mend, and Stopped (a SystemExit) after SIGTERM, SIGUSR1 or Ctrl-C,
    with a checkpoint of the step before.
    """
    with ExitStack() as stack:
        device = stack.enter_context(joined_processes(choose_device(recipe.train.device)))
        stop = stack.enter_context(StopRequest())
        restarted = any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
        run_dir, resumes = broadcast_from_main(lambda: choose_run_dir(recipe, resume, restarted))
        open_run_dir = partial(stack.enter_context, opened_run_dir(run_dir))
        if resumes:  # before anything is read that another process might still write
            broadcast_from_main(open_run_dir)
        checkpoint = newest_checkpoint(run_dir) if resumes else None
        run, remarks = prepare(recipe, device, checkpoint)
        if not resumes:  # now that nothing is wrong with the recipe
            broadcast_from_main(open_run_dir)
        if checkpoint and is_main_process():
            set_damaged_aside(checkpoint)
        output = stack.enter_context(Output(run, run_dir))
        for remark in remarks:
            output.say(remark)
        fit(run, output, stop, probe, diagnose)
    return run_dir


def fit(run: Run, output: Output, stop: StopRequest, probe: Probe | None, diagnose: Diagnose) -> None:
    """Every step from the state's to the last. Nothing in it waits for the device but a log step."""
    recipe, state, loader, model = run.recipe, run.state, run.state.loader, run.state.model
    epochs, total_steps = recipe.train.epochs, run.schedule.total_steps
    meter, long_wait = Meter(run.device), LongWait(partial(diagnose, run))
    while True:
        # Behind an epoch: state.epochs_probed tells a resumed run whether this is done.
        ends_epoch = loader.position == 0 and state.epochs_probed < loader.epoch
        if probe and ends_epoch and is_probe_epoch(recipe, loader.epoch):
            run_probe(run, output, stop, probe)
            meter.restart()  # the probe's time is not the training's
        if loader.epoch == epochs:
            break

        epoch = loader.epoch
        loader.views = recipe.views.model_copy(update={"size": image_size(recipe.views, epoch)})
        for batches in in_groups(meter.watch(loader), recipe.train.accumulate):
            if state.step == 0:
                output.save_view_sheet(run.views(batches[0], epoch))
            rate = run.schedule.rate(state.step)
            terms, h = train_step(run, batches, epoch, rate)
            meter.images += recipe.train.batch_size
            output.step(state.step)

            logs = state.step % recipe.log.every == 0 or state.step == total_steps
            if logs:
                # The host waits for the device here, and with most optimisers (FiniteGuard) nowhere else.
                figures = run.guard.read(terms)
                if figures["skipped_steps"] > recipe.train.max_skipped_steps:
                    output.save()
                    raise UserError(run.guard.sentence(output.run_dir))
                h = gather_rows(h, None)
                ranks = {"rankme_h": rankme(h), "rankme_z": rankme(model.mean_z(h))}
                compiled = compile_counts() if run.compiled else {}
                speed, observed = meter.read(loader)
                time = {"seconds": state.count_seconds()}
                output.log({"epoch": epoch, **figures, **ranks, "lr": rate, **speed, **compiled, **time})
                if warning := long_wait.look(speed["data_wait"], observed):
                    output.say(warning)
            stops = any_rank(stop.received is not None)
            if stops or state.step % recipe.checkpoint.every == 0 or (logs and output.save_failed):
                output.save()
            if stops:
                output.stopped(stop)
        kept = recipe.checkpoint.keep
        if kept and loader.epoch % kept == 0:
            output.save(f"epoch-{loader.epoch:04}.pt")
    output.finish()


def train_step(run: Run, batches: list[Batch], epoch: int, rate: float) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step of learning rate `rate` on its micro-batches. Returns the terms and the last one's h."""
    for group in run.state.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
    run.guard.remember()
    terms, h = forward_and_backward(run, batches, epoch)
    with span("optimiser"):
        optimise(run, terms)
    run.state.step += 1
    return terms, h


def optimise(run: Run, terms: dict[str, Tensor]) -> None:
    """What follows the backward pass; adds the norm of the gradient to the terms."""
    state, model = run.state, run.state.model
    terms["grad_norm"] = clip_gradients(state, run.recipe.optim.clip)
    skipped = run.guard.step(terms)
    state.optimizer.zero_grad()
    if model.target is not None:
        momentum = momentum_at(state.step, run.schedule.total_steps, run.recipe.objective.momentum)
        model.update_target(momentum, skip=skipped)
    if state.average:
        state.average.update(state.step, skip=skipped)


def forward_and_backward(run: Run, batches: list[Batch], epoch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the mean loss of the micro-batches. Returns its terms, and the last one's h."""
    # A tensor, not a number: a compiled graph would be made anew for each number.
    step = torch.full((), run.state.step, device=run.device)
    per_microbatch = []
    for number, batch in enumerate(batches, 1):
        with span("views"):
            inputs = network_inputs(run.recipe, batch, run.views(batch, epoch), step)
        if run.recipe.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with run.no_sync() if number < len(batches) else nullcontext():
            with span("forward"):
                terms, h = run.network(*inputs)
            with span("backward"):
                run.state.scaler.scale(terms["loss"] / len(batches)).backward()
        per_microbatch.append([term.detach() for term in terms.values()])
    values = combine([*terms], torch.stack([torch.stack(values) for values in per_microbatch]))
    return dict(zip(terms, values)), h


def network_inputs(recipe: Recipe, batch: Batch, views: tuple[Tensor, ...], step: Tensor) -> tuple[Tensor, ...]:
    """What the network takes: (v1, v2, index, step), or of a supervised recipe (v, label, index, step)."""
    labels = (batch.label,) if recipe.objective.name == "supervised" else ()
    return *views, *labels, batch.index, step


def in_groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches in lists of `size`; an incomplete last one is left out."""
    batches = iter(batches)
    while len(group := list(islice(batches, size))) == size:
        yield group


def run_probe(run: Run, output: Output, stop: StopRequest, probe: Probe) -> None:
    """Measure the model in the first process, while the others wait. A signal cuts it short: a resume probes again."""
    state, epochs_done = run.state, run.state.loader.epoch
    figures = {}
    if is_main_process():
        try:
            with stop.at_once():
                figures = probe(state.average.model if state.average else state.model)
        except ProbeInterrupted:
            pass
    if any_rank(stop.received is not None):
        output.save()
        output.stopped(stop)
    figures = broadcast_from_main(lambda: figures)
    state.epochs_probed = epochs_done
    output.log({"epoch": epochs_done - 1, **figures})
    name, value = next(iter(figures.items()), (None, None))
    if name and value > state.best.get(name, float("-inf")):
        before, state.best = state.best, {name: value, "step": state.step}
        if not output.save("best.pt"):  # before the checkpoint that says so
            state.best = before
    output.save()  # a resume from before would have to probe again


def is_probe_epoch(recipe: Recipe, epochs_done: int) -> bool:
    """Whether the probe runs behind this many epochs: every probe.every, and behind the last one whatever that is."""
    if epochs_done == recipe.train.epochs:
        return True
    return recipe.probe.every > 0 and epochs_done % recipe.probe.every == 0
