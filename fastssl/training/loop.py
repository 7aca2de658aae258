"""Train a recipe:

fastssl train recipes/zprob_barlow.yaml
fastssl train recipes/zprob_barlow.yaml train.epochs=1 data.train=x.beton
fastssl train recipes/zprob_barlow.yaml --resume runs/zprob_barlow
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.beton import read_header
from fastssl.beton.atomic import write_atomically
from fastssl.loading import Batch, BetonLoader
from fastssl.models import SSLModel, convert_batch_norms
from fastssl.models.checkpoint import checkpoint_of
from fastssl.models.collective import is_global
from fastssl.objectives import momentum_at, total_loss
from fastssl.recipe import Recipe, UserError
from fastssl.views import PairedViews

from .meters import Meter, rankme
from .optim import learning_rate, make_optimizer, skips_on_device
from .progress import Display
from .run_dir import describe_run, new_run_dir, save_view_sheet
from .state import MetricsLog, TrainState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    recipe: Recipe,
    *,
    resume: Path | None = None,
    probe: Callable[[SSLModel], dict[str, float]] | None = None,
    resident: Batch | None = None,
) -> Path:
    """Train to the recipe's last epoch and return the run directory.

    resume: a run directory to continue. probe: called with the model every `probe.every` epochs and at
    the end; what it returns is logged. resident: all images of the run, where another process holds them
    on the device. Raises UserError for everything that the user can mend.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("Training runs in one process so far: start it without torchrun.")
    if resume == "auto":
        resume = Path(recipe.run.dir) if (Path(recipe.run.dir) / "checkpoints/last.pt").exists() else None
        if resume is None:
            (Path(recipe.run.dir) / "recipe.yaml").unlink(missing_ok=True)
    if resume:
        checkpoint_of(resume)  # says at once where there is nothing to resume
    device = choose_device(recipe.train.device)
    precision = choose_precision(recipe.train.precision, device)
    compiled = device.type == "cuda" if recipe.train.compile == "auto" else recipe.train.compile
    memory_format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format

    loader = training_loader(recipe, device, resident)
    torch.manual_seed(recipe.seed)
    model = SSLModel(recipe).to(device=device, memory_format=memory_format)
    if recipe.train.sync_bn and is_global(None):
        convert_batch_norms(model)
    views = PairedViews(recipe.views, seed=recipe.seed)
    state = TrainState(
        recipe,
        model,
        make_optimizer(model, recipe.optim),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader,
        skipped=torch.zeros((), dtype=torch.int64, device=device),
    )
    warnings = state.resume(resume) if resume else []
    run_dir = resume or new_run_dir(recipe)
    describe_run(run_dir, recipe, device)
    metrics = MetricsLog(run_dir / "metrics.jsonl", state.step)

    total_steps = recipe.train.epochs * len(loader)
    length = len(loader), total_steps, warnings
    warmup_steps = count_warmup("optim.warmup_epochs", recipe.optim.warmup_epochs, *length)
    beta_warmup_steps = count_warmup("embedding.beta_warmup_epochs", recipe.embedding.beta_warmup_epochs, *length)
    peak_rate = recipe.optim.lr * recipe.train.batch_size / 256

    loss_terms = total_loss(recipe, beta_warmup_steps)

    def forward(v1: Tensor, v2: Tensor, index: Tensor, step: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The loss's terms, and the first view's h, to look at."""
        with torch.autocast(device.type, DTYPES.get(precision), enabled=precision != "fp32"):
            first, second = model(v1, v2, index, step)
        return loss_terms(first, second, model.priors, step), first.h.detach()

    def make_views(image, index, epoch, height, width) -> tuple[Tensor, Tensor]:
        pair = views(image, index, epoch, height, width)
        return tuple(v.contiguous(memory_format=memory_format) for v in pair)

    if compiled:
        forward = torch.compile(forward, dynamic=False)
        make_views = torch.compile(make_views, dynamic=False)

    guard = FiniteGuard(model, state)
    meter = Meter()
    model.train()
    with Display(f"{recipe.name}  ({device.type}, {precision})", state.step, total_steps) as display:
        display.say(f"Training {recipe.name} on {device.type} ({precision}) in {run_dir}")
        for warning in warnings:
            display.say(warning)
        while state.step < total_steps or loader.epoch < recipe.train.epochs:
            epoch = loader.epoch
            for batch in meter.watch(loader):
                # Tensors, not numbers: a compiled graph would be made anew for each number.
                step, epoch_tensor = (torch.full((), n, device=device) for n in (state.step, epoch))
                v1, v2 = make_views(batch.image, batch.index, epoch_tensor, batch.height, batch.width)
                if state.step == 0:
                    save_view_sheet(run_dir, v1, v2, recipe)

                rate = learning_rate(
                    state.step, total_steps, warmup_steps, peak_rate, recipe.optim.final_lr_factor
                )
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                guard.remember()
                terms, h = forward(v1, v2, batch.index, step)
                state.scaler.scale(terms["loss"]).backward()
                terms["grad_norm"] = clip_gradients(state, recipe.optim.clip)
                skipped = guard.step(terms)
                state.optimizer.zero_grad()
                if model.target is not None:
                    momentum = momentum_at(state.step, total_steps, recipe.objective.momentum)
                    model.update_target(momentum, unless=skipped)
                state.step += 1
                meter.images += recipe.train.batch_size
                display.step(state.step)

                if state.step % recipe.log.every == 0 or state.step == total_steps:
                    # The host waits for the device here, and with most optimisers (FiniteGuard) nowhere else.
                    figures = guard.read(terms)
                    if figures["skipped_steps"] > recipe.train.max_skipped_steps:
                        state.save(run_dir)
                        raise UserError(guard.sentence(run_dir))
                    ranks = {"rankme_h": rankme(h), "rankme_z": rankme(model.mean_z(h))}
                    entry = {"step": state.step, "epoch": epoch, **figures, **ranks, "lr": rate, **meter.read()}
                    if loader.bad_samples:
                        entry["bad_samples"] = loader.bad_samples
                    metrics.write(entry)
                    display.log(entry)
                if state.step % recipe.checkpoint.every == 0:
                    state.save(run_dir)
            if probe and (loader.epoch == recipe.train.epochs or is_probe_epoch(recipe, loader.epoch)):
                entry = {"step": state.step, "epoch": epoch, **probe(model)}
                metrics.write(entry)
                display.log(entry)
                meter.read()  # the probe's time is not the training's
        state.save(run_dir)
        save_encoder(run_dir, model)
        metrics.close()
        display.say(f"Done: {run_dir} (look at {run_dir / 'views.png'} first)")
    return run_dir


def count_warmup(key: str, epochs: float, steps_per_epoch: int, total_steps: int, warnings: list[str]) -> int:
    """The steps of a warm-up; one that is not shorter than the run becomes a tenth of it, with a warning."""
    steps = round(epochs * steps_per_epoch)
    if steps < total_steps:
        return steps
    warnings.append(f"{key}={epochs:g} is the whole run or more: shortened to 10% of its steps.")
    return total_steps // 10


def is_probe_epoch(recipe: Recipe, epochs_done: int) -> bool:
    return recipe.probe.every > 0 and epochs_done % recipe.probe.every == 0


class FiniteGuard:
    """Keeps a step that is not finite away from the weights, without the host looking.

    A flag on the device makes the optimiser leave the step out and puts the batch-norm statistics back.
    Only for an optimiser that takes no flag (`skips_on_device` says which do) the host waits once a step.
    The first bad step and its terms stay on the device until the host asks at a log step.
    """

    def __init__(self, model: nn.Module, state: TrainState):
        self.state = state
        self.buffers = list(model.buffers())
        self.saved = [buffer.clone() for buffer in self.buffers]
        device = state.skipped.device
        self.first_bad_step = torch.full((), -1, device=device)
        self.first_bad_terms: Tensor | None = None
        self.names: list[str] = []

    def remember(self) -> None:
        """Before the forward pass: the running statistics to come back to."""
        torch._foreach_copy_(self.saved, self.buffers)

    def step(self, terms: dict[str, Tensor]) -> Tensor:
        """After the backward pass: the optimiser's step, or nothing. Returns whether it was nothing, on the device."""
        state, scaler = self.state, self.state.scaler
        self.names = list(terms)
        values = torch.stack([term.detach().float() for term in terms.values()])
        bad_loss, bad_gradient = ~terms["loss"].isfinite(), ~terms["grad_norm"].isfinite()
        bad = bad_loss | bad_gradient
        # fp16 looks for its scale by letting gradients overflow; at scale 1 there is nothing to find.
        counts = bad_loss | (bad_gradient & (scaler._scale <= 1)) if scaler.is_enabled() else bad

        if skips_on_device(state.optimizer):
            state.optimizer.found_inf = bad.float()
            state.optimizer.step()
        elif not bad:  # the host waits here
            state.optimizer.step()
        if scaler.is_enabled():
            scaler.update()
        for buffer, saved in zip(self.buffers, self.saved):
            buffer.copy_(torch.where(bad, saved, buffer))

        if self.first_bad_terms is None:
            self.first_bad_terms = torch.zeros_like(values)
        first = counts & (self.first_bad_step < 0)
        self.first_bad_terms = torch.where(first, values, self.first_bad_terms)
        self.first_bad_step = torch.where(first, state.step, self.first_bad_step)
        state.skipped += counts
        return bad

    def read(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The terms of the last step and the number of skipped ones, on the host (one copy)."""
        values = torch.stack([*(term.detach().double() for term in terms.values()), self.state.skipped.double()])
        *numbers, skipped = values.tolist()
        return {**dict(zip(terms, numbers)), "skipped_steps": int(skipped)}

    def sentence(self, run_dir: Path) -> str:
        mend = "lower optim.lr, or allow such steps with train.max_skipped_steps."
        if self.first_bad_step < 0:  # they came before this resume
            return f"{int(self.state.skipped)} earlier steps of {run_dir} were not finite and left out: {mend}"
        values = dict(zip(self.names, self.first_bad_terms.tolist()))
        shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        return (
            f"Step {int(self.first_bad_step)} was not finite ({shown}): the weights in {run_dir} are untouched by "
            f"it; {mend}"
        )


def clip_gradients(state: TrainState, limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most `limit`; returns their norm before, a device tensor."""
    if state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    if limit is None:
        return nn.utils.get_total_norm([p.grad for p in parameters])
    return nn.utils.clip_grad_norm_(parameters, limit)


def choose_device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU here: run `fastssl doctor`, or set train.device=cpu.")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def choose_precision(asked: str, device: torch.device) -> str:
    if asked == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return asked


def crop_of(recipe: Recipe) -> str:
    """Where crops are cut: on the device for a canvas file, on the CPU for a full one, unless data.crop says."""
    if recipe.data.crop != "auto":
        return recipe.data.crop
    return "cpu" if read_header(recipe.data.train).resolution is None else "gpu"


def is_resident(recipe: Recipe, device: torch.device) -> bool:
    """Whether the run keeps all of its images on the device."""
    data = recipe.data
    if data.resident != "auto":
        return data.resident
    if device.type != "cuda" or crop_of(recipe) != "gpu":
        return False
    info = read_header(data.train)
    height, width = info.max_resolution
    return info.num_samples * height * width * 3 <= torch.cuda.get_device_properties(device).total_memory / 8


def training_loader(recipe: Recipe, device: torch.device, resident: Batch | None = None) -> BetonLoader:
    """The loader of data.train. resident: its images, where another process holds them on the device already."""
    data = recipe.data
    return BetonLoader(
        data.train,
        recipe.train.batch_size,
        seed=recipe.seed,
        crop=crop_of(recipe),
        views=recipe.views,
        workers=data.workers,
        shuffle="quasi_random" if data.order == "quasi_random" else True,
        device=device,
        decode=data.decode,
        resident=resident or is_resident(recipe, device),
        on_bad_sample=data.on_bad_sample,
        limit=data.limit,
    )


def save_encoder(run_dir: Path, model: SSLModel) -> None:
    """encoder.safetensors: the backbone's weights under timm's names."""
    weights = {name: weight.contiguous() for name, weight in model.encoder.state_dict().items()}
    write_atomically(run_dir / "encoder.safetensors", lambda path: save_file(weights, path))
