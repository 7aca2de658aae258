"""What limits a run, in one sentence: how much more there would be to gain, what would give it, what limits it then."""

import math
import statistics
from dataclasses import dataclass, field

from fastssl.common.distributed import world_size
from fastssl.common.system import available_cores, free_memory
from fastssl.loading.spans import Total
from fastssl.profiling.resources import Cost, Costs
from fastssl.recipe import Recipe
from fastssl.training.meters import LongWait, Observed
from fastssl.training.setup import Run

INFINITE = float("inf")
NAMES = {  # of a leg, within a sentence
    "storage": "the disk",
    "decode": "decoding",
    "cpu_augment": "cropping on the CPU",
    "copy": "the hand-over of batches",
    "views": "the views",
    "launch": "the launching of kernels",
    "compute": "the step",
    "communication": "the exchange of gradients",
}
HEADS = {"cpu_augment": "CPU-augment-bound"}  # others: the leg's own name
WOULD = " would lift it"
BUILD_CANVAS = "build-beton --canvas"
ALL_BUSY = 0.95  # share of the slowest line that the cores' line has when they are what is short
WORTH_SAYING = 0.05  # share of the cores' time
FROM_DATA = ("storage", "decode", "cpu_augment", "copy")
PHASES = {"kl": "the KL term", "forward": "the forward pass", "backward": "the backward pass", "draws": "the draws"}


@dataclass(frozen=True)
class Facts:
    """What decides on what can be changed."""

    workers: int
    layout: str  # of the file: "canvas" or "full"
    on_gpu: bool = False
    compiled: bool = False
    cuda_graphs: bool | None = False  # None: not possible, for several processes or micro-batches
    precision: str = "fp32"
    fits_into_memory: bool = True
    phases: dict[str, float] = field(default_factory=dict)  # of the step, seconds an image


def sentence(costs: Costs, facts: Facts) -> str:
    cause, rate = costs.cause(), costs.images_per_second()
    without = costs.faster(cause, INFINITE)
    if costs.is_balanced():
        return (
            f"Balanced: {name(cause, facts)} comes first at {rate:,.0f} images/s, and "
            f"{name(without.cause(), facts)} follows at {without.images_per_second():,.0f}, so no single change would "
            "lift it by more than a tenth."
        )
    head = HEADS.get(cause, f"{cause.capitalize()}-bound")
    next_limit = "nothing else is known to limit it"
    if (rate_then := without.images_per_second()) < INFINITE:
        next_limit = f"the next limit is {name(without.cause(), facts)} at {rate_then:,.0f} images/s"
    return f"{head}: {what_waits(cause, costs)}; {mends(cause, costs, facts)}; {next_limit}."


def what_waits(cause: str, costs: Costs) -> str:
    """How much there is to gain."""
    rate, lines = costs.images_per_second() / costs.processes, costs.lines()
    device = lines["device"]
    if lines["cores"] > ALL_BUSY * max(lines.values()) and cause not in FROM_DATA:
        return what_cores_do(costs)
    if cause in FROM_DATA:
        return f"the step could take {1 / (device * rate):.1f}x more images" if device else "the step takes nothing"
    if cause == "compute":
        share = costs.legs["compute"].seconds * rate
        faster = f"one of half its cost would make training {gain(cause, costs):.1f}x as fast"
        return f"the step works {min(1, share):.0%} of the time, and {faster}"
    if cause == "launch":
        return f"the GPU idles {1 - device * rate:.0%} of the time between kernels that the main thread is late with"
    return f"without {NAMES[cause]} training would be {gain(cause, costs, INFINITE):.1f}x as fast"


def what_cores_do(costs: Costs) -> str:
    """Of cores that all legs share, each one's part."""
    total = sum(cost.cpu_seconds for cost in costs.legs.values())
    shares = sorted(((cost.cpu_seconds / total, leg) for leg, cost in costs.legs.items()), reverse=True)
    parts = [f"{share:.0%} for {NAMES[leg]}" for share, leg in shares if share >= WORTH_SAYING]
    return f"the cores work all of the time ({', '.join(parts)})"


def mends(cause: str, costs: Costs, facts: Facts) -> str:
    """What would lift the limit."""
    if cause in ("decode", "cpu_augment"):
        return decoding_mends(cause, costs, facts)
    if cause == "storage":
        if facts.fits_into_memory:
            return "it ends with the first epoch, as the file fits into memory"
        return "data.order=quasi_random, a smaller --canvas or --max-side, more memory or a faster disk would lift it"
    if cause == "copy":
        return "a larger train.batch_size" + (" or a smaller canvas" if facts.on_gpu else "") + WOULD
    if cause == "views":
        first = "train.compile=true" if facts.on_gpu and not facts.compiled else "a lower views.first.blur"
        return f"{first} or fewer operations in views would lift it"
    if cause == "launch":
        options = ["a larger train.batch_size"]
        if not facts.compiled:
            options.append("train.compile=true")
        elif facts.cuda_graphs is False:
            options.append("train.cuda_graphs=true")
        return " or ".join(options) + WOULD
    if cause == "communication":
        return "train.compress_gradients=true or a larger train.batch_size would lift it"
    return compute_mends(costs, facts)


def compute_mends(costs: Costs, facts: Facts) -> str:
    largest = max(facts.phases, key=facts.phases.get) if facts.phases else None
    if not facts.on_gpu:
        mend = "a GPU would lift it"
        if "decode" in costs.legs and facts.layout == "full" and gain("decode", costs) > 1.05:
            mend = f"a canvas file in place of the full one ({BUILD_CANVAS}) or {mend}"
    elif facts.precision in ("fp32", "tf32"):
        mend = "train.precision=bf16 would lift it"
    elif not facts.compiled:
        mend = "train.compile=true would lift it"
    elif largest in ("draws", "objective", "kl"):
        mend = "fewer embedding.samples or a narrower model.projector would lift it"
    else:
        mend = "a smaller views.size or backbone, or more GPUs, would lift it"
    if largest is None:
        return mend
    share = facts.phases[largest] / sum(facts.phases.values())
    return f"{share:.0%} of the step is {phase(largest)}; {mend}"


def decoding_mends(cause: str, costs: Costs, facts: Facts) -> str:
    """Threads or cores that would make something else the limit; and the cheaper file."""
    lines = costs.lines()
    target = max(1e-12, costs.faster(cause, INFINITE).lines()["device"] or min(s for s in lines.values() if s))
    threads = lines["reader" if costs.decodes_in_reader else "threads"]
    workers = math.ceil(facts.workers * threads / target)
    cores = math.ceil(sum(cost.cpu_seconds for cost in costs.legs.values()) / target)
    options = []
    if not costs.decodes_in_reader and workers > facts.workers and workers <= costs.cores and lines["cores"] < threads:
        options.append(f"data.workers={workers}")
    elif cores > costs.cores or workers > costs.cores:
        more = costs.processes * (max(cores, workers) - costs.cores)
        options.append(f"{more} more core{'s' if more > 1 else ''}")
    if costs.decodes_in_reader and costs.cores > 1:
        options.append("a larger train.batch_size, which threads would decode,")
    if facts.layout == "full":
        options.append(f"a canvas file in place of the full one ({BUILD_CANVAS})")
    else:
        options.append("a smaller --canvas")
    return " or ".join(options) + WOULD


def gain(leg: str, costs: Costs, factor: float = 2) -> float:
    """Times as fast, if that leg were so many times as fast."""
    return costs.faster(leg, factor).images_per_second() / costs.images_per_second()


def name(leg: str, facts: Facts) -> str:
    """A leg in a sentence; of the step its largest phase too."""
    if leg == "compute" and facts.phases:
        return f"the step ({phase(max(facts.phases, key=facts.phases.get))} above all)"
    return NAMES[leg]


def phase(of_step: str) -> str:
    return PHASES.get(of_step, f"the {of_step}")


def explain_data_wait(run: Run, observed: Observed) -> str:
    """The sentence for a run in training, from what its loader and its loop have seen of themselves."""
    loader, totals = run.state.loader, observed.spans

    def an_image(*names: str, threads: int = 1) -> Cost:
        seconds = sum(totals.get(name, Total()).seconds for name in names)
        cpu_seconds = sum(totals.get(name, Total()).cpu_seconds for name in names)
        return Cost(seconds / threads / observed.images, cpu_seconds / observed.images)

    if observed.waited < LongWait.SHARE * observed.seconds:
        return "Another process than the first waits: `torchrun ... -m fastssl profile` says why."
    decode, reader = an_image("decode", threads=loader.workers), an_image("start", "copy")
    if loader.decodes_in_reader:  # within "start"
        decode = an_image("decode")
        reader = Cost(reader.seconds - decode.seconds, reader.cpu_seconds - decode.cpu_seconds)
    working = Cost((observed.seconds - observed.waited) / observed.images, 0.0)
    legs = {"decode": decode, "copy": reader, "compute": working}
    cores = available_cores()
    blocked = decode.seconds - decode.cpu_seconds / loader.workers  # by the disk, unless all cores are busy
    if run.device.type == "cuda" and blocked > decode.seconds / 2:
        legs |= {"decode": Cost(decode.seconds - blocked, decode.cpu_seconds), "storage": Cost(blocked)}
    facts = Facts(
        workers=loader.workers,
        layout="full" if loader.crop == "cpu" else "canvas",
        on_gpu=run.device.type == "cuda",
        compiled=run.compiled,
        cuda_graphs=cuda_graphs_of(run.recipe),
        fits_into_memory=loader.path.stat().st_size <= free_memory(),
    )
    costs = Costs(legs, cores, loader.decodes_in_reader, world_size())
    return sentence(costs, facts) + " `fastssl profile` measures it."


def cuda_graphs_of(recipe: Recipe) -> bool | None:
    possible = world_size() == 1 and recipe.train.accumulate == 1
    return recipe.train.cuda_graphs if possible else None


def verdict(costs: Costs, facts: Facts, measured: list[float], ceiling: list[float]) -> dict:
    """The profile's section of that name. measured: images/s end to end; ceiling: with the data at hand, both of the
    same windows.

    accelerator_utilisation is MLPerf Storage's, the time that the device computes for over the total time: here of
    neighbouring windows, so that a machine whose speed drifts does not count.
    """
    cause = costs.cause()
    without = costs.faster(cause, INFINITE)
    rate_then = without.images_per_second()
    return {
        "cause": "balanced" if costs.is_balanced() else cause,
        "sentence": sentence(costs, facts),
        "accelerator_utilisation": min(1.0, statistics.median(m / c for m, c in zip(measured, ceiling))),
        "next": {"cause": without.cause(), "images_per_second": rate_then} if rate_then < INFINITE else None,
        "twice_as_fast": {leg: costs.faster(leg, 2).images_per_second() for leg in costs.legs},
    }
