"""From a recipe to everything that the loop works with."""

import ctypes
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastssl.beton import read_header
from fastssl.common.distributed import broadcast_from_main, is_main_process, rank, world_size
from fastssl.common.errors import UserError
from fastssl.loading import Batch, BetonLoader, SampleSelection
from fastssl.models import Model, WeightAverage, build_model, convert_batch_norms
from fastssl.models.checkpoint import Checkpoint, load_pretrained
from fastssl.models.encoder import has_fixed_size
from fastssl.objectives import total_loss
from fastssl.recipe import Recipe
from fastssl.training.guard import FiniteGuard
from fastssl.training.optim import make_optimizer
from fastssl.training.schedule import Schedule, image_size, plan
from fastssl.training.state import TrainState
from fastssl.training.tracking import require_trackers
from fastssl.views import PairedViews

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """What one training needs. `network` maps what the model's forward takes to the loss's terms and the first h."""

    recipe: Recipe
    device: torch.device
    precision: str
    compiled: bool
    schedule: Schedule
    state: TrainState
    network: Callable[..., tuple[dict[str, Tensor], Tensor]]
    no_sync: Callable[[], AbstractContextManager]  # inside, processes leave their gradients unexchanged
    views: "TrainingViews"
    guard: FiniteGuard


class Network(nn.Module):
    """Model and loss in one: what is compiled, and what DistributedDataParallel wraps."""

    def __init__(self, model: Model, loss_terms: Callable, device: torch.device, precision: str):
        super().__init__()
        self.model, self.loss_terms = model, loss_terms
        self.autocast = dict(device_type=device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)

    def forward(self, *inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(v1, v2, index, step), or (v, label, index, step): the loss's terms, and the first view's h, to look at."""
        with torch.autocast(**self.autocast):
            views = self.model(*inputs)
        return self.loss_terms(*views, self.model.priors, inputs[-1]), views[0].h.detach()


class TrainingViews:
    """The views of a batch that the objective takes, at the size that the recipe has for the epoch."""

    def __init__(self, recipe: Recipe, compiled: bool):
        self.recipe, self.compiled = recipe, compiled
        self.layout = memory_format(recipe)
        self._by_size: dict[int, Callable] = {}

    def __call__(self, batch: Batch, epoch: int) -> tuple[Tensor, ...]:
        size = image_size(self.recipe.views, epoch)
        if size not in self._by_size:
            views = self.recipe.views.model_copy(update={"size": size})
            make = PairedViews(views, self.recipe.seed, self.recipe.view_count)
            self._by_size[size] = torch.compile(make, dynamic=False) if self.compiled else make
        # A tensor, not a number: a compiled graph would be made anew for each number.
        epoch = torch.full((), epoch, device=batch.image.device)
        made = self._by_size[size](batch.image, batch.index, epoch, batch.height, batch.width)
        return tuple(v.contiguous(memory_format=self.layout) for v in made)


def prepare(recipe: Recipe, device: torch.device, checkpoint: Checkpoint | None) -> tuple[Run, list[str]]:
    """Build the run, from its checkpoint where there is one. Returns it with remarks to show.

    Raises UserError for everything that the user can mend.
    """
    require_trackers(recipe)
    if device.type == "cpu":
        keep_freed_memory()
    if recipe.train.cuda_graphs and world_size() > 1:
        raise UserError("train.cuda_graphs is for a single process: leave it out.")
    precision = choose_precision(recipe.train.precision, device)
    compiled = device.type == "cuda" if recipe.train.compile == "auto" else recipe.train.compile
    loader = training_loader(recipe, device)
    if recipe.objective.name == "supervised":
        check_labels(loader, recipe.objective.classes)
    schedule, remarks = plan(recipe, len(loader) // recipe.train.accumulate)

    if recipe.views.progressive_resize and has_fixed_size(recipe.model.backbone):
        raise UserError(
            f"views.progressive_resize: {recipe.model.backbone} takes images of one size only, so leave it out."
        )
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).to(device=device, memory_format=memory_format(recipe))
    if recipe.model.init and not checkpoint:
        remarks.append(load_pretrained(model, recipe.model.init))
    if recipe.train.sync_bn and world_size() > 1:
        convert_batch_norms(model)
    model.train()
    state = TrainState(
        recipe,
        model,
        make_optimizer(model, recipe.optim),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader,
        skipped=torch.zeros((), dtype=torch.int64, device=device),
        average=WeightAverage(model, recipe.train.ema) if recipe.train.ema else None,
    )
    if checkpoint:
        remarks += state.load(checkpoint)
    if broadcast_from_main(lambda: state.step) != state.step:
        raise UserError("The processes found different checkpoints: let all hosts see one run directory.")
    if not is_main_process():  # dropout masks of its own; the first process's generator is part of the state
        torch.manual_seed(recipe.seed + 1_000_003 * (state.step + 1) + rank())

    network = Network(model, total_loss(recipe, schedule.beta_warmup_steps), device, precision)
    if world_size() > 1:
        # Batch norms' buffers need no broadcast: they are the same everywhere, or with sync_bn=false the first one's.
        with warnings.catch_warnings():
            # torch 2.15 wants the name forward_sync_buffers instead, which older ones that we allow may not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            network = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        if recipe.train.compress_gradients:
            network.register_comm_hook(None, bf16_compress_hook)
    no_sync = getattr(network, "no_sync", nullcontext)
    if compiled:
        network = torch.compile(network, dynamic=False, mode="reduce-overhead" if recipe.train.cuda_graphs else None)
    views, guard = TrainingViews(recipe, compiled), FiniteGuard(model, state)
    return Run(recipe, device, precision, compiled, schedule, state, network, no_sync, views, guard), remarks


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    It gives large pieces back to the system, which hands out zeroed pages again: on two cores 35,000 page faults a step
    at 32 px, 130,000 at 224 px. Keeping them makes training a tenth faster (records/profiling.md). Another C library
    is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # A single piece of a GB, no tensor of a step, is still given back. Older ones refuse more than 32 MB here, and what
    # they would do with the second call alone is to map and unmap every tensor: 3.5 times as slow as before.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU here: run `fastssl doctor`, or set train.device=cpu.")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def choose_precision(asked: str, device: torch.device) -> str:
    """Resolve "auto" and set torch's precision of fp32 products: TF32 with tf32, else whole.

    Under bf16 and fp16 the products that are left in fp32 are the loss's own, and stay exact.
    """
    if asked == "auto":
        asked = "bf16" if device.type == "cuda" else "fp32"
    if asked == "tf32" and device.type != "cuda":
        raise UserError("train.precision=tf32 is a GPU's: set train.precision=fp32 for a run without one.")
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = asked == "tf32"
    return asked


def memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def crop_of(recipe: Recipe) -> str:
    """Where crops are cut: on the device for a canvas file, on the CPU for a full one, unless data.crop says."""
    if recipe.data.crop != "auto":
        return recipe.data.crop
    return "cpu" if read_header(recipe.data.train).resolution is None else "gpu"


def is_resident(recipe: Recipe, device: torch.device) -> bool:
    """Whether the run keeps all of its images on the device."""
    if recipe.data.resident != "auto":
        return recipe.data.resident
    if device.type != "cuda" or crop_of(recipe) != "gpu":
        return False
    data = recipe.data
    height, width = read_header(data.train).max_resolution
    images = SampleSelection(data.subset, data.limit).count(data.train)
    return images * height * width * 3 <= torch.cuda.get_device_properties(device).total_memory / 8


def check_labels(loader: BetonLoader, classes: int) -> None:
    """Raises UserError where an image of the run has a label that the classifier has no output for."""
    label_N = loader.samples.label_N[loader.rows]
    lowest, highest = int(label_N.min()), int(label_N.max())
    if lowest < 0:
        raise UserError(
            f"{int((label_N < 0).sum()):,} of the {len(label_N):,} images of {loader.path} have no label, which "
            "objective.name=supervised needs: list those that have one in data.subset, or set another data.train."
        )
    if highest >= classes:
        raise UserError(
            f"objective.classes={classes}, but {loader.path} holds labels from {lowest} to {highest}: "
            f"set objective.classes={highest + 1}."
        )


def training_loader(recipe: Recipe, device: torch.device, kind: type[BetonLoader] = BetonLoader) -> BetonLoader:
    """The loader of data.train.

    Its batches are this process's micro-batches: train.batch_size over all processes and train.accumulate.
    """
    data = recipe.data
    shares = world_size() * recipe.train.accumulate
    if recipe.train.batch_size % shares:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size} does not divide by {world_size()} processes x "
            f"train.accumulate={recipe.train.accumulate}: choose a multiple of {shares}."
        )
    loader = kind(
        data.train,
        recipe.train.batch_size // shares,
        seed=recipe.seed,
        crop=crop_of(recipe),
        views=recipe.views,
        crops=recipe.view_count,
        workers=data.workers,
        shuffle="quasi_random" if data.order == "quasi_random" else True,
        device=device,
        resident=is_resident(recipe, device),
        on_bad_sample=data.on_bad_sample,
        selection=SampleSelection(data.subset, data.limit),
    )
    if len(loader) < recipe.train.accumulate:
        raise UserError(
            f"{data.train} gives {len(loader.rows)} images, fewer than one batch of {recipe.train.batch_size}: "
            "lower train.batch_size or add images."
        )
    return loader
