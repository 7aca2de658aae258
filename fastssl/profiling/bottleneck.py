"""Which stage is the bottleneck of training, what a faster one would give, and what helps, in plain sentences.

Pure arithmetic on the costs of the stages; nothing is measured here. Stages that use different resources overlap, and
the slowest resource sets the pace. Stages on the same resource add up:

    disk         storage                          images that are not in the page cache
    threads      storage + decode + copy_images + cpu_augment
                                                  the loader's threads, which also wait for the disk
    reader       transfer                         the loader's reader: assembles batches, starts their copies
    device       views + step + communication     the GPU; without one, the main thread and torch's threads
    main_thread  launch                           the main thread of a run on a GPU
    cores        CPU-seconds of all stages / number of cores, shared by all of the above
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastssl.beton import read_header
from fastssl.common.distributed import world_size
from fastssl.common.system import available_cores, free_memory
from fastssl.loading.decoding import COPY_IMAGES, DECODE
from fastssl.loading.spans import Total
from fastssl.profiling.wording import capitalized, in_sentence, percent, significant
from fastssl.training.meters import DataWaitWarning, MeterReading
from fastssl.training.setup import TrainingRun, resolve_precision

RESOURCES = {
    "disk": ("storage",),
    "threads": ("storage", "decode", "copy_images", "cpu_augment"),
    "reader": ("transfer",),
    "device": ("views", "step", "communication"),
    "main_thread": ("launch",),
}
LOADER_STAGES = ("storage", "decode", "copy_images", "cpu_augment", "transfer")
CANVAS = "a canvas file instead of the full one (build-beton --codec bc4)"
BLOCKS = "a canvas file in blocks, which need no decoding (build-beton --codec bc4)"
BALANCED = 1.1  # a bottleneck is named if training without it would be at least this many times as fast
ALL_BUSY = 0.95  # the cores are the shortage if they are busy for this share of the slowest resource's time
WORTH_SAYING = 0.05  # share of the cores' time
DOUBLES = 1.95  # speedup from which on throughput doubles, in words


class Cost(NamedTuple):
    """What a stage takes for one image."""

    seconds: float  # with the run's number of threads, when nothing else runs
    cpu_seconds: float = 0.0  # over all its threads


@dataclass(frozen=True)
class CostModel:
    """The costs of the stages of one process. A stage without an entry costs nothing."""

    stages: dict[str, Cost]
    cores: int  # of this process
    decodes_in_reader: bool = False  # batches of small raw images: waking a thread would take longer
    processes: int = 1

    def stages_by_resource(self) -> dict[str, tuple[str, ...]]:
        """Return the stages with a cost that use each resource."""
        resources = dict(RESOURCES)
        if self.decodes_in_reader:
            resources |= {"threads": (), "reader": RESOURCES["threads"] + RESOURCES["reader"]}
        known = {name: tuple(stage for stage in users if stage in self.stages) for name, users in resources.items()}
        return known | {"cores": tuple(self.stages)}

    def resource_seconds(self) -> dict[str, float]:
        """Return how long each resource is busy with one image."""
        users = self.stages_by_resource().items()
        seconds = {name: sum(self.stages[stage].seconds for stage in stages) for name, stages in users}
        return seconds | {"cores": self.cpu_seconds() / self.cores}

    def cpu_seconds(self) -> float:
        return sum(cost.cpu_seconds for cost in self.stages.values())

    def seconds(self) -> float:
        """Return how long an image takes in training: the slowest resource sets the pace."""
        return max(self.resource_seconds().values())

    def images_per_second(self) -> float:
        """Return the rate of all processes together."""
        seconds = self.seconds()
        return self.processes / seconds if seconds > 0 else math.inf

    def bottleneck(self) -> str:
        """Return the stage with the largest part of the slowest resource. At least one stage must cost something."""
        seconds = self.resource_seconds()
        # Reversed, so that "threads" comes before "disk" where the threads only wait for the disk.
        resource = max(reversed(seconds), key=lambda name: seconds[name])
        if resource == "cores":
            return max(self.stages, key=lambda stage: self.stages[stage].cpu_seconds)
        return max(self.stages_by_resource()[resource], key=lambda stage: self.stages[stage].seconds)

    def with_speedup(self, stage: str, factor: float) -> "CostModel":
        """Return the model with one stage `factor` times as fast; with math.inf it costs nothing."""
        seconds, cpu_seconds = self.stages[stage]
        return replace(self, stages={**self.stages, stage: Cost(seconds / factor, cpu_seconds / factor)})

    def speedup(self, stage: str, factor: float) -> float:
        """Return the speedup of training if that stage were `factor` times as fast."""
        return self.with_speedup(stage, factor).images_per_second() / self.images_per_second()

    def is_balanced(self) -> bool:
        """Whether no single stage is worth fixing."""
        return self.speedup(self.bottleneck(), math.inf) < BALANCED


@dataclass(frozen=True)
class Setup:
    """What determines which fixes are possible."""

    workers: int
    layout: str  # of the file: "canvas" or "full"
    storage: str  # of its images: "raw", "jpg", "bc4" or "mixed"
    on_gpu: bool = False
    compiled: bool = False
    cuda_graphs: bool | None = False  # None: not possible, with several processes or micro-batches
    precision: str = "fp32"
    best_precision: str = "bf16"  # the fastest one that trains as fp32 does
    fits_into_memory: bool = True
    phases: dict[str, float] = field(default_factory=dict)  # of the step, seconds per image
    crops_on_cpu: bool = False  # data.crop

    def longest_phase(self) -> str | None:
        return max(self.phases, key=lambda name: self.phases[name], default=None)


def describe_bottleneck(
    costs: CostModel, setup: Setup, seconds: float | None = None, show: Callable[[float], str] = significant
) -> str:
    """Return the verdict in two sentences: the bottleneck, then what halving its cost would give and what comes next.

    Args:
        seconds: what an image takes in training, of which all shares are: this, or more if the costs predict more.
        show: how images per second are written.
    """
    stage = costs.bottleneck()
    without = costs.with_speedup(stage, math.inf)
    next_rate = without.images_per_second()
    if costs.is_balanced():
        rate, most = costs.images_per_second(), costs.speedup(stage, math.inf)
        return (
            f"No single stage is the bottleneck: {in_sentence(stage)} limits training to {show(rate)} images/s, "
            f"and {in_sentence(without.bottleneck())} to {show(next_rate)}. "
            f"A single faster stage would make training at most {most:.2f}x as fast."
        )
    next_limit = "no other limit is known"
    if next_rate < math.inf:
        next_limit = f"the next limit is {in_sentence(without.bottleneck())} at {show(next_rate)} images/s"
    # Of what was measured, which may be more than the costs predict.
    seconds = max(seconds or 0.0, costs.seconds())
    speedup = training_speedup(costs.seconds(), costs.with_speedup(stage, 2).seconds(), seconds)
    gain = "double throughput" if speedup >= DOUBLES else f"make training {speedup:.2f}x as fast"
    where, its_cost = _where_the_time_goes(stage, costs, setup, seconds)
    return f"{where}. Halving {its_cost} would {gain}; {next_limit}."


def training_speedup(before: float, after: float, seconds: float) -> float:
    """Return the speedup of training that takes `seconds` for an image, of which `before` becomes `after`."""
    return seconds / (seconds - before + after)


def _where_the_time_goes(stage: str, costs: CostModel, setup: Setup, seconds: float) -> tuple[str, str]:
    """Return the first sentence, without its period, and how the second one calls the cost of the stage."""
    busy = costs.resource_seconds()
    if busy["cores"] > ALL_BUSY * max(busy.values()):
        of_all_cores = costs.cores * seconds
        shares = sorted(((cost.cpu_seconds / of_all_cores, name) for name, cost in costs.stages.items()), reverse=True)
        large = [(share, in_sentence(name)) for share, name in shares if share >= WORTH_SAYING]
        if len(large) > 1:
            (first, name), *others = large
            rest = ", ".join(f"{other} {percent(share)}" for share, other in others)
            verdict = f"The CPU cores are the bottleneck: {name} takes {percent(first)} of their time, {rest}"
            return verdict, f"the cost of {name}"
    of_the_time = f"{percent(min(1.0, costs.stages[stage].seconds / seconds))} of the time"
    idle = 1 - busy["device"] / seconds
    if setup.on_gpu and stage in (*LOADER_STAGES, "launch") and idle >= WORTH_SAYING:
        of_the_time += f"; the GPU is idle for {percent(idle)}"
    return f"{capitalized(in_sentence(stage))} is the bottleneck ({of_the_time})", "its cost"


def suggest_fixes(costs: CostModel, setup: Setup, seconds: float | None = None) -> str:
    """Return one sentence that says what would make the bottleneck faster; for a balanced run, an empty text.

    seconds: as for describe_bottleneck.
    """
    stage = costs.bottleneck()
    if costs.is_balanced():
        return ""
    if stage == "storage" and setup.fits_into_memory:
        return "It ends with the first epoch, as the file fits into memory."
    if stage == "step":
        options = _fixes_of_step(costs, setup)
    elif stage in ("decode", "copy_images", "cpu_augment"):
        options = _fixes_of_decoding(stage, costs, setup)
    elif stage == "storage":
        options = ["data.order=quasi_random", "a smaller --canvas or --max-side", "more memory", "a faster disk"]
    elif stage == "transfer":
        options = ["a larger train.batch_size", *(["a smaller canvas"] if setup.on_gpu else [])]
    elif stage == "views":
        first = "train.compile=true" if setup.on_gpu and not setup.compiled else "a lower views.first.blur"
        options = [first, "fewer operations in views"]
    elif stage == "launch":
        options = ["a larger train.batch_size"]
        if not setup.compiled:
            options.append("train.compile=true")
        elif setup.cuda_graphs is False:
            options.append("train.cuda_graphs=true")
    else:
        options = ["train.compress_gradients=true", "a larger train.batch_size"]
    longest = setup.longest_phase()
    detail = ""
    if stage == "step" and longest:
        share = setup.phases[longest] / (seconds or costs.seconds())
        detail = f" The longest part of the step is {in_sentence(longest)} ({percent(share)} of the time)."
    *most, last = options
    return f"What helps: {', '.join(most)}{' or ' if most else ''}{last}.{detail}"


def _fixes_of_step(costs: CostModel, setup: Setup) -> list[str]:
    if not setup.on_gpu:
        options = []
        if "decode" in costs.stages and setup.layout == "full" and costs.speedup("decode", 2) > 1.05:
            options.append(CANVAS)
        if setup.precision != setup.best_precision:
            options.append(f"train.precision={setup.best_precision}")
        return [*options, "a GPU"]
    if setup.precision in ("fp32", "tf32"):
        return ["train.precision=bf16"]
    if not setup.compiled:
        return ["train.compile=true"]
    if setup.longest_phase() in ("draws", "objective", "kl"):
        return ["fewer embedding.samples", "a narrower model.projector"]
    return ["a smaller views.size", "a smaller backbone", "more GPUs"]


def _fixes_of_decoding(stage: str, costs: CostModel, setup: Setup) -> list[str]:
    """Return the threads or cores that would move the bottleneck elsewhere, and the file that loads faster."""
    seconds = costs.resource_seconds()
    without = costs.with_speedup(stage, math.inf).resource_seconds()
    # Seconds per image of the next limit, which more cores would not move.
    target = max(1e-12, without["device"], without["reader"], without["disk"], without["main_thread"])
    # Threads that wait for the disk need no core.
    waiting = costs.stages["storage"].seconds if "storage" in costs.stages else 0.0
    threads = seconds["reader" if costs.decodes_in_reader else "threads"] - waiting
    workers = math.ceil(setup.workers * threads / target)
    cores = math.ceil(costs.cpu_seconds() / target)
    needed = cores if costs.decodes_in_reader else max(cores, workers)  # the reader is one thread
    options = []
    if not costs.decodes_in_reader and setup.workers < workers <= costs.cores and seconds["cores"] < threads:
        options.append(f"data.workers={workers}")
    elif needed > costs.cores:
        more = costs.processes * (needed - costs.cores)
        options.append(f"{more} more CPU core{'s' if more > 1 else ''}")
    if costs.decodes_in_reader and costs.cores > 1:
        options.append("a larger train.batch_size, which threads would load")
    if setup.layout == "full":
        return [*options, CANVAS]
    if setup.crops_on_cpu:
        return [*options, "data.crop=gpu"]
    return [*options, BLOCKS if stage == "decode" and setup.storage == "jpg" else "a smaller --canvas"]


def setup_of(run: TrainingRun, layout: str, phases: dict[str, float]) -> Setup:
    """Return the setup of a training run on this machine."""
    loader, train = run.state.loader, run.recipe.train
    cuda_graphs = train.cuda_graphs if world_size() == 1 and train.accumulate == 1 else None
    fits_into_memory = sum(part.size for part in loader.samples.parts) <= free_memory()
    on_gpu = run.device.type == "cuda"
    storage = "jpg" if loader.samples.storage == "mixed" else loader.samples.storage
    return Setup(
        loader.workers,
        layout,
        storage,
        on_gpu,
        run.compiled,
        cuda_graphs,
        run.precision,
        resolve_precision("auto", run.device.type),
        fits_into_memory,
        phases,
        crops_on_cpu=loader.crop == "cpu",
    )


def explain_data_wait(run: TrainingRun, reading: MeterReading) -> str:
    """Return the sentences for a training run that waits for data, from the reading of its meter."""
    if reading.waited < DataWaitWarning.SHARE * reading.seconds:
        return "Another process waits longer than this one: `torchrun ... -m fastssl profile` says why."
    loader = run.state.loader

    def per_image(*spans: str, threads: int = 1) -> Cost:
        totals = [reading.spans.get(name, Total()) for name in spans]
        seconds, cpu_seconds = sum(t.seconds for t in totals), sum(t.cpu_seconds for t in totals)
        return Cost(seconds / threads / reading.images, cpu_seconds / reading.images)

    stage, name = ("copy_images", COPY_IMAGES) if loader.only_copies else ("decode", DECODE)
    images, reader = per_image(name, threads=loader.workers), per_image("start", "copy")
    if loader.decodes_in_reader:  # it is then a part of "start"
        images = per_image(name)
        reader = Cost(reader.seconds - images.seconds, reader.cpu_seconds - images.cpu_seconds)
    step = Cost((reading.seconds - reading.waited) / reading.images)
    stages = {stage: images, "transfer": reader, "step": step}
    # Threads that sleep for most of the time are blocked by the disk, unless all cores are busy.
    blocked = images.seconds - images.cpu_seconds / loader.workers
    if run.device.type == "cuda" and blocked > images.seconds / 2:
        stages |= {stage: Cost(images.seconds - blocked, images.cpu_seconds), "storage": Cost(blocked)}
    setup = setup_of(run, read_header(loader.path, loader.own_files()).layout, phases={})
    costs = CostModel(stages, available_cores(), loader.decodes_in_reader, world_size())
    seconds = reading.seconds / reading.images
    sentences = [describe_bottleneck(costs, setup, seconds), suggest_fixes(costs, setup, seconds)]
    return " ".join([*filter(None, sentences), "`fastssl profile` measures it."])
