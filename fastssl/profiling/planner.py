"""Predict a recipe's training on another machine: `fastssl profile RECIPE --plan "8xA100, 64 cores, nvme"`.

The prediction applies the cost model of bottleneck.py to a profile measured here; nothing is measured on that machine.
The constants below are assumptions, and `TrainingPlan.assumptions` lists them for the reader of the prediction.
"""

import difflib
import math
import re
from dataclasses import dataclass, replace

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastssl.common.errors import UserError, quote
from fastssl.common.terminal import count_of, time_in_words
from fastssl.loading.decoding import SMALL_BATCH
from fastssl.profiling.bottleneck import RESOURCES, Cost, CostModel, Setup, describe_bottleneck, suggest_fixes
from fastssl.profiling.peaks import (
    DEVICES,
    LINK_SHARE,
    STORAGE,
    STORAGE_NAMES,
    Device,
    StorageKind,
    find_device,
    slower_variants,
)
from fastssl.profiling.profile import Profile, StageResult, short_remarks
from fastssl.profiling.wording import RESOURCE_NAMES, STAGE_NAMES, capitalized, percent, rounded, si
from fastssl.recipe import Recipe
from fastssl.training.residence import fits_beside_training
from fastssl.training.setup import DTYPES, resolve_precision
from fastssl.training.state import changed_keys

# ResNet-50 v1.5 trained on one GPU, images/s by precision: NVIDIA/DeepLearningExamples, PyTorch/Classification/
# ConvNets/resnet50v1.5/README.md, "Training performance" (A100 80 GB, V100 16 GB). An image takes torchvision's 4.09 G
# multiplications and additions forward, twice that backward: in total 19 % of an A100's bf16 peak.
REFERENCE = {"bf16": ("a100", 2470), "fp16": ("a100", 2470), "tf32": ("a100", 938), "fp32": ("v100", 367)}
REFERENCE_FLOPS = 3 * 2 * 4.09e9
# The share of a step's time that scales with the memory bandwidth, such as normalization; the rest scales with the
# peak. ResNet-50 is 2.06x as fast on an A100 as on a V100 (the README above): this share gives 2.4, the peaks alone
# 2.5. On an H100 it is 1.85x as fast as on an A100 (MLPerf Training 3.0, https://silvertonconsulting.com/2023/07/12/
# mlperf-results-show-h100-v-a100-and-v-habana-gaudi2-gpus/): this share gives 2.2, the peaks alone 3.2.
BANDWIDTH_BOUND = 0.5
# How often views move their bytes, counted in Triton's kernels (records/gpu-budget.md), at an assumed share of the
# bandwidth.
VIEW_PASSES, VIEW_SHARE = 2.5, 0.5
BACKWARD = 2 / 3  # of a step: gradients are exchanged while it runs
MEMORY_PER_CORE = 4e9  # bytes of the host, assumed if --plan does not give the memory
# Keys that a plan reads. Others change nothing that is predicted, or what they change was measured.
PLANNED_KEYS = ("train.epochs", "train.compress_gradients", "data.resident", "data.order", "data.shards")
PLANNED_FROM_CPU = ("train.precision", "train.batch_size")  # an image takes as many FLOPs with any of them
WITHOUT_EFFECT = ("name", "seed", "run", "log", "probe", "checkpoint")
CONTEXT = 1e9  # bytes that CUDA itself takes of a GPU
READ_AROUND = 128e3  # bytes that Linux reads around a page of a mapped file that is not in memory (read_ahead_kb)
LARGE_PIECE = 8e6  # bytes that data.order=quasi_random reads at a time
MULTIPLES = {"": 1, "k": 1e3, "t": 1e3, "m": 1e6, "b": 1e9}  # of a number of images: k or thousand, and so on
EXAMPLE = '--plan "8xA100, 64 cores, nvme"'
STORAGE_HINT = f"storage is {', '.join(STORAGE)}, or with its speed, such as nfs 200 MB/s"


@dataclass(frozen=True)
class PlannedMachine:
    gpus: int
    device: Device
    cores: int
    storage: str  # a key of STORAGE
    memory: float | None = None  # bytes of the host
    images: int | None = None  # of the training set; None: those of the profile
    storage_speed: float | None = None  # bytes per second; None: what STORAGE assumes

    @property
    def drive(self) -> StorageKind:
        """What the storage reaches."""
        kind = STORAGE[self.storage]
        if self.storage_speed is None:
            return kind
        return kind._replace(bytes_per_second=self.storage_speed, source="as given; reads/s are assumed")

    def __str__(self) -> str:
        memory = f", {si(self.memory, 'B')}" if self.memory else ""
        speed = f" {si(self.storage_speed, 'B/s')}" if self.storage_speed else ""
        images = "" if self.images is None else f", {self.images:,} images"
        return f"{self.gpus}x {self.device.name}, {self.cores} cores, {self.storage}{speed}{memory}{images}"


@dataclass(frozen=True)
class TrainingPlan:
    """The prediction for one machine."""

    recipe: str
    views: str  # their number and size, and the batch size
    machine: str
    images_per_second: float  # from the second epoch on
    epochs: int
    hours: float
    first_epoch_hours: float  # its images come from the disk
    bottleneck: str
    sentence: str
    advice: str
    gpu_utilization: float
    cores_needed: int  # per GPU, so that they are not the bottleneck
    resource_rates: dict[str, float]  # images per second that each resource could carry
    assumptions: list[str]


PATTERNS = {  # of the parts of a machine's description, in lower case
    "cores": r"(\d+) *(?:v?cpus?|(?:cpu )?cores?|threads?)",
    "memory": r"(\d+(?:\.\d+)?) *([gt])i?b(?: (?:of )?(?:ram|memory))?",
    "storage": f"({'|'.join(STORAGE_NAMES)})(?: +(\\d+(?:\\.\\d+)?) *([mg])b/s)?",
    "images": r"(\d{1,12}(?:\.\d+)?) *(k|m|b|thousand|million|billion|) *images",
    "GPUs": r"(?:(\d+)(?: *[x×*] *| +))?(.*)",
}
# These are not in the name of a GPU: a comma is missing, or a number is in words.
SEVERAL_PARTS = "|".join([*(PATTERNS[kind] for kind in ("cores", "storage", "images")), "with", "and"])
NUMBERS = "two|three|four|five|six|seven|eight|ten|twelve|sixteen"


def parse_machine(text: str) -> PlannedMachine:
    """Parse the description of a machine, its parts in any order. The default storage is nvme.

    Raises UserError for a part that is unknown or missing.
    """
    found: dict[str, re.Match[str]] = {}
    for part in filter(None, (part.strip() for part in text.lower().split(","))):
        kind, match = next((k, m) for k, pattern in PATTERNS.items() if (m := re.fullmatch(pattern, part)))
        if kind == "GPUs" and re.search(rf"\b({SEVERAL_PARTS}|{NUMBERS})\b", part):
            hint = f"separate the parts by commas and write numbers in digits, as in {EXAMPLE}; {STORAGE_HINT}"
            raise UserError(f"--plan: {quote(part)} could not be read as one part", hint=hint)
        if kind == "GPUs" and not find_device(match[2]):
            raise _unknown_part(part, match[2])
        if kind in found:
            raise UserError(f"--plan names the {kind} twice", hint=f"describe one machine, such as {EXAMPLE}")
        found[kind] = match
    for kind in ("GPUs", "cores"):
        if kind not in found:
            raise UserError(f"--plan does not name the {kind} of the machine", hint=f"write it like {EXAMPLE}")
    device, gpus, cores = find_device(found["GPUs"][2]), int(found["GPUs"][1] or 1), int(found["cores"][1])
    assert device
    if not 1 <= gpus <= cores:
        raise UserError(
            f"--plan has {gpus} GPUs and {cores} cores, and each GPU needs a core", hint=f"write it like {EXAMPLE}"
        )
    storage = "nvme"
    storage_speed = None
    if "storage" in found:
        name, speed, unit = found["storage"].groups()
        storage = STORAGE_NAMES[name]
        storage_speed = float(speed) * {"m": 1e6, "g": 1e9}[unit] if speed else None
    memory = float(found["memory"][1]) * {"g": 1e9, "t": 1e12}[found["memory"][2]] if "memory" in found else None
    images = None
    if "images" in found:
        images = round(float(found["images"][1]) * MULTIPLES[found["images"][2][:1]])
    return PlannedMachine(gpus, device, cores, storage, memory, images, storage_speed)


def _unknown_part(part: str, name: str) -> UserError:
    """Return the error about a part of the description that is no known GPU, with the nearest known name."""
    if "cpu" in name.split():
        problem = f"--plan {part}: a plan is for GPUs, and a CPU can be measured"
        return UserError(problem, hint=f"name a GPU, as in {EXAMPLE}")
    names = [*(device.name.lower() for device in DEVICES.values()), *DEVICES, *STORAGE_NAMES, "cores", "gb", "images"]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"GPUs are {', '.join(d.name for d in DEVICES.values())}; {STORAGE_HINT}"
    if near:
        hint = f"did you mean {part.removesuffix(name)}{near[0]}?"
    return UserError(f"--plan: {quote(part)} is not a GPU, a storage, or a number of cores, GB or images", hint=hint)


def check_batch_size(machine: PlannedMachine, batch_size: int, accumulate: int) -> None:
    """Raise UserError if the GPUs cannot share a batch equally."""
    multiple = machine.gpus * accumulate
    if batch_size % multiple:
        shares = f"{machine.gpus} GPUs x train.accumulate={accumulate}"
        raise UserError(
            f"train.batch_size={batch_size} does not divide by {shares}",
            hint=f"set train.batch_size to a multiple of {multiple}",
        )


def check_planned_recipe(profile: Profile, measured: Recipe, recipe: Recipe) -> None:
    """Raise UserError if `recipe` differs from the measured one in a key that a plan does not read."""
    planned = PLANNED_KEYS if profile.machine.kind == "cuda" else (*PLANNED_KEYS, *PLANNED_FROM_CPU)
    before, after = (each.model_dump(mode="json") for each in (measured, recipe))
    if changed := changed_keys(before, after, free=(*planned, *WITHOUT_EFFECT)):
        raise UserError(
            f"The profile was measured with another {changed[0]}",
            hint=f"profile the recipe with it; a plan can change {', '.join(planned)}",
        )


def plan_training(profile: Profile, recipe: Recipe, machine: PlannedMachine) -> TrainingPlan:
    """Predict training on a machine. Raises UserError if the recipe cannot run there or the profile lacks a step."""
    remarks = short_remarks(profile)
    assumptions = [f"What was measured is taken as it is, though the profile notes: {remarks}"] if remarks else []
    batch_size = profile.run.batch_size if profile.machine.kind == "cuda" else recipe.train.batch_size
    if batch_size != profile.run.batch_size:
        was = f"the profiled one of {profile.run.batch_size:,}"
        assumptions.append(f"An image takes as long in a batch of {batch_size:,} images as in {was}.")
    check_batch_size(machine, batch_size, recipe.train.accumulate)
    if any(override.startswith("views.size=") for override in profile.overrides):
        assumptions.append(
            f"The views have {profile.run.size} px, as the command line of the profile set views.size. Another size "
            "has another speed, and may have another bottleneck."
        )
    if slower := slower_variants(machine.device):
        assumptions.append(f"The GPU is {machine.device.name}; slower ones to name in --plan: {', '.join(slower)}.")
    if machine.images is not None:
        assumptions.append(f"The {machine.images:,} images are like the {profile.data.images:,} profiled ones.")
    else:
        assumptions.append(f"The set has the {profile.data.images:,} profiled images; for more, add `, 1.3M images`.")
    if machine.images is not None or batch_size != profile.run.batch_size:
        images = profile.data.images if machine.images is None else machine.images
        profile = _with_images(profile, images, batch_size)
    stages = _device_costs(profile, recipe, machine, assumptions)
    costs = CostModel(stages, machine.cores // machine.gpus, processes=machine.gpus)
    first_epoch, resident = costs, recipe.data.resident
    set_bytes = int(profile.data.images * profile.data.decoded_bytes)
    if resident == "auto":
        room = int(machine.device.memory - CONTEXT)
        dtype = DTYPES.get(_precisions(profile, recipe, machine.device)[1])
        resident = profile.data.crop == "gpu" and recipe.data.shards == "shared"
        resident = resident and fits_beside_training(recipe, dtype, set_bytes, room, machine.gpus)
    if resident:
        held = f"{si(set_bytes, 'B')} of {si(machine.device.memory, 'B')}"
        once = f"{time_in_words(profile.data.file_bytes / machine.drive.bytes_per_second)} from {machine.storage}"
        assumptions.append(
            f"All images stay on each GPU (data.resident), {held}: loading them once ({once}) is not counted."
        )
    else:
        costs, first_epoch = _with_loading(costs, profile, recipe, machine, assumptions)
    _, precision = _precisions(profile, recipe, machine.device)
    compiled = recipe.train.compile is not False
    setup = Setup(
        costs.cores, profile.data.layout, profile.data.storage, on_gpu=True, compiled=compiled, precision=precision,
        fits_into_memory=False,
    )  # fmt: skip
    seconds, rate = costs.resource_seconds(), costs.images_per_second()
    slowest = max(busy for name, busy in seconds.items() if name not in ("threads", "cores"))
    images = profile.data.batches_per_epoch * profile.run.batch_size
    first_seconds = images / first_epoch.images_per_second()
    return TrainingPlan(
        recipe=recipe.name, views=_views(profile), machine=str(machine),
        images_per_second=rate, epochs=recipe.train.epochs,
        hours=(first_seconds + images * (recipe.train.epochs - 1) / rate) / 3600,
        first_epoch_hours=first_seconds / 3600,
        bottleneck=costs.bottleneck(), sentence=describe_bottleneck(costs, setup, show=rounded),
        advice=suggest_fixes(costs, setup),
        gpu_utilization=(stages["views"].seconds + stages["step"].seconds) * rate / machine.gpus,
        cores_needed=max(1, math.ceil(costs.cpu_seconds() / slowest)),
        resource_rates={name: machine.gpus / busy for name, busy in seconds.items() if busy}, assumptions=assumptions,
    )  # fmt: skip


def _views(profile: Profile) -> str:
    """Return what the plan's images per second depend on most."""
    run = profile.run
    return f"{count_of(run.views, 'view')} of {run.size} px, batch size {run.batch_size:,}"


def _with_images(profile: Profile, images: int, batch_size: int) -> Profile:
    """Return the profile of a set with so many images like those that were profiled, in batches of this size."""
    if images < batch_size:
        raise UserError(
            f"--plan: {images:,} images are fewer than a batch of {batch_size:,}",
            hint="name more images, or lower train.batch_size",
        )
    file_bytes = profile.data.file_bytes * images / profile.data.images
    batches = images // batch_size
    data = profile.data.model_copy(update=dict(images=images, file_bytes=file_bytes, batches_per_epoch=batches))
    run = profile.run.model_copy(update=dict(batch_size=batch_size))
    return profile.model_copy(update={"data": data, "run": run})


def _device_costs(profile: Profile, recipe: Recipe, machine: PlannedMachine, assumptions: list[str]) -> dict[str, Cost]:
    """Return views, step, communication and launch of one process."""
    run, there, stages = profile.run, machine.device, profile.stages
    on_gpu, processes = profile.machine.kind == "cuda", profile.machine.processes
    here = find_device(profile.machine.device) if on_gpu else None
    step = _step_seconds(profile, recipe, here, there, assumptions)
    views = stages.views.busy_seconds or _seconds(stages.views, processes)
    if here and views:
        views *= here.bandwidth / there.bandwidth
        assumptions.append(f"The views are what was measured on {here.name}, scaled with the memory bandwidth.")
    else:
        views = VIEW_PASSES * (stages.views.bytes_per_image or 0) / (VIEW_SHARE * there.bandwidth)
        assumptions.append(f"Views move their bytes {VIEW_PASSES} times at {percent(VIEW_SHARE)} of the bandwidth.")
    costs = {"views": Cost(views), "step": Cost(step)}
    if machine.gpus > 1:
        # Around a ring, every GPU sends all gradients but one GPU's share, twice.
        link, images = LINK_SHARE * there.interconnect, run.batch_size / machine.gpus
        gradient_bytes = run.parameters * (2 if recipe.train.compress_gradients else 4)
        exchange = gradient_bytes * 2 * (machine.gpus - 1) / machine.gpus / link
        hidden = BACKWARD * step * images / recipe.train.accumulate
        costs["communication"] = Cost(max(0, exchange - hidden) / images)
        assumptions.append(f"Gradients are exchanged at {si(link, 'B/s')} during the backward pass, 2/3 of the step.")
    if on_gpu and (launch := _seconds(stages.launch, processes)):
        launch *= machine.gpus / processes  # launching takes as long for a smaller batch
        costs["launch"] = Cost(launch, launch)
    else:
        assumptions.append("Launching kernels takes no time: small batches and few cores may be slower.")
    return costs


def _precisions(profile: Profile, recipe: Recipe, there: Device) -> tuple[str, str]:
    """Return the recipe's precision on a GPU, and the one that is used if the planned GPU lacks it."""
    wanted = profile.run.precision
    if profile.machine.kind != "cuda":
        wanted = resolve_precision(recipe.train.precision, "cuda")
    return wanted, wanted if there.peak(wanted) else {"bf16": "fp16", "tf32": "fp32"}[wanted]


def _step_seconds(
    profile: Profile, recipe: Recipe, here: Device | None, there: Device, assumptions: list[str]
) -> float:
    """Return the seconds of the step per image, without the exchange of gradients."""
    wanted, precision = _precisions(profile, recipe, there)
    if precision != wanted:
        assumptions.append(f"{there.name} has no {wanted}: set train.precision={precision} there, as is assumed here.")
    result, processes = profile.stages.step, profile.machine.processes
    # While launching is slow, the device idles between kernels.
    seconds = result.busy_seconds
    if not seconds and (whole := _seconds(result, processes)):
        seconds = whole - (_seconds(profile.stages.communication, processes) or 0.0)
    if here and here.peak(wanted) and seconds:
        seconds *= _slowdown(here, wanted, there, precision)
        basis = f"The step is what was measured on {here.name}"
    elif result.flops:
        words, reference_rate = REFERENCE[precision]
        reference = DEVICES[words]
        seconds = result.flops / (reference_rate * REFERENCE_FLOPS) * _slowdown(reference, precision, there, precision)
        share = percent(result.flops / seconds / (there.peak(precision) or math.inf))
        source = f"ResNet-50's {reference_rate:,} images/s on {reference.name} (NVIDIA/DeepLearningExamples)"
        basis = f"The step reaches {share} of the {precision} peak, from {source}"
    else:
        raise UserError("The profile lacks the step's FLOPs, which a plan needs", hint="profile the recipe again")
    assumptions.append(f"{basis}, scaled half with the peak, half with the memory bandwidth.")
    return seconds


def _with_loading(
    costs: CostModel, profile: Profile, recipe: Recipe, machine: PlannedMachine, assumptions: list[str]
) -> tuple[CostModel, CostModel]:
    """Add the stages in front of the device. Returns the costs from the second epoch on and in the first one."""
    data, stages, cores = profile.data, dict(costs.stages), costs.cores
    assumptions.append("The cores are as fast as here, and all of them decode (data.workers=null).")
    batch_size = profile.run.batch_size // (machine.gpus * recipe.train.accumulate)
    in_reader = data.image_bytes >= data.decoded_bytes and batch_size * data.decoded_bytes <= SMALL_BATCH
    images = "copy_images" if profile.stages.copy_images.rate else "decode"
    for name in (images, "cpu_augment"):
        stage = profile.stages.by_name()[name]
        if stage.cpu_seconds:
            seconds = stage.cpu_seconds.median
            stages[name] = Cost(seconds if in_reader else seconds / cores, seconds)
        elif name == images or data.crop == "cpu":
            left_out = capitalized(STAGE_NAMES[name])
            assumptions.append(f"{left_out} is left out, as it was not measured: {stage.reason.rstrip('.')}.")
    transfer = profile.stages.transfer
    bus = data.decoded_bytes / (LINK_SHARE * machine.device.pcie)
    measured = _seconds(transfer, profile.machine.processes) or 0.0
    stages["transfer"] = Cost(max(measured, bus), transfer.cpu_seconds.median if transfer.cpu_seconds else 0.0)

    read_bytes = min(data.file_bytes, data.images * data.image_bytes)  # per epoch
    memory = machine.memory or MEMORY_PER_CORE * machine.cores
    from_disk = max(0, 1 - memory / read_bytes)
    default = "" if machine.memory else f" ({si(MEMORY_PER_CORE, 'B')} per core, as none is given)"
    held = f"hold {percent(1 - from_disk)} of {si(read_bytes, 'B')}"
    assumptions.append(f"After the first epoch, {si(memory, 'B')} of memory{default} {held}.")
    kind = machine.drive
    rates = f"{si(kind.bytes_per_second, 'B/s')}, {kind.reads_per_second:,.0f} reads/s"
    assumptions.append(f"All GPUs share {machine.storage}: {rates} ({kind.source}).")
    piece = LARGE_PIECE if recipe.data.order == "quasi_random" else max(READ_AROUND, data.image_bytes)
    disk = machine.gpus * kind.seconds(data.image_bytes, piece)
    first_epoch = replace(costs, stages=stages | {"storage": Cost(disk)}, decodes_in_reader=in_reader)
    return replace(first_epoch, stages=stages | {"storage": Cost(disk * from_disk)}), first_epoch


def _seconds(stage: StageResult, processes: int) -> float | None:
    """Return the seconds that an image took a process; rates are those of all processes."""
    return processes / stage.rate if stage.rate else None


def _slowdown(here: Device, wanted: str, there: Device, precision: str) -> float:
    """Return how many times as long a step takes there."""
    peaks = (here.peak(wanted) or 0) / (there.peak(precision) or math.inf)
    return (1 - BANDWIDTH_BOUND) * peaks + BANDWIDTH_BOUND * here.bandwidth / there.bandwidth


def plan_table(plan: TrainingPlan) -> Group:
    """Return the plan for a terminal; text is wrapped, never cut."""
    at_most = "" if "main_thread" in plan.resource_rates else " at most, as kernel launching is not counted"
    time = f"{time_in_words(3600 * plan.hours)} for {count_of(plan.epochs, 'epoch')}, without evaluation"
    if plan.first_epoch_hours > 2 * plan.hours / (plan.epochs + 1):
        first = time_in_words(3600 * plan.first_epoch_hours)
        time += f"; {first} of it for the first, whose images come from the disk"
    lines = {
        "training speed": f"{rounded(plan.images_per_second)} images/s{at_most}",
        "training time": time,
        "GPU busy": f"{percent(plan.gpu_utilization)} of the time",
        "CPU cores needed": f"{plan.cores_needed} per GPU, so that they are not the bottleneck",
    }
    for resource, rate in plan.resource_rates.items():
        stages = ", ".join(STAGE_NAMES[stage] for stage in RESOURCES.get(resource, ())) or "CPU time of all stages"
        if resource == "disk":
            stages += ", after the first epoch"
        lines[f"limit of the {RESOURCE_NAMES[resource]}"] = f"{rounded(rate)} images/s ({stages})"
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim", min_width=16)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    verdict = Text(plan.sentence, style="bold")
    if plan.advice:
        verdict.append("\n" + plan.advice, style="not bold")
    return Group(
        Text(f"PREDICTION, not a measurement: {plan.recipe} ({plan.views}) on {plan.machine}", style="bold"),
        verdict,
        table,
        Text("Assumptions", style="bold"),
        *(Text(f"- {assumption}") for assumption in plan.assumptions),
    )
