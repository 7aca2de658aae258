"""From a recipe to everything that the training loop works with."""

import ctypes
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastssl.beton import beton_file, read_header
from fastssl.beton.format import RGB
from fastssl.common.distributed import (
    any_rank,
    broadcast_from_main,
    is_main_process,
    on_all_ranks,
    rank,
    spans_hosts,
    world_size,
)
from fastssl.common.errors import UserError
from fastssl.common.system import cpu_has_bf16
from fastssl.loading import Batch, BetonLoader, SampleSelection, count_labels, require_channels, require_labels
from fastssl.loading.decoding import ThreadDecoder
from fastssl.loading.local_loader import LocalShardsLoader
from fastssl.loading.local_shards import shard_here
from fastssl.loading.samples import in_pieces
from fastssl.models import Model, ModelInput, WeightAverage, build_model, convert_batch_norms
from fastssl.models.checkpoint import Checkpoint
from fastssl.models.encoder import has_fixed_size
from fastssl.models.image_size import check_image_size
from fastssl.models.pretrained import load_pretrained
from fastssl.models.small_convolution import use_small_convolutions
from fastssl.objectives import TotalLoss
from fastssl.recipe import Recipe, SupervisedConfig
from fastssl.training.guard import FiniteGuard
from fastssl.training.memory import check_memory
from fastssl.training.optim import make_optimizer
from fastssl.training.residence import fits_beside_training, free_memory_of_gpu, image_bytes
from fastssl.training.schedule import Schedule, image_size, image_sizes, plan
from fastssl.training.state import TrainState, epochs_of_decay
from fastssl.training.tracking import require_trackers
from fastssl.views import PairedViews

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepOutput(NamedTuple):
    """The outputs of one forward pass."""

    terms: dict[str, Tensor]  # scalars: the loss, its weighted terms and metrics, as TotalLoss returns them
    h: Tensor  # (B, D) representation of the first view, without gradient


class Network(nn.Module):
    """Model and loss in one module, so that DistributedDataParallel and torch.compile wrap both."""

    def __init__(self, model: Model, total_loss: TotalLoss, device: torch.device, precision: str):
        super().__init__()
        self.model, self.total_loss = model, total_loss
        dtype = DTYPES.get(precision)
        # The arguments of torch.autocast for the model.
        self.autocast: dict[str, Any] = {"device_type": device.type, "dtype": dtype, "enabled": dtype is not None}

    def forward(self, inputs: ModelInput) -> StepOutput:
        with torch.autocast(**self.autocast):
            views = self.model(inputs)
        # Outside of autocast: losses, KL and log-variances are computed in fp32.
        terms = self.total_loss(views, self.model.priors, inputs.step)
        return StepOutput(terms, views[0].h.detach())


class TrainingViews:
    """The augmented views of a batch, as many as the objective takes, at the size of the epoch."""

    def __init__(self, recipe: Recipe, device: torch.device, precision: str, compiled: bool):
        self.recipe, self.compiled = recipe, compiled
        # On a GPU the views are written as autocast's first convolution takes them: no cast follows.
        self.dtype = DTYPES.get(precision, torch.float32) if device.type == "cuda" else torch.float32
        self._by_size: dict[int, PairedViews] = {}

    def __call__(self, batch: Batch, epoch: int) -> tuple[Tensor, ...]:
        recipe = self.recipe
        size = image_size(recipe.views, epoch)
        if size not in self._by_size:
            self._by_size[size] = PairedViews(
                recipe.views.model_copy(update={"size": size}), recipe.seed, recipe.objective.num_views,
                dtype=self.dtype, memory_format=memory_format(recipe), compiled=self.compiled,
            )  # fmt: skip
        # A tensor, not a number: torch.compile would compile the views again for each number.
        epoch_tensor = torch.full((), epoch, device=batch.index.device)
        make_views = self._by_size[size]
        return cast(tuple[Tensor, ...], make_views(batch.image, batch.index, epoch_tensor, batch.height, batch.width))


@dataclass
class TrainingRun:
    """Everything that the training of one recipe needs."""

    recipe: Recipe
    device: torch.device
    precision: str  # train.precision without "auto": fp32, tf32, bf16 or fp16
    compiled: bool
    schedule: Schedule
    state: TrainState
    network: Network  # inside torch.compile and DistributedDataParallel, if the run has them
    no_sync: Callable[[], AbstractContextManager[None]]  # a context in which processes do not exchange gradients
    views: Callable[[Batch, int], tuple[Tensor, ...]]  # batch and epoch -> views, each (B, C, size, size)
    guard: FiniteGuard


def prepare(recipe: Recipe, device: torch.device, checkpoint: Checkpoint | None) -> tuple[TrainingRun, list[str]]:
    """Build the run, from its checkpoint if there is one. Returns it with remarks to show.

    Raises UserError for everything that the user can fix, before any training.
    """
    require_trackers(recipe)
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(recipe.train.precision, device)
    choose_convolutions(recipe, device)
    compiled = device.type == "cuda" if recipe.train.compile == "auto" else recipe.train.compile
    if checkpoint is None:  # a run that goes on has passed this, or is older than the check
        for size in image_sizes(recipe.views):
            key = "views.size" if size == recipe.views.size else "views.progressive_resize"
            check_image_size(recipe.model, size, key)
    if recipe.data.shards == "local":
        # A node without a shard ends the run on all nodes, with its sentence.
        on_all_ranks(lambda: training_file(recipe))
    loader = training_loader(recipe, device)
    check_combinations(recipe, loader)
    check_memory(recipe, device, len(loader.rows) * loader.image_bytes if loader.resident else 0)
    decay_epochs = epochs_of_decay(recipe, checkpoint)
    step = checkpoint.saved["step"] if checkpoint else 0
    schedule, remarks = plan(recipe, len(loader) // recipe.train.accumulate, decay_epochs, step)

    model, loaded = make_model(recipe, device, None if checkpoint else recipe.model.init)
    state = TrainState(
        recipe,
        model,
        make_optimizer(model, recipe.optim),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        loader,
        precision,
        skipped=torch.zeros((), dtype=torch.int64, device=device),
        decay_epochs=decay_epochs,
        average=WeightAverage(model, recipe.train.ema) if recipe.train.ema else None,
    )
    remarks += slow_precision(precision, device) + skipped_operations(recipe) + loaded + resume_state(state, checkpoint)
    if checkpoint and (before := checkpoint.recipe.train.epochs) < recipe.train.epochs:
        remarks.append(
            f"Extended from {before} to {recipe.train.epochs} epochs. Learning rate of the next step: "
            f"{schedule.rate(state.step):.4g} (optim.extend={recipe.optim.extend})."
        )

    network = Network(model, TotalLoss(recipe, schedule.beta_warmup_steps), device, precision)
    wrapped, no_sync = wrap_network(network, recipe, compiled)
    views = TrainingViews(recipe, device, precision, compiled)
    guard = FiniteGuard(model, state)
    run = TrainingRun(recipe, device, precision, compiled, schedule, state, wrapped, no_sync, views, guard)
    return run, remarks


def check_combinations(recipe: Recipe, loader: BetonLoader) -> None:
    """Raises UserError for keys that do not go together with the machine, the backbone or the data."""
    if recipe.train.cuda_graphs and world_size() > 1:
        raise UserError("train.cuda_graphs is for a single process", hint="leave out train.cuda_graphs")
    if recipe.views.progressive_resize and has_fixed_size(recipe.model.backbone):
        raise UserError(
            f"views.progressive_resize: {recipe.model.backbone} takes images of one size only",
            hint="leave out views.progressive_resize",
        )
    if isinstance(recipe.objective, SupervisedConfig):
        check_labels(loader, recipe.objective.classes)


def make_model(recipe: Recipe, device: torch.device, pretrained: str | None) -> tuple[Model, list[str]]:
    """The model in training mode with its first weights, and remarks on those that come from `pretrained`."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).to(device).to(memory_format=memory_format(recipe))
    remarks = load_pretrained(model, recipe, pretrained) if pretrained else []
    if device.type == "cpu":
        use_small_convolutions(model)
    if recipe.train.sync_bn and world_size() > 1:
        convert_batch_norms(model)
    return model.train(), remarks


def resume_state(state: TrainState, checkpoint: Checkpoint | None) -> list[str]:
    """Load the checkpoint, if there is one, in all processes. Returns warnings."""
    warnings = state.load(checkpoint) if checkpoint else []
    if broadcast_from_main(lambda: state.step) != state.step:
        raise UserError("The processes found different checkpoints", hint="let all hosts see one run directory")
    if not is_main_process():
        # Each process draws its own dropout masks. The main process's generator is part of the state.
        torch.manual_seed(state.recipe.seed + 1_000_003 * (state.step + 1) + rank())
    return warnings


def wrap_network(
    network: Network, recipe: Recipe, compiled: bool
) -> tuple[Network, Callable[[], AbstractContextManager[None]]]:
    """The network inside torch.compile and DistributedDataParallel, with DDP's `no_sync`.

    Inside of DDP, torch.compile splits the step into one graph for each of DDP's buckets of gradients, and a bucket is
    sent while the next graph runs. As one graph, all gradients would be sent after it. (The other way round it splits
    too, but DDP's own code breaks the graph five times.)
    """
    wrapped: nn.Module = network
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if compiled:
        mode = "reduce-overhead" if recipe.train.cuda_graphs else None
        wrapped = cast(nn.Module, torch.compile(network, dynamic=False, mode=mode))
    if world_size() > 1:
        with warnings.catch_warnings():
            # torch 2.15 wants the name forward_sync_buffers instead, which older ones that we allow may not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Batch norms' buffers need no broadcast: they are equal in all processes, or with sync_bn=false those of
            # the main process are saved.
            parallel = DistributedDataParallel(
                wrapped,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_size(network) if compiled and spans_hosts() else None,  # None: 25
            )
        if recipe.train.compress_gradients:
            parallel.register_comm_hook(None, bf16_compress_hook)
        wrapped, no_sync = parallel, parallel.no_sync
    return cast(Network, wrapped), no_sync


def bucket_size(network: nn.Module) -> float:
    """Megabytes (2**20) of a bucket of gradients, and so of a graph's, where they are sent over a network.

    Both views use all weights, so only the last half of the backward pass, which is that of the first view, completes
    gradients. Those of its last graph are sent after all computation: with DDP's 25 MB up to 45 % of ResNet-18's, with
    this size at most 12 % (records/gpu-budget.md). Within one host, where gradients take less than 1 ms, the time that
    the CPU needs to call more graphs would cost more. torch.compile refuses buckets below 1 MB.
    """
    gradients = sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)
    return max(1.0, min(25.0, gradients / 2**20 / 6))


def keep_freed_memory() -> None:
    """Let glibc reuse the memory that a step frees for the next step.

    By default it returns large pieces to the system, which hands out zeroed pages again: on two cores 35,000 page
    faults per step at 32 px, 130,000 at 224 px. Without them training is a tenth faster (records/profiling.md). Does
    nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Pieces above 1 GB, larger than any tensor of a step, are still returned. Older versions refuse more than 32 MB
    # here. The second call alone would make them map and unmap every tensor: 3.5 times as slow as the default.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(name: str) -> torch.device:
    """Resolve train.device. Raises UserError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device=cuda, but torch sees no GPU here", hint="run `fastssl doctor`, or set train.device=cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve train.precision, and let torch compute fp32 products in TF32 with tf32 and in full fp32 else.

    Under bf16 and fp16, the only products left in fp32 are those of the loss, which stay exact.
    """
    if precision == "auto":
        # One CPU without bf16 among those of several hosts decides for all: they must agree.
        resolved = resolve_precision(precision, device.type)
        precision = "fp32" if any_rank(resolved == "fp32") else resolved
    if precision == "tf32" and device.type != "cuda":
        raise UserError("train.precision=tf32 needs a GPU", hint="set train.precision=fp32 for a run without one")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def resolve_precision(precision: str, device_type: str) -> str:
    """train.precision on this machine without "auto": bf16 on a GPU and on a CPU that has it, fp32 on other CPUs."""
    if precision != "auto":
        return precision
    return "bf16" if device_type == "cuda" or cpu_has_bf16() else "fp32"


def slow_precision(precision: str, device: torch.device) -> list[str]:
    """A warning if another precision is faster on this CPU, where torch may have to emulate this one."""
    best = resolve_precision("auto", "cpu")
    if device.type != "cpu" or precision in ("fp32", best):
        return []
    return [f"warning: train.precision={best} is faster on this CPU, which may compute {precision} by way of fp32."]


def choose_convolutions(recipe: Recipe, device: torch.device) -> None:
    """Let cuDNN measure which of its algorithms is fastest, once for each shape, if the images keep their size."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = recipe.views.progressive_resize is None


def memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def training_file(recipe: Recipe) -> Path:
    """The .beton that data.train means. With data.shards=local: a shard on this node, which is as all others are."""
    path = beton_file(recipe.data.train, "train")
    return shard_here(path) if recipe.data.shards == "local" else path


def crop_of(recipe: Recipe) -> Literal["gpu", "cpu"]:
    """Resolve data.crop: crops are cut on the device for a canvas file, on the CPU for a file in the full layout."""
    if recipe.data.crop != "auto":
        return recipe.data.crop
    return "cpu" if read_header(training_file(recipe)).resolution is None else "gpu"


def is_resident(recipe: Recipe, device: torch.device) -> bool:
    """Resolve data.resident: whether the run keeps all of its images on the device. All ranks get the same answer."""
    if recipe.data.resident != "auto":
        return recipe.data.resident
    if device.type != "cuda" or crop_of(recipe) != "gpu" or recipe.data.shards == "local":
        return False
    data, file = recipe.data, training_file(recipe)
    set_bytes = SampleSelection(data.subset, data.limit).count(file) * image_bytes(read_header(file))
    precision = resolve_precision(recipe.train.precision, device.type)
    room = free_memory_of_gpu(device)
    return not any_rank(not fits_beside_training(recipe, DTYPES.get(precision), set_bytes, room, world_size()))


def skipped_operations(recipe: Recipe) -> list[str]:
    """A remark on the operations of the recipe that are defined for RGB only, if its images have other channels."""
    views, in_chans = recipe.views, recipe.model.in_chans
    if in_chans == RGB:
        return []
    jitter = views.jitter.p > 0
    strengths = {
        "views.jitter.saturation": views.jitter.saturation if jitter else 0,
        "views.jitter.hue": views.jitter.hue if jitter else 0,
        "views.gray": views.gray,
    }
    skipped = [key for key, strength in strengths.items() if strength > 0]
    if not skipped:
        return []
    return [f"The images have no colors (model.in_chans={in_chans}): left out of the views are {', '.join(skipped)}."]


def check_labels(loader: BetonLoader, classes: int) -> None:
    """Raises UserError if an image has no label, or one that the classifier has no output for, or all have the same."""
    counts = count_labels(loader.samples.column("label", row_B) for row_B in in_pieces(loader.rows))
    fix = "list images with labels of several classes in data.subset, or set another data.train"
    require_labels(loader.path, counts, "objective.name=supervised", fix, classes=2)
    lowest, highest = int(counts.label_C[0]), int(counts.label_C[-1])
    if highest >= classes:
        raise UserError(
            f"objective.classes={classes}, but {loader.path} holds labels from {lowest} to {highest}",
            hint=f"set objective.classes={highest + 1}",
        )


def training_loader(
    recipe: Recipe,
    device: torch.device,
    decoder_type: type[ThreadDecoder] = ThreadDecoder,
    resident: bool | None = None,
) -> BetonLoader:
    """The loader of data.train.

    Its batches are this process's micro-batches: train.batch_size over all processes and train.accumulate. resident:
    None decides by data.resident. decoder_type: the profiler gives another one.
    """
    data = recipe.data
    require_channels(training_file(recipe), recipe.model.in_chans)
    shares = world_size() * recipe.train.accumulate
    if recipe.train.batch_size % shares:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size} does not divide by {world_size()} processes x "
            f"train.accumulate={recipe.train.accumulate}",
            hint=f"set train.batch_size to a multiple of {shares}",
        )
    if recipe.train.batch_size < 2 * shares:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size} leaves one image for each of {world_size()} processes x "
            f"train.accumulate={recipe.train.accumulate}, which has no batch statistics",
            hint=f"set train.batch_size={2 * shares}",
        )
    kind = LocalShardsLoader if data.shards == "local" else BetonLoader
    loader = kind(
        beton_file(data.train, "train"),
        recipe.train.batch_size // shares,
        seed=recipe.seed,
        crop=crop_of(recipe),
        views=recipe.views,
        crops=recipe.objective.num_views,
        workers=data.workers,
        shuffle="quasi_random" if data.order == "quasi_random" else True,
        device=device,
        resident=is_resident(recipe, device) if resident is None else resident,
        gather=False,
        on_bad_sample=data.on_bad_sample,
        selection=SampleSelection(data.subset, data.limit),
    )
    loader.decoder_type = decoder_type
    if len(loader) < recipe.train.accumulate:
        raise UserError(
            f"{loader.path} gives {loader.epoch_images} images, fewer than one batch of {recipe.train.batch_size}",
            hint="lower train.batch_size or add images",
        )
    return loader
